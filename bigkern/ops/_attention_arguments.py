"""Arguments that attention and decoding have in common: checked, and as their raw ops want them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scale(scale: float | None, head_dim: int) -> float:
    if scale is not None:
        return scale
    return 1.0 / math.sqrt(head_dim) if head_dim > 0 else 1.0


def tf32(query: Tensor) -> bool:
    return query.dtype == torch.float32 and query.is_cuda and torch.backends.cuda.matmul.allow_tf32


def window(op: str, window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """(left, right), -1 without a limit; causal attention sees nothing to the right."""
    if window is None:
        return -1, 0 if is_causal else -1
    sides = (window, window) if isinstance(window, int) else tuple(window)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= -1 for side in sides):
        raise ValueError(
            f"{op}: window is {window}; it must be (left, right), numbers of keys from 0, or -1 without a limit"
        )
    left, right = sides
    return left, 0 if is_causal else right


def check_numbers(op: str, softcap: float | None, scale: float | None, dropout_p: float = 0.0) -> None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it is a probability and must be in [0, 1]")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, such as 50.0, or None")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}; it must be finite, or None for 1 / sqrt(head_dim)")


def check_shapes(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, names: tuple[str, str] = ("key", "value")
) -> None:
    """Of 4-D tensors; ``names`` is what the caller calls key and value."""
    key_name, value_name = names
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"{op}: query has head_dim {query.shape[3]} and {key_name} {key.shape[3]}; they must be the same"
        )
    if key.shape[2] != value.shape[2]:
        raise ValueError(
            f"{op}: {key_name} is {key.shape[2]} long and {value_name} {value.shape[2]}; each key has one value"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"{op}: {key_name} has {key.shape[1]} heads and {value_name} {value.shape[1]}; they must have the same"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"{op}: query has {heads} heads and {key_name} {kv_heads}; they must have the same, or pass enable_gqa=True"
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"{op}: query has {heads} heads and {key_name} {kv_heads}; with enable_gqa the query's must be a "
            "multiple of the key's"
        )


def check_slopes(op: str, slopes: Tensor | None, batch: int, heads: int, device: torch.device) -> Tensor | None:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{op}: alibi_slopes is a {type(slopes).__name__}; expected a torch.Tensor or None")
    if not slopes.is_floating_point():
        raise TypeError(f"{op}: alibi_slopes has dtype {slopes.dtype}; expected float32")
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; it must be (heads,) or (batch, heads), here "
            f"{(heads,)} or {(batch, heads)}"
        )
    if slopes.device != device:
        raise ValueError(f"{op}: alibi_slopes is on {slopes.device} and query on {device}; move it with .to(device)")
    return slopes if slopes.dtype == torch.float64 else slopes.float().contiguous()
