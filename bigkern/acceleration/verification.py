"""A model as it was and as ``accelerate`` made it, side by side, by the numerics rule.

The rule (CONTRIBUTING.md) for one op: with e_torch torch's own error against float64 and e_kernel ours, e_kernel <=
2 e_torch + one rounding.  Of a whole model it is asked for each output and each gradient, with two additions:

* One tensor's own error may be small by luck, and says less than those of its fellows what rounding does at this depth:
  e_torch is no less than the median over the outputs, or over the gradients.
* A gradient that is 0 in mathematics, as that of the bias of an attention's keys, is rounding alone: errors are
  relative to the tensor's size or to the median tensor's, whichever is larger.

Where a batch norm is folded, the convolution's weights are rounded once more.  What that may do is measured, as the
error in float64 of weights that are off by up to half a unit in their last place, and added to e_torch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from bigkern.tools.evaluation import Errors, limit
from bigkern.tools.report import print_table

if TYPE_CHECKING:
    from bigkern.acceleration.report import Report

_COLUMNS = ("what", "tensors", "largest difference", "in", "error before", "error after", "allowed", "verdict")


@dataclass(frozen=True)
class VerificationRow:
    """One output, or the gradient of one parameter or input.

    ``difference`` is the largest between the model as it was and as it is; ``before`` and ``after`` are their errors
    against float64, ``allowed`` what the rule allows the latter.
    """

    kind: str
    name: str
    difference: float
    before: Errors
    after: Errors
    allowed: Errors

    @property
    def passed(self) -> bool:
        return self.after.norm <= self.allowed.norm and self.after.max <= self.allowed.max


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.  ``print`` shows it; ``passed`` is the verdict.

    ``seconds_before`` and ``seconds_after`` are medians of a forward and, where there is something to differentiate,
    backward.
    """

    rows: list[VerificationRow]
    training: bool
    seconds_before: float
    seconds_after: float

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def speedup(self) -> float:
        """How many times as fast as before."""
        return self.seconds_before / self.seconds_after

    @property
    def failures(self) -> list[VerificationRow]:
        return [row for row in self.rows if not row.passed]

    def largest_difference(self, kind: str) -> VerificationRow | None:
        """The row of ``"output"`` or ``"gradient"`` that differs most; None without any."""
        rows = [row for row in self.rows if row.kind == kind]
        return max(rows, key=lambda row: row.difference) if rows else None

    def to_markdown(self) -> str:
        lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self._table()]
        return "\n".join([*lines, "", self._summary()]) + "\n"

    def __str__(self) -> str:
        text = io.StringIO()
        with redirect_stdout(text):
            print_table("verify: errors against float64, relative", _COLUMNS, self._table())
        return f"{text.getvalue().rstrip()}\n{self._summary()}"

    def _table(self) -> list[tuple[str, ...]]:
        table = []
        for kind in ("output", "gradient"):
            rows = [row for row in self.rows if row.kind == kind]
            if not rows:
                continue
            # The worst by the rule: it is the one that decides.
            worst = max(rows, key=lambda row: row.after.norm / row.allowed.norm)
            differs = self.largest_difference(kind)
            verdict = "pass" if all(row.passed for row in rows) else "FAIL"
            table.append(
                (
                    f"{kind}s",
                    str(len(rows)),
                    f"{differs.difference:.2e}",
                    differs.name,
                    f"{worst.before.norm:.2e}",
                    f"{worst.after.norm:.2e}",
                    f"{worst.allowed.norm:.2e}",
                    verdict,
                )
            )
        table += [
            (
                row.kind,
                "1",
                f"{row.difference:.2e}",
                row.name,
                f"{row.before.norm:.2e}",
                f"{row.after.norm:.2e}",
                f"{row.allowed.norm:.2e}",
                "FAIL",
            )
            for row in self.failures[:10]
        ]
        return table

    def _summary(self) -> str:
        mode = "training mode, equal seeds" if self.training else "evaluation mode, no dropout"
        return (
            f"{mode}; {1e3 * self.seconds_before:.3g} ms before, {1e3 * self.seconds_after:.3g} ms after: "
            f"{self.speedup:.2f} times as fast"
        )


