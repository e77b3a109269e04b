"""The error rule as assertions: a kernel may err twice as much as torch does in the same dtype, plus one rounding.

The rule itself stands in bigkern/tools/evaluation.py, where `bigkern accuracy` and `selfcheck` have it from; the truth
is torch in float64 on the same values.  Memory that a kernel allocates and does not write is NaN, so it cannot pass for
a result.

    check(kernel, reference, [input, weight, bias])

runs ``kernel`` on the tensors, ``reference`` on the same, and ``reference`` on them in float64, each with the gradients
with respect to every tensor that requires one, and asserts the rule for each output and gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.tools.evaluation import (
    DRAWS,
    Errors,
    errors,
    limit,
    may_be_luck,
    pooled,
    uninitialised_memory_is_nan,
    within,
)


class _Row(NamedTuple):
    """Errors of one output or gradient."""

    name: str
    found: Errors
    torch: Errors
    dtype: torch.dtype
    elements: int


def assert_close(name: str, actual: Tensor, torch_result: Tensor, truth: Tensor) -> None:
    """Assert the rule for one tensor: ``actual`` against the float64 ``truth``, beside ``torch_result``."""
    _assert_within(_row(name, actual, torch_result, truth))


def _row(name: str, actual: Tensor, torch_result: Tensor, truth: Tensor) -> _Row:
    assert actual.dtype == torch_result.dtype, f"{name} has dtype {actual.dtype}, torch's has {torch_result.dtype}"
    return _Row(name, errors(actual, truth), errors(torch_result, truth), actual.dtype, actual.numel())


def _within(row: _Row, factor: float = 2.0) -> bool:
    return within(row.found, limit(row.torch, row.dtype, row.elements, factor))


def _assert_within(row: _Row, factor: float = 2.0) -> None:
    allowed = limit(row.torch, row.dtype, row.elements, factor)
    assert within(row.found, allowed), (
        f"{row.name}: error {row.found.norm:.3g} (norm), {row.found.max:.3g} (max); allowed {allowed.norm:.3g}, "
        f"{allowed.max:.3g}; torch's own {row.torch.norm:.3g}, {row.torch.max:.3g}"
    )


def _pool(draws: Sequence[_Row]) -> _Row:
    found, own = (pooled([getattr(draw, side) for draw in draws]) for side in ("found", "torch"))
    return draws[0]._replace(name=f"{draws[0].name}, {len(draws)} draws", found=found, torch=own)


def check(
    kernel: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    factor: float = 2.0,
) -> None:
    """Assert the rule for every output of ``kernel(*inputs)`` and every gradient.

    ``reference`` is the same function in torch's operators, fit for any dtype.  Gradients flow from random cotangents.
    What leaves the rule is drawn again, seven times, and judged by all draws together.  ``factor`` is the rule's; who
    gives another says why.
    """
    names = names or [f"input {i}" for i in range(len(inputs))]
    wanted = [name for name, x in zip(names, inputs, strict=True) if x is not None and x.requires_grad]
    rows = _draw(kernel, reference, inputs, wanted, seed)
    settled = [_within(row, factor) or not may_be_luck(row.found) for row in rows]
    if not all(settled):
        again = [
            _draw(kernel, reference, [redrawn(x, draw) for x in inputs], wanted, seed + 100 * draw)
            for draw in range(1, DRAWS)
        ]
        rows = [row if keep else _pool(draws) for row, keep, *draws in zip(rows, settled, rows, *again, strict=True)]
    for row in rows:
        _assert_within(row, factor)


def _draw(kernel, reference, inputs, wanted, seed) -> list[_Row]:
    with uninitialised_memory_is_nan():
        outputs, grads = run(kernel, inputs, seed)
    torch_outputs, torch_grads = run(reference, inputs, seed)
    truths, true_grads = run(reference, [to_double(x) for x in inputs], seed)
    rows = [_row(f"output {i}", *results) for i, results in enumerate(zip(outputs, torch_outputs, truths, strict=True))]
    gradients = zip(wanted, grads, torch_grads, true_grads, strict=True)
    return rows + [_row(f"gradient of {name}", *results) for name, *results in gradients]


def redrawn(x: Tensor | None, draw: int) -> Tensor | None:
    """Every value multiplied by a random number of 15/16 to 17/16: other roundings of the same problem.

    Zeros, infinities and NaN stay, and so do layout, offset and sharing of memory within the tensor.
    """
    if x is None or not x.is_floating_point():
        return x
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.detach().untyped_storage())
    factors = torch.rand(storage.shape, generator=torch.Generator().manual_seed(draw)).to(x.device)
    values = (storage.double() * (0.9375 + 0.125 * factors)).to(x.dtype)
    return values.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)


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


def _fresh(x: Tensor | None) -> Tensor | None:
    """The tensor itself with its strides, as a leaf."""
    return x if x is None else x.detach().requires_grad_(x.requires_grad)
