"""Attention of a few queries over a long cache of keys and values: a step of generating text.

Dao et al., "Flash-Decoding for long-context inference", 2023 (crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigkern import backend
from bigkern.ops import _attention_arguments as arguments
from bigkern.ops.attention_decode import _cuda, _torch, _triton

__all__ = ["attention_decode"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_MAX_SPLITS = 1024


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    *,
    cache_starts: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Put new keys and values into a cache, in place, and attend over what it then holds.

    It reads no number from the GPU, so that a CUDA graph may hold it: advance ``cache_seqlens`` in place.  Made for few
    queries; any number is served, but :func:`bigkern.ops.attention` is the faster one for a whole prompt.

    Args:
        query: (batch, heads, seqlen_q, head_dim); float32, bfloat16, float16, or float64 (torch backend only).
        key_cache: (batch, kv_heads, capacity, head_dim), value_cache: (batch, kv_heads, capacity, value_dim); the
            query's dtype, any strides, but the elements of a row beside each other.  Under autocast query, key and
            value take the caches' dtype.
        key: (batch, kv_heads, seqlen_new, head_dim), value: (batch, kv_heads, seqlen_new, value_dim); written to the
            rows from ``cache_seqlens[b]`` on.  None: nothing is written.
        cache_seqlens: int32 or int64, (batch,), on the query's device: the rows in use before the append.  None:
            all of them, and no room for ``key``.  What the other rows hold does not matter.
        cache_starts: int32 or int64, (batch,): each batch element's first row in use, for prompts padded on the left.
        is_causal: the last query stands at the last row, and none sees the rows behind its own.
        scale, softcap: as in :func:`bigkern.ops.attention`.
        enable_gqa: the caches may have fewer heads, of which each serves ``heads / kv_heads`` neighbouring ones.
        window, alibi_slopes: as in :func:`bigkern.ops.attention`, counted from the lower right corner as ``is_causal``.
        return_lse: also return the logarithm of the sum of the exponentials of each row's scores: float32 (float64 of
            float64), (batch, heads, seqlen_q), minus infinity for a row that sees nothing.
        splits: into how many parts a kernel cuts each sequence, to have work for the whole GPU; None chooses by shapes.
            The torch backend has no parts.

    Returns:
        (batch, heads, seqlen_q, value_dim), then lse if asked for.  A row that sees nothing gives 0.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not fit, tensors on different devices, numbers out of range, an input that requires a
            gradient.  On a CPU also lengths that are negative or leave no room for ``key``; on a GPU nobody waits for
            them, and rows beyond the capacity are dropped.
        bigkern.BackendError: the backend that was asked for cannot serve the arguments.
    """
    op = "attention_decode"
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    if (key is None) != (value is None):
        raise ValueError(f"{op}: key and value go together; one of them is None")
    if key is not None:
        tensors |= {"key": key, "value": value}
    for name, tensor in tensors.items():
        _check_tensor(op, name, tensor, query)
    arguments.check_numbers(op, softcap, scale)
    window_left, window_right = arguments.window(op, window, is_causal)
    if splits is not None and not (isinstance(splits, int) and 0 < splits <= _MAX_SPLITS):
        raise ValueError(f"{op}: splits is {splits}; it must be a number from 1 to {_MAX_SPLITS}, or None")
    if torch.is_autocast_enabled(query.device.type):
        dtype = key_cache.dtype
        query, key, value = (tensor if tensor is None else tensor.to(dtype) for tensor in (query, key, value))
        tensors |= {"query": query} if key is None else {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{op}: query is {query.dtype} and {name} {tensor.dtype}; they must be the same: convert with "
                ".to(dtype), or run under torch.autocast"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires a gradient and decoding has none; call it under torch.no_grad(), or train with "
                "bigkern.ops.attention"
            )
    batch, _, _, head_dim = query.shape
    if key_cache.shape[0] != batch:
        raise ValueError(f"{op}: query has batch {batch} and key_cache {key_cache.shape[0]}; they must be the same")
    if value_cache.shape[0] != batch:
        raise ValueError(f"{op}: query has batch {batch} and value_cache {value_cache.shape[0]}; they must be the same")
    arguments.check_shapes(op, query, key_cache, value_cache, enable_gqa, ("key_cache", "value_cache"))
    seqlen_new = 0
    if key is not None:
        seqlen_new = key.shape[2]
        _check_new(op, key, value, key_cache, value_cache, cache_seqlens)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _check_cache(op, name, cache, key is not None)
    _check_rows(op, "cache_seqlens", cache_seqlens, query, key_cache.shape[2], seqlen_new)
    _check_rows(op, "cache_starts", cache_starts, query, key_cache.shape[2], 0)
    slopes = arguments.check_slopes(op, alibi_slopes, batch, query.shape[1], query.device)
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes requires a gradient and decoding has none; use bigkern.ops.attention")

    query, key, value = (
        tensor if tensor is None or tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    options = (
        key,
        value,
        cache_seqlens,
        cache_starts,
        slopes,
        window_left,
        window_right,
        softcap or 0.0,
        arguments.scale(scale, head_dim),
        splits or 0,
    )
    implementation = backend.select(op, _IMPLEMENTATIONS, query, key_cache, value_cache, *options)
    # Nothing to launch on no elements; forward mode and functorch need operators that torch can transform itself.
    if (
        implementation is _torch
        or query.numel() == 0
        or key_cache.numel() == 0
        or value_cache.numel() == 0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        output, lse = _torch.forward(query, key_cache, value_cache, *options, return_lse)
    else:
        output, lse = implementation.forward(query, key_cache, value_cache, *options)
        if key is not None and not torch.compiler.is_compiling():
            # Autograd shall notice if it has saved a cache. torch.compile reads the raw op's schema.
            torch.autograd.graph.increment_version([x for x in (key_cache, value_cache) if not x.is_inference()])
    return (output, lse) if return_lse else output


def _check_tensor(op: str, name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}; supported are float32, bfloat16, float16 or float64: convert it "
            f"with {name}.float()"
        )
    if tensor.dim() != 4:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; it must have four dimensions (batch, heads, rows, head_dim)"
        )
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and query on {query.device}; move one with .to(device)")


