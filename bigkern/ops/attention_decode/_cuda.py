"""Decoding on the compiled CUDA kernels: what they support, and their raw op (csrc/torch/attention_decode.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.attention_decode import _schema  # noqa: F401  (declares the op that the extension implements)

MAX_HEAD_DIM = 256

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()


def unsupported(query: Tensor, key_cache: Tensor, value_cache: Tensor, *options) -> str | None:
    """Why these arguments cannot be served, in plain words, or None.  Arguments as :func:`forward`."""
    reason = _extension.unsupported_tensors(
        "attention_decode_forward", query=query, key_cache=key_cache, value_cache=value_cache
    )
    if reason is not None:
        return reason
    if max(query.shape[3], value_cache.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head_dim is {query.shape[3]} and the value's {value_cache.shape[3]}; the CUDA kernels take up to "
            f"{MAX_HEAD_DIM}"
        )
    return None


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_starts: Tensor | None,
    alibi_slopes: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """(output, lse), and key and value in the caches; see _schema.py."""
    return torch.ops.bigkern_cuda.attention_decode_forward.default(
        query,
        key_cache,
        value_cache,
        key,
        value,
        cache_seqlens,
        cache_starts,
        alibi_slopes,
        window_left,
        window_right,
        softcap,
        scale,
        splits,
    )
