"""What the training commands print: progress bars and tables, drawn by rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from bigkern.models import LayerRun
from bigkern.training.errors import require
from bigkern.training.metrics import are_numbers
from bigkern.training.trainer import Epoch, Trainer


def console():
    """rich's console; a log or a pipe gets whole lines instead of lines folded at 80 columns."""
    made = require("rich.console", "'bigkern[cli]'", "this command").Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, 160)
    return made


def table(title: str, *columns: str, right: tuple[str, ...] = ()):
    """An empty rich table; ``right`` names the columns of figures."""
    drawn = require("rich.table", "'bigkern[cli]'", "this command").Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return drawn


@contextmanager
def training_progress(to, trainer: Trainer, epochs: int, label: str = "") -> Iterator[Callable[[Trainer], None]]:
    """A progress bar over all epochs; yields the function to call after each step."""
    progress_module = require("rich.progress", "'bigkern[cli]'", "this command")
    total = epochs * trainer.steps_per_epoch
    done = trainer.epoch * trainer.steps_per_epoch + trainer.step
    with progress_module.Progress(
        progress_module.TextColumn("{task.description}"),
        progress_module.BarColumn(bar_width=30),
        progress_module.TextColumn("{task.completed}/{task.total} batches"),
        progress_module.TextColumn("{task.fields[state]}"),
        progress_module.TimeElapsedColumn(),
        progress_module.TextColumn("left"),
        progress_module.TimeRemainingColumn(),
        console=to,
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=total, completed=done, state="")
        shown, measure = 0.0, measure_of(trainer.train.targets)

        def advance(trainer: Trainer) -> None:
            nonlocal shown
            bar.advance(task)
            now = time.monotonic()
            if now - shown > 0.25:  # reading the loss waits for a GPU, so not after each step
                shown = now
                loss, accuracy = trainer.running
                bar.update(
                    task,
                    description=f"{label}epoch {trainer.epoch + 1}/{epochs}",
                    state=f"loss {loss:.3f}  {measure} {accuracy:.1%}",
                )

        yield advance


def served_by(runs: dict[str, LayerRun]) -> list[str]:
    """["bigkern (cuda): LayerNorm", "torch.nn: Linear, Conv2d"]: the kinds of layers by who ran them, bigkern first."""
    kinds: dict[str, list[str]] = {}
    for kind, run in sorted(runs.items(), key=lambda item: item[1].package):
        kinds.setdefault(str(run), []).append(kind)
    return [f"{server}: {', '.join(names)}" for server, names in kinds.items()]


def measure_of(targets: Tensor) -> str:
    """What accuracy is called for these targets."""
    return "explained variance" if are_numbers(targets) else "accuracy"


def epoch_line(record: Epoch, epochs: int, measure: str = "accuracy") -> str:
    return (
        f"epoch {record.number:>{len(str(epochs))}}/{epochs}  loss {record.loss:.4f}  {measure} {record.accuracy:.2%}  "
        f"held out: loss {record.held_out_loss:.4f}  {measure} {record.held_out_accuracy:.2%}  "
        f"{record.samples / max(record.seconds, 1e-9):,.0f} samples/s"
    )