def _check_new(
    op: str, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None
) -> None:
    if cache_seqlens is None:
        raise ValueError(
            f"{op}: key is given without cache_seqlens, which says where it goes; pass the lengths before the append"
        )
    batch, kv_heads, _, head_dim = key_cache.shape
    for name, new, dim in (("key", key, head_dim), ("value", value, value_cache.shape[3])):
        if new.shape != (batch, kv_heads, key.shape[2], dim):
            raise ValueError(
                f"{op}: {name} has shape {tuple(new.shape)}; to fit {name}_cache it must be "
                f"(batch, kv_heads, seqlen_new, dim), here {(batch, kv_heads, key.shape[2], dim)}"
            )


def _check_cache(op: str, name: str, cache: Tensor, written: bool) -> None:
    if cache.shape[3] > 1 and cache.stride(3) != 1:
        raise ValueError(
            f"{op}: {name} has stride {cache.stride(3)} between the elements of a row; a cache is used in place, and "
            "must have 1 there"
        )
    if written and any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        raise ValueError(f"{op}: {name} is expanded, several of its rows are one; it is written to: pass a copy of it")


def _check_rows(op: str, name: str, rows: Tensor | None, query: Tensor, capacity: int, seqlen_new: int) -> None:
    """Of a row number for each batch element."""
    if rows is None:
        return
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        got = f"of {rows.dtype}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise TypeError(f"{op}: {name} is {got}; it must be an int32 or int64 tensor (batch,)")
    if rows.shape != query.shape[:1]:
        raise ValueError(f"{op}: {name} has shape {tuple(rows.shape)}; it must be (batch,), here {(query.shape[0],)}")
    if rows.device != query.device:
        raise ValueError(f"{op}: {name} is on {rows.device} and query on {query.device}; move it with .to(device)")
    if rows.numel() == 0 or not _torch.readable(rows):
        return
    first, last = (int(bound) for bound in rows.aminmax())
    if first < 0:
        raise ValueError(f"{op}: {name} has {first}; it must not be negative")
    if last + seqlen_new > capacity:
        more = f" and {seqlen_new} are to be appended" if seqlen_new > 0 else ""
        raise ValueError(
            f"{op}: {name} has {last}{more}; the caches have {capacity} rows: make them longer, or drop the first rows"
        )
