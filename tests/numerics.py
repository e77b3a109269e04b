"""The error rule: a kernel may err twice as much as torch does in the same dtype, plus the error of one rounding.

The truth is torch in float64 on the same values.  Errors are relative: in the 2-norm, and of the largest element
against the largest of the truth.  One rounding more is one unit in the last place, and a quarter of one in the 2-norm,
where roundings average out.  Over a few elements they do not, and torch's own error is luck, often 0: there the rule
allows four units, the roundings of a handful of operations.  Memory that a kernel allocates and does not write is NaN,
so it cannot pass for a result.

    check(kernel, reference, [input, weight, bias])

runs ``kernel`` on the tensors, ``reference`` on the same, and ``reference`` on them in float64, each with the gradients
with respect to every tensor that requires one, and asserts the rule for each output and gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
AVERAGING_ELEMENTS = 64


class Errors(NamedTuple):
    """Errors relative to the truth: in the 2-norm, and of the largest element."""

    norm: float
    max: float


def errors(actual: Tensor, truth: Tensor) -> Errors:
    """Relative errors of ``actual``; it must be NaN or infinite exactly where ``truth`` is, and of the same sign."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = truth.isfinite()
    wild = torch.where(finite, 0.0, actual)
    assert torch.equal(wild.nan_to_num(nan=0.5), torch.where(finite, 0.0, truth).nan_to_num(nan=0.5)), (
        "NaN or infinity in other places than the truth's"
    )
    difference, truth = (actual - truth)[finite], truth[finite]
    assert difference.isfinite().all(), "NaN or infinity where the truth is finite"
    if truth.numel() == 0:
        return Errors(0.0, 0.0)
    return Errors(
        _ratio(difference.norm().item(), truth.norm().item()),
        _ratio(difference.abs().max().item(), truth.abs().max().item()),
    )


def limit(torch_errors: Errors, dtype: torch.dtype, elements: int) -> Errors:
    """The errors allowed in ``dtype``, for that many elements, where torch's own are these."""
    ulp = torch.finfo(dtype).eps
    norm_floor, max_floor = (ulp / 4, ulp) if elements >= AVERAGING_ELEMENTS else (4 * ulp, 4 * ulp)
    return Errors(FACTOR * torch_errors.norm + norm_floor, FACTOR * torch_errors.max + max_floor)


def assert_close(name: str, actual: Tensor, torch_result: Tensor, truth: Tensor) -> None:
    """Assert the rule for one tensor: ``actual`` against the float64 ``truth``, beside ``torch_result``."""
    assert actual.dtype == torch_result.dtype, f"{name} has dtype {actual.dtype}, torch's has {torch_result.dtype}"
    found, torch_errors = errors(actual, truth), errors(torch_result, truth)
    allowed = limit(torch_errors, actual.dtype, actual.numel())
    assert found.norm <= allowed.norm and found.max <= allowed.max, (
        f"{name}: error {found.norm:.3g} (norm), {found.max:.3g} (max); allowed {allowed.norm:.3g}, {allowed.max:.3g}; "
        f"torch's own {torch_errors.norm:.3g}, {torch_errors.max:.3g}"
    )


def check(
    kernel: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Assert the rule for every output of ``kernel(*inputs)`` and every gradient.

    ``reference`` is the same function in torch's operators, fit for any dtype.  Gradients flow from random cotangents.
    """
    names = names or [f"input {i}" for i in range(len(inputs))]
    with unwritten_memory_is_nan():
        outputs, grads = run(kernel, inputs, seed)
    torch_outputs, torch_grads = run(reference, inputs, seed)
    truths, true_grads = run(reference, [to_double(x) for x in inputs], seed)
    for i, results in enumerate(zip(outputs, torch_outputs, truths, strict=True)):
        assert_close(f"output {i}", *results)
    wanted = [name for name, x in zip(names, inputs, strict=True) if x is not None and x.requires_grad]
    for name, *results in zip(wanted, grads, torch_grads, true_grads, strict=True):
        assert_close(f"gradient of {name}", *results)


def run(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor | None], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients) of ``function`` with cotangents that depend on nothing but the seed and the shapes."""
    inputs = [_fresh(x) for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    cotangents = {y: cotangent(y, seed + i) for i, y in enumerate(outputs) if y.requires_grad}
    if not wanted:
        return outputs, []
    return outputs, list(torch.autograd.grad(list(cotangents), wanted, list(cotangents.values())))


def cotangent(output: Tensor, seed: int = 0) -> Tensor:
    """Normal random values like ``output``; the same values, but for rounding to bf16, in every dtype."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    values = torch.randn(output.shape, generator=generator).bfloat16()  # exact in every dtype under test but fp16
    return values.to(output.device, output.dtype)


def to_double(x: Tensor | None) -> Tensor | None:
    """The same values in float64; other than floating-point tensors are passed on."""
    if x is None or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (integers with their largest value)."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _fresh(x: Tensor | None) -> Tensor | None:
    """The tensor itself with its strides, as a leaf."""
    return x if x is None else x.detach().requires_grad_(x.requires_grad)


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else error
