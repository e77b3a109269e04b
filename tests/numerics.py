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

import torch
from torch import Tensor

from bigkern.tools.evaluation import errors, limit, uninitialised_memory_is_nan


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
    with uninitialised_memory_is_nan():
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


def _fresh(x: Tensor | None) -> Tensor | None:
    """The tensor itself with its strides, as a leaf."""
    return x if x is None else x.detach().requires_grad_(x.requires_grad)
