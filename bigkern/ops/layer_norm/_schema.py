"""The raw ops of layer norm: functional, without autograd, one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/layer_norm.cpp, ``bigkern_triton`` by
_triton.py.  All tensors are 2-D (rows x cols) with unit inner stride, the parameters (cols,), the statistics (rows,).
A result that does not apply is an empty (0,) tensor, because a functional op may not return one of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

_FORWARD = (
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, float dropout_p,"
    " Tensor? philox) -> (Tensor output, Tensor summed, Tensor mean, Tensor rstd)"
)
_BACKWARD = (
    "(Tensor? grad_output, Tensor? grad_summed, Tensor summed, Tensor mean, Tensor rstd, Tensor? weight, bool rms,"
    " float dropout_p, Tensor? philox, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


def _forward_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = input.shape
    return (
        input.new_empty((rows, cols)),
        input.new_empty((0,) if residual is None else (rows, cols)),
        input.new_empty((0,) if rms else (rows,), dtype=torch.float32),
        input.new_empty((rows,), dtype=torch.float32),
    )


def _backward_fake(
    grad_output: Tensor | None,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = summed.shape
    parameter = summed.dtype if weight is None else weight.dtype
    return (
        summed.new_empty((rows, cols)),
        summed.new_empty((rows, cols) if dropout_p > 0 else (0,)),
        summed.new_empty((cols,) if need_weight else (0,), dtype=parameter),
        summed.new_empty((cols,) if need_bias else (0,), dtype=parameter),
    )


for _namespace in NAMESPACES:
    for _name, _signature, _fake in (
        ("layer_norm_forward", _FORWARD, _forward_fake),
        ("layer_norm_backward", _BACKWARD, _backward_fake),
    ):
        torch.library.define(f"{_namespace}::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