def verify(
    report: Report,
    inputs: Tensor | tuple | list | Mapping[str, Any],
    *,
    training: bool = False,
    repeats: int = 5,
    seed: int = 0,
) -> Verification:
    """Run the model as it was and as it is on the same inputs, and compare outputs, gradients and time.

    Args:
        report: of the model; it stays accelerated.
        inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword arguments.  Gradients are
            those of all parameters, and of the inputs that require one.
        training: False: evaluation mode, in which nothing is dropped.  True: training mode, with batch statistics;
            both runs begin with the same seed, but a model that drops at random draws other masks where bigkern's
            kernels draw them.  Buffers are put back afterwards, as are modes and torch's generators.
        repeats: of how many timed runs the median is taken, in turn.
        seed: of the gradients that come in from above, and of each run.

    Raises:
        RuntimeError: the model was restored or changed.
        ValueError: it returns no tensor, or does not run in float64, which is the reference.
    """
    model = report.model
    if repeats < 1:
        raise ValueError(f"verify: repeats is {repeats}; it must be 1 or more")
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), _mode(model, training), torch.enable_grad():
        after = _run(model, inputs, seed)
        with report.original():
            before = _run(model, inputs, seed)
            double = _to_double(model)
        try:
            truth = _run(double, pytree.tree_map(_double, inputs), seed)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"verify: the model does not run in float64, which is the reference: {error}") from error
        rounded = truth
        if report.folds:
            _round(double, dict(model.named_parameters()), seed)
            rounded = _run(double, pytree.tree_map(_double, inputs), seed)
        del double
        seconds_before, seconds_after = [], []
        for _ in range(repeats):
            with report.original():
                seconds_before.append(_time(model, inputs, seed))
            seconds_after.append(_time(model, inputs, seed))
    return Verification(
        _compare(before, after, truth, rounded), training, median(seconds_before), median(seconds_after)
    )


# (kind, name) to tensor.
_Results = dict[tuple[str, str], Tensor]


def _run(model: nn.Module, inputs: Any, seed: int, timed: bool = False) -> _Results:
    """Outputs, and gradients for cotangents that depend on the seed and the shapes alone."""
    torch.manual_seed(seed)
    with _kept_buffers(model):
        leaves = pytree.tree_map(_fresh, inputs)
        outputs = _outputs(_call(model, leaves))
        wanted = {f"{name}": param for name, param in model.named_parameters() if param.requires_grad}
        for path, leaf in pytree.tree_flatten_with_path(leaves)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                wanted[f"input{pytree.keystr(path)}"] = leaf
        results = {("output", name): output.detach() for name, output in outputs.items()}
        if not (model.training or timed):
            # Inference may take another way, as where a batch norm is folded.
            with torch.no_grad():
                inferred = _outputs(_call(model, leaves))
            results.update((("output", f"{name} (no_grad)"), output) for name, output in inferred.items())
        differentiable = {name: output for name, output in outputs.items() if output.requires_grad}
        if differentiable and wanted:
            cotangents = [_cotangent(output, seed + i) for i, output in enumerate(differentiable.values())]
            grads = torch.autograd.grad(
                list(differentiable.values()), list(wanted.values()), cotangents, allow_unused=True
            )
            results.update(
                (("gradient", name), grad) for name, grad in zip(wanted, grads, strict=True) if grad is not None
            )
    return results


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def _outputs(result: Any) -> dict[str, Tensor]:
    found = {
        pytree.keystr(path) or "output": leaf
        for path, leaf in pytree.tree_flatten_with_path(result)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    if not found:
        raise ValueError(f"verify: the model returned a {type(result).__name__} in which there is no tensor to compare")
    return found


def _time(model: nn.Module, inputs: Any, seed: int) -> float:
    _synchronize(model)
    start = time.perf_counter()
    _run(model, inputs, seed, timed=True)
    _synchronize(model)
    return time.perf_counter() - start


def _synchronize(model: nn.Module) -> None:
    for device in {param.device for param in model.parameters() if param.is_cuda}:
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or evaluation mode, and back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    dropouts: list[tuple[nn.Module, float]] = []
    model.train(training)
    if not training:
        # cuDNN differentiates recurrent layers in training mode alone; without dropout that is no other function.
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                dropouts.append((module, module.dropout))
                module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, dropout in dropouts:
            module.dropout = dropout


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if model.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _to_double(model: nn.Module) -> nn.Module:
    # What a pruning hook computed last is no leaf, which deepcopy refuses; the hook computes it again.
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo).double()


