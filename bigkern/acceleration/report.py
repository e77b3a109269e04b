"""What ``accelerate`` did to a model, as a table, and the way back."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigkern.acceleration._fusion import FusedSequential
from bigkern.tools.report import print_table

if TYPE_CHECKING:
    from bigkern.acceleration.verification import Verification

# The model itself, which has no path.
ROOT = "(model)"
_COLUMNS = ("module", "from", "to", "backend", "why not a better one", "note, or why it was kept")


@dataclass(frozen=True)
class Row:
    """One module: all its paths, its class before and after (None: it was kept), and why."""

    paths: list[str]
    before: str
    after: str | None
    backend: str
    why: str
    note: str

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def kept(self) -> bool:
        return self.after is None


@dataclass
class Swap:
    """A module with the class it had and the one it has now, and what the new one needs beyond the old."""

    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)

    def apply(self) -> None:
        self.module.__class__ = self.after
        self.module.__dict__.update(self.attributes)

    def undo(self) -> None:
        self.module.__class__ = self.before
        for name in self.attributes:
            self.module.__dict__.pop(name, None)


class Report:
    """What became of each layer.  ``print(report)`` shows it; see :func:`bigkern.acceleration.accelerate`.

    Attributes:
        rows: a :class:`Row` for each module that was swapped, and for each that might have been and was kept.
        others: how many modules of each type have parameters of their own and no counterpart in bigkern.
        notes: what else there is to say.
    """

    def __init__(self, model: nn.Module, rows: list[Row], swaps: list[Swap], others: Counter[str], notes: list[str]):
        self.model, self.rows, self.others, self.notes = model, rows, others, notes
        self._title = f"accelerate: {type(model).__name__}"
        self._swaps = swaps
        self._active = False

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if not row.kept]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.kept]

    @property
    def counts(self) -> dict[str, int]:
        """Modules swapped, by torch's type."""
        return dict(sorted(Counter(row.before for row in self.swapped).items()))

    @property
    def active(self) -> bool:
        """Whether the model is as ``accelerate`` made it, and not restored."""
        return self._active

    @property
    def folds(self) -> bool:
        """Whether a batch norm in evaluation may be folded into the convolution before it."""
        return any(swap.after is FusedSequential for swap in self._swaps)

    def restore(self) -> None:
        """Put the model back as it was before ``accelerate``; parameters keep what training has made of them.

        A second call does nothing.

        Raises:
            RuntimeError: a module's class was changed since, as fully_shard and parametrizations do; nothing is
                restored then.
        """
        if not self._active:
            return
        self._check_unchanged("restore")
        for swap in reversed(self._swaps):
            swap.undo()
        self._active = False

    def verify(
        self,
        inputs: torch.Tensor | tuple | list | Mapping[str, Any],
        *,
        training: bool = False,
        repeats: int = 5,
        seed: int = 0,
    ) -> Verification:
        """Run the model as it was and as it is, side by side; arguments as :func:`.verification.verify`."""
        from bigkern.acceleration.verification import verify

        return verify(self, inputs, training=training, repeats=repeats, seed=seed)

    def to_markdown(self) -> str:
        """The table, its layers that differ in a number alone in one row, with the counts below."""
        lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self._table()]
        return "\n".join([*lines, "", *(f"{line}  " for line in self._summary())]).rstrip() + "\n"

    def __str__(self) -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            print_table(self._title, _COLUMNS, self._table())
        return "\n".join([text.getvalue().rstrip(), *self._summary()])

    def __repr__(self) -> str:
        state = "" if self._active else ", restored"
        return f"<Report: {len(self.swapped)} swapped, {len(self.kept)} kept{state}>"

    def apply(self) -> None:
        """Make the swaps; part of ``accelerate``."""
        self._active = True
        for swap in self._swaps:
            swap.apply()

    def add(self, swap: Swap) -> None:
        """One swap more; part of ``accelerate``."""
        swap.apply()
        self._swaps.append(swap)

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """The model is as it was when this is left by an exception."""
        try:
            yield
        except BaseException:
            for swap in reversed(self._swaps):
                swap.undo()
            self._active = False
            raise

    @contextlib.contextmanager
    def original(self) -> Iterator[nn.Module]:
        """A context in which the model is as it was before ``accelerate``."""
        if not self._active:
            raise RuntimeError("verify: the model was restored, so there is nothing to compare; accelerate it again")
        self._check_unchanged("verify")
        for swap in reversed(self._swaps):
            swap.undo()
        try:
            yield self.model
        finally:
            for swap in self._swaps:
                swap.apply()

    def _check_unchanged(self, what: str) -> None:
        changed = [
            f"{type(swap.module).__name__} (was {swap.after.__name__})"
            for swap in self._swaps
            if type(swap.module) is not swap.after
        ]
        if changed:
            raise RuntimeError(
                f"{what}: modules have another class than accelerate gave them: {', '.join(changed[:3])}; undo what "
                "changed them first, as with torch.nn.utils.parametrize.remove_parametrizations (what fully_shard has "
                "sharded stays as it is)"
            )

    def _table(self) -> list[tuple[str, ...]]:
        """Rows whose paths differ in their numbers alone, one below the other or not, become one."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.path)
            key = (pattern, row.before, row.after or "kept", row.backend, row.why, row.note, str(len(row.paths)))
            groups.setdefault(key, []).append(row)
        table = []
        for (pattern, *cells, _), rows in groups.items():
            name = rows[0].path if len(rows) == 1 else f"{pattern} ({len(rows)})"
            also = ", ".join(rows[0].paths[1:4])
            table.append((f"{name}, also {also}" if also else name, *cells))
        return table

    def _summary(self) -> list[str]:
        swapped = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        lines = [f"{len(self.swapped)} swapped{f': {swapped}' if swapped else ''}; {len(self.kept)} kept"]
        if self.others:
            names = ", ".join(f"{count} {kind}" for kind, count in sorted(self.others.items()))
            lines.append(f"without a counterpart in bigkern: {names}")
        return lines + self.notes
