"""Attention on the compiled CUDA kernels: what they support, and their raw ops (csrc/torch/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.attention import _schema  # noqa: F401  (declares the ops that the extension implements)

MAX_HEAD_DIM = 256

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None, *options
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None.  Arguments as :func:`forward`."""
    reason = _extension.unsupported_tensors("attention_forward", query=query, key=key, value=value)
    if reason is not None:
        return reason
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head_dim is {query.shape[3]} and the value's {value.shape[3]}; the CUDA kernels take up to {MAX_HEAD_DIM}"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}; the CUDA kernels take bool, float32 and the query's dtype"
    if alibi_slopes is not None and alibi_slopes.dtype != torch.float32:
        return f"alibi_slopes is {alibi_slopes.dtype}; the CUDA kernels take float32: convert it with .float()"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """(output, lse); see _schema.py."""
    return torch.ops.bigkern_cuda.attention_forward.default(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        bottom_right,
        softcap,
        scale,
        dropout_p,
        philox,
        tf32,
    )


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tf32: bool,
    need_grad_mask: bool,
    need_grad_slopes: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask, grad_slopes); see _schema.py."""
    return torch.ops.bigkern_cuda.attention_backward.default(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        attn_mask,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        bottom_right,
        softcap,
        scale,
        dropout_p,
        philox,
        tf32,
        need_grad_mask,
        need_grad_slopes,
        deterministic,
    )