def _round(double: nn.Module, params: Mapping[str, Tensor], seed: int) -> None:
    """Move the parameters as if they were rounded once more to the dtype that they have in ``params``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in double.named_parameters():
            offset = torch.rand(param.shape, generator=generator, dtype=torch.float64).to(param.device) - 0.5
            param.mul_(1 + torch.finfo(params[name].dtype).eps * offset)


def _fresh(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _cotangent(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    values = torch.randn(output.shape, generator=generator).bfloat16()  # the same values in every dtype
    return values.to(output.device, output.dtype)


def _compare(before: _Results, after: _Results, truth: _Results, rounded: _Results) -> list[VerificationRow]:
    missing = sorted(name for _, name in set(before) ^ set(after))
    if missing:
        raise ValueError(f"verify: before and after do not have the same outputs and gradients: {', '.join(missing)}")
    rows = []
    for kind in ("output", "gradient"):
        names = [name for found, name in before if found == kind]
        sizes = [_root_mean_square(truth[kind, name]) for name in names if truth[kind, name].numel()]
        typical = median(sizes) if sizes else 0.0
        errors_before = {name: _errors(before[kind, name], truth[kind, name], typical) for name in names}
        usual = Errors(*(median(column) for column in zip(*errors_before.values(), strict=True))) if names else None
        for name in names:
            old, new, exact = before[kind, name], after[kind, name], truth[kind, name]
            own = errors_before[name]
            weights = _errors(rounded[kind, name], exact, typical)
            own = Errors(max(own.norm, usual.norm) + weights.norm, max(own.max, usual.max) + weights.max)
            rows.append(
                VerificationRow(
                    kind,
                    name,
                    _largest(new, old),
                    errors_before[name],
                    _errors(new, exact, typical),
                    limit(own, old.dtype, old.numel()),
                )
            )
    return rows


def _root_mean_square(tensor: Tensor) -> float:
    return tensor.double().norm().item() / math.sqrt(tensor.numel())


def _errors(actual: Tensor, exact: Tensor, typical: float) -> Errors:
    """Relative to the tensor's size, or to a typical one's; infinite where only one of the two is finite."""
    if exact.numel() == 0:
        return Errors(0.0, 0.0)
    actual, exact = actual.double(), exact.double()
    difference = actual - exact
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference, exact = (torch.where(same, 0, tensor) for tensor in (difference, exact.nan_to_num(0, 0, 0)))
    if not difference.isfinite().all():
        return Errors(math.inf, math.inf)
    norm = max(exact.norm().item(), typical * math.sqrt(exact.numel()))
    largest = max(exact.abs().max().item(), typical)
    return Errors(
        difference.norm().item() / norm if norm else difference.norm().item(),
        difference.abs().max().item() / largest if largest else difference.abs().max().item(),
    )


def _largest(new: Tensor, old: Tensor) -> float:
    if new.shape != old.shape:
        return math.inf
    if new.numel() == 0:
        return 0.0
    difference = (new.double() - old.double()).abs()
    same = (new == old) | (new.isnan() & old.isnan())
    difference = torch.where(same, 0, difference)
    return math.inf if difference.isnan().any() else difference.max().item()
