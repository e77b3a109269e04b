"""Recurrent layers on the compiled CUDA kernels: what they support, and their raw ops (csrc/torch/rnn.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.rnn import _schema

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()


def unsupported(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mode: str, projected: bool, extras: Sequence[str]
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None."""
    reason = _extension.unsupported_tensors("rnn_forward", input=input, h0=states[0], weight=params[0])
    if reason is not None:
        return reason
    if projected:
        return "proj_size is not 0; the CUDA kernels exchange the hidden state as it is, without a projection"
    if "layer_norm" in extras:
        return "layer_norm given; the CUDA kernels have no such cells, torch runs them step by step"
    for tensor in (*states, *params):
        if tensor.dtype != input.dtype:
            return f"input is {input.dtype} and a state or weight {tensor.dtype}; the CUDA kernels take one dtype"
    return None


def forward(
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    save: bool,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
    variant: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hn, cn, saved); see _schema.py."""
    return torch.ops.bigkern_cuda.rnn_forward.default(
        gates,
        weight_hh,
        bias_hn,
        h0,
        c0,
        mask,
        offsets,
        lengths,
        cell,
        save,
        _schema.VARIANTS.index(variant),
        zone,
        cell_zone,
        zoneout,
        cell_zoneout,
    )


def backward(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Tensor,
    saved: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
    variant: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_gates, grad_hidden, grad_h0, grad_c0); see _schema.py."""
    return torch.ops.bigkern_cuda.rnn_backward.default(
        grad_output,
        grad_hn,
        grad_cn,
        output,
        saved,
        weight_hh.mT.contiguous(),
        h0,
        c0,
        mask,
        offsets,
        lengths,
        cell,
        _schema.VARIANTS.index(variant),
        zone,
        cell_zone,
        zoneout,
        cell_zoneout,
    )
