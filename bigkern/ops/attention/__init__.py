"""Fused multi-head attention: softmax(query key^T) value without the matrix of scores in memory.

Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762); Dao, "FlashAttention-2", 2023 (arXiv:2307.08691);
ALiBi: Press, Smith, Lewis, 2022 (arXiv:2108.12409); grouped queries: Ainslie et al., 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

import itertools
import math
import weakref
from types import ModuleType

import torch
from torch import Tensor

from bigkern import backend
from bigkern.ops import _attention_arguments as arguments
from bigkern.ops.attention import _cuda, _torch, _triton

__all__ = ["attention", "attention_varlen"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_SUPPORTED_DTYPES = "float32, bfloat16, float16 or float64"

# Positions in the raw ops' options, which follow query, key and value.
_MASK, _SLOPES, _CU_Q, _PHILOX = 0, 1, 2, 12


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    philox: Tensor | None = None,
    return_philox: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention, with :func:`torch.nn.functional.scaled_dot_product_attention`'s arguments and
    meaning, and some more.

    Args:
        query: (..., heads, seqlen_q, head_dim); float32, bfloat16, float16, or float64 (torch backend only).  Any
            strides; a copy is made when the elements of a row are apart.
        key: (..., heads, seqlen_k, head_dim), value: (..., heads, seqlen_k, value_dim); the query's dtype.
        attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k).  bool: True takes part; a number is added to the
            scaled scores, and has a gradient.  A row that sees nothing gives 0.  Also takes torch.nn.attention.bias's
            ``causal_upper_left`` and ``causal_lower_right``.
        dropout_p: probability of each attention weight to be dropped, in [0, 1], whenever it is not 0 (there is no
            training flag, as in torch); the others are scaled by ``1 / (1 - dropout_p)``.
        is_causal: query i sees keys 0 to i (the mask's upper left corner, as torch); not together with ``attn_mask``.
        scale: factor of the scores; None is ``1 / sqrt(head_dim)``.
        enable_gqa: key and value may have fewer heads, of which each serves ``heads / kv_heads`` neighbouring ones.
        window: query i sees the keys from ``i - left`` to ``i + right``, both included; ``(left, right)``, or one
            number for both; -1 is no limit.  It counts from the causal mask's corner, the lower right one with
            ``attn_mask=causal_lower_right(...)``.
        softcap: positive; scores become ``softcap * tanh(score / softcap)`` before mask and ALiBi.
        alibi_slopes: (heads,) or (batch, heads), with batch the product of the leading dimensions; adds
            ``-slope * abs(i - j)``, counted as the window.
        return_lse: also return the logarithm of the sum of the exponentials of each row's scores: float32 (float64 of
            float64), (..., heads, seqlen_q), minus infinity for a row that sees nothing.  It has a gradient.
        philox: int64 tensor [seed, offset] on the query's device that fixes the dropout mask, equal on every backend.
            None draws one from torch's generator.
        return_philox: also return the philox that the mask was drawn from (None when nothing was dropped).

    Returns:
        (..., heads, seqlen_q, value_dim) in the query's dtype (under autocast in autocast's), then what was asked for.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not fit, tensors on different devices, numbers out of range, ``is_causal`` with an
            ``attn_mask``.
        bigkern.BackendError: the backend that was asked for cannot serve the arguments.
    """
    extras = not (
        window is None
        and softcap is None
        and alibi_slopes is None
        and philox is None
        and not return_lse
        and not return_philox
    )
    if not extras and _is_plain(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        try:
            output = torch._C._nn.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        except (RuntimeError, ValueError, TypeError):
            pass  # what follows says which argument is wrong
        else:
            if not output.requires_grad:
                return output
            return _torch.differentiable_twice(output, query, key, value, attn_mask, is_causal, scale)
    op = "attention"
    bottom_right = False
    # By name: torch.nn.attention.bias imports all of torch._dynamo, and who has such a bias has done that.
    if type(attn_mask).__name__ == "CausalBias":
        if is_causal:
            raise ValueError(f"{op}: is_causal is set and attn_mask is a causal bias too; pass only one of them")
        bottom_right = attn_mask.variant.name == "LOWER_RIGHT"
        _check_causal_bias(op, attn_mask, query, key)
        attn_mask, is_causal = None, True
    _check_tensors(op, query, key, value)
    arguments.check_numbers(op, softcap, scale, dropout_p)
    window_left, window_right = arguments.window(op, window, is_causal)
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"{op}: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; each must be (..., heads, seqlen, head_dim), with the same number of dimensions, "
            "at least 2"
        )
    if is_causal and attn_mask is not None:
        raise ValueError(f"{op}: is_causal is set and attn_mask given; put the causal mask into attn_mask, or drop one")
    _check_mask_type(op, attn_mask, query)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; they must be the "
            "same: convert with .to(dtype), or run under torch.autocast"
        )

    leading = _leading(op, query, key, value)
    q, k, v = (_four(tensor, leading) for tensor in (query, key, value))
    arguments.check_shapes(op, q, k, v, enable_gqa)
    mask = _four_mask(op, attn_mask, leading, q, k)
    slopes = arguments.check_slopes(op, alibi_slopes, q.shape[0], q.shape[1], query.device)
    dropout_p, philox = _dropout(op, query, dropout_p, philox, return_philox)
    options = (
        mask,
        slopes,
        None,
        None,
        q.shape[2],
        k.shape[2],
        window_left,
        window_right,
        bottom_right,
        softcap or 0.0,
        arguments.scale(scale, q.shape[3]),
        dropout_p,
        philox,
        arguments.tf32(query),
    )
    output, lse = _dispatch(q, k, v, options, return_lse)
    shape = query.shape[:-2] if query.dim() < 4 else (*leading, q.shape[1])
    output = output.reshape(*shape, q.shape[2], v.shape[3])
    if not (return_lse or return_philox):
        return output
    found = [output]
    if return_lse:
        found.append(lse.reshape(*shape, q.shape[2]))
    if return_philox:
        found.append(philox)
    return tuple(found)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    philox: Tensor | None = None,
    return_philox: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over sequences of different lengths that lie one behind the other, without padding.

    Args:
        query: (total_q, heads, head_dim), key: (total_k, kv_heads, head_dim), value: (total_k, kv_heads, value_dim);
            dtypes and strides as in :func:`attention`.
        cu_seqlens_q, cu_seqlens_k: int32, (sequences + 1,), on the query's device: sequence s has the rows from
            ``cu_seqlens[s]`` to before ``cu_seqlens[s + 1]``.  They rise from 0 to the total; a sequence may be empty.
            On a GPU each tensor's values are looked at once, which waits for the GPU; not while a CUDA graph is
            captured, nor under torch.compile: the kernels stay within the tensors whatever the values.
        max_seqlen_q, max_seqlen_k: the longest lengths, or more.
        is_causal, window, alibi_slopes: as in :func:`attention`, but counted from the lower right corner: the last
            query of a sequence is at its last key (as in flash-attn), which is the same for equal lengths.
            ``alibi_slopes`` is (heads,) or (sequences, heads).
        dropout_p, scale, enable_gqa, softcap, return_lse, philox, return_philox: as in :func:`attention`; the dropout
            mask is that of (sequences, heads, max_seqlen_q, max_seqlen_k).

    Returns:
        (total_q, heads, value_dim), then what was asked for: lse is (heads, total_q).

    Raises:
        As :func:`attention`; ValueError also for ``cu_seqlens`` that do not rise, do not end at the total, or have a
        sequence longer than the given maximum.
    """
    op = "attention_varlen"
    _check_tensors(op, query, key, value)
    arguments.check_numbers(op, softcap, scale, dropout_p)
    window_left, window_right = arguments.window(op, window, is_causal)
    if not query.dim() == key.dim() == value.dim() == 3:
        raise ValueError(
            f"{op}: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; each must be (total, heads, head_dim)"
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value, _ = _autocast(query, key, value, None)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; they must be the "
            "same: convert with .to(dtype), or run under torch.autocast"
        )
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    arguments.check_shapes(op, q, k, v, enable_gqa)
    _check_cu_seqlens(op, "q", cu_seqlens_q, max_seqlen_q, q)
    _check_cu_seqlens(op, "k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q is of {cu_seqlens_q.shape[0] - 1} sequences and cu_seqlens_k of "
            f"{cu_seqlens_k.shape[0] - 1}; they must be of the same"
        )
    slopes = arguments.check_slopes(op, alibi_slopes, cu_seqlens_q.shape[0] - 1, q.shape[1], query.device)
    dropout_p, philox = _dropout(op, query, dropout_p, philox, return_philox)
    options = (
        None,
        slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        True,
        softcap or 0.0,
        arguments.scale(scale, q.shape[3]),
        dropout_p,
        philox,
        arguments.tf32(query),
    )
    output, lse = _dispatch(q, k, v, options, return_lse)
    found = [output.squeeze(0).transpose(0, 1)]
    if return_lse:
        found.append(lse.squeeze(0))
    if return_philox:
        found.append(philox)
    return found[0] if len(found) == 1 else tuple(found)


class _Attention(torch.autograd.Function):
    """A kernel backend's forward and backward.  Where the gradient shall be differentiated, it is torch's composite."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, alibi_slopes, implementation, options):
        options = (attn_mask, alibi_slopes, *options[2:])
        output, lse = implementation.forward(query, key, value, *options)
        tensors = [option for option in options if isinstance(option, Tensor)]
        ctx.save_for_backward(query, key, value, output, lse, *tensors)
        ctx.set_materialize_grads(False)
        ctx.implementation = implementation
        # Tensors are saved, so that a change of theirs in place is noticed; their places stay here.
        ctx.options = [None if isinstance(option, Tensor) else option for option in options]
        ctx.places = [place for place, option in enumerate(options) if isinstance(option, Tensor)]
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        query, key, value, output, lse, *tensors = ctx.saved_tensors
        if grad_output is None:
            if grad_lse is None:
                return (None,) * 7
            grad_output = torch.zeros_like(output)
        options = list(ctx.options)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            options[place] = tensor
        need = ctx.needs_input_grad[:5]
        implementation = ctx.implementation
        # While torch.compile traces a backward it will not be differentiated again, whatever the grad mode says.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            implementation = _torch
        elif grad_output.stride(3) != 1:
            grad_output = grad_output.contiguous()
        grads = implementation.backward(
            grad_output,
            grad_lse,
            query,
            key,
            value,
            output,
            lse,
            *options,
            need[3],
            need[4],
            torch.are_deterministic_algorithms_enabled(),
        )
        return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None)


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor, options: tuple, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(output, lse) of 4-D tensors on the backend that :func:`backend.select` names; options as the raw ops'."""
    implementation = backend.select("attention", _IMPLEMENTATIONS, query, key, value, *options)
    # Nothing to launch on no elements; forward mode and functorch need operators that torch can differentiate itself.
    if implementation is _torch or query.numel() == 0 or key.numel() == 0 or value.numel() == 0 or _torch.transformed():
        return _torch.compose(query, key, value, *options, need_lse)
    query, key, value = (_unit_rows(tensor) for tensor in (query, key, value))
    mask, slopes = options[_MASK], options[_SLOPES]
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, mask, slopes)
    ):
        return _Attention.apply(query, key, value, mask, slopes, implementation, (None, None, *options[2:]))
    return implementation.forward(query, key, value, *options)


def _unit_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _leading(op: str, *tensors: Tensor) -> tuple[int, ...]:
    """The batch dimensions, broadcast against each other."""
    shapes = [tensor.shape[:-3] for tensor in tensors]
    if shapes[0] == shapes[1] == shapes[2]:
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"{op}: query, key and value have batch dimensions {', '.join(str(tuple(s)) for s in shapes)}; they "
            "must be the same, or 1"
        ) from None


def _four(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """(..., heads, seqlen, dim) as (batch, heads, seqlen, dim)."""
    if tensor.dim() == 4 and tensor.shape[0] == leading[0]:
        return tensor
    if tensor.dim() < 4:
        return tensor.reshape(1, *([1] * (3 - tensor.dim())), *tensor.shape)
    return tensor.expand(*leading, *tensor.shape[-3:]).reshape(math.prod(leading), *tensor.shape[-3:])


def _four_mask(op: str, mask: Tensor | None, leading: tuple[int, ...], query: Tensor, key: Tensor) -> Tensor | None:
    """The mask with four dimensions, each as long as the scores' or 1."""
    if mask is None:
        return None
    scores = (*leading, query.shape[1], query.shape[2], key.shape[2])
    if mask.dim() > max(len(scores), 2) or any(
        size not in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False)
    ):
        raise ValueError(
            f"{op}: attn_mask has shape {tuple(mask.shape)}; it must broadcast to (..., heads, seqlen_q, seqlen_k), "
            f"here {scores}"
        )
    mask = mask.reshape(*([1] * (len(scores) - mask.dim())), *mask.shape)
    batch = mask.shape[:-3]
    if len(batch) == 1:
        return mask
    if any(size != 1 for size in batch):
        mask = mask.expand(*leading, *mask.shape[-3:])
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])


def _dropout(
    op: str, query: Tensor, dropout_p: float, philox: Tensor | None, return_philox: bool
) -> tuple[float, Tensor | None]:
    if philox is not None:
        _check_philox(op, philox, query)
    if dropout_p == 0:
        return 0.0, None
    if philox is None and (return_philox or not backend.uses_torch(query)):
        philox = torch.randint(2**63 - 1, (2,), device=query.device)
    return float(dropout_p), philox


def _autocast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to torch's attention: in its lower precision."""
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in (query, key, value, mask)
    )


def _is_plain(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> bool:
    """Whether torch serves the call and only shapes are left to refuse, which torch's operator looks at itself.

    The checks below would say the same, more slowly: the 3 us that a call on a CPU may cost more than torch's.
    """
    if not (
        isinstance(query, Tensor)
        and query.is_cpu
        and backend._requested in (None, "torch")
        and (dtype := query.dtype) in _DTYPES
        and getattr(key, "dtype", None) is dtype
        and getattr(value, "dtype", None) is dtype
        and (attn_mask is None or (type(attn_mask) is Tensor and attn_mask.is_cpu and not is_causal))
        and 0 <= dropout_p <= 1
        and not _torch.transformed()
    ):
        return False
    # torch's own look at shapes lets these pass.  A shape is built anew whenever it is asked for.
    q, k, v = query.shape, key.shape, value.shape
    dims = len(q)
    return (
        dims == len(k) == len(v)
        and dims > 1
        and k[-2] == v[-2]
        and (dims == 2 or (k[-3] == v[-3] and (enable_gqa or q[-3] == k[-3])))
        and 0 not in q
        and (attn_mask is None or attn_mask.dim() > 1)
    )


def _check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; supported are {_SUPPORTED_DTYPES}: convert it "
                f"with {name}.float()"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and query on {query.device}; move one with .to(device)"
            )


def _check_mask_type(op: str, mask: Tensor | None, query: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: attn_mask is a {type(mask).__name__}; expected a torch.Tensor or None")
    if mask.device != query.device:
        raise ValueError(f"{op}: attn_mask is on {mask.device} and query on {query.device}; move one with .to(device)")
    autocast = mask.dtype in _DTYPES and torch.is_autocast_enabled(query.device.type)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) and not autocast:
        raise TypeError(
            f"{op}: attn_mask has dtype {mask.dtype}; supported are bool, float32 and the query's, {query.dtype}"
        )


def _check_causal_bias(op: str, bias: Tensor, query: Tensor, key: Tensor) -> None:
    if (bias.seq_len_q, bias.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"{op}: attn_mask is a causal bias of {bias.seq_len_q} queries and {bias.seq_len_kv} keys; "
            f"there are {query.shape[-2]} and {key.shape[-2]}"
        )


def _check_philox(op: str, philox: Tensor, query: Tensor) -> None:
    if not isinstance(philox, Tensor) or philox.dtype != torch.int64 or philox.shape != (2,):
        got = f"{philox.dtype} of shape {tuple(philox.shape)}" if isinstance(philox, Tensor) else type(philox).__name__
        raise ValueError(
            f"{op}: philox is {got}; it must be an int64 tensor [seed, offset], as return_philox=True returns"
        )
    if philox.device != query.device:
        raise ValueError(f"{op}: philox is on {philox.device} and query on {query.device}; move it with .to(device)")


# Which values of cu_seqlens have been looked at on a GPU, by tensor: (version, total, longest) that were right.
_looked_at: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _check_cu_seqlens(op: str, side: str, cu_seqlens: Tensor, longest: int, packed: Tensor) -> None:
    name = f"cu_seqlens_{side}"
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        got = (
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else f"a {type(cu_seqlens).__name__}"
        )
        raise TypeError(f"{op}: {name} is {got}; it must be an int32 tensor (sequences + 1,)")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: {name} has {cu_seqlens.shape[0]} elements; it needs at least 2, as [0, total]")
    if cu_seqlens.device != packed.device:
        raise ValueError(
            f"{op}: {name} is on {cu_seqlens.device} and query on {packed.device}; move it with .to(device)"
        )
    if not isinstance(longest, int | torch.SymInt) or longest < 0:
        raise ValueError(f"{op}: max_seqlen_{side} is {longest}; it must be the longest length, a number from 0")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    total = packed.shape[2]
    if cu_seqlens.is_cuda:
        if torch.cuda.is_current_stream_capturing() or (
            not cu_seqlens.is_inference() and _looked_at.get(cu_seqlens) == (cu_seqlens._version, total, longest)
        ):
            return
    elif not cu_seqlens.is_cpu:
        return
    values = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(values)]
    if values[0] != 0 or min(lengths) < 0:
        raise ValueError(f"{op}: {name} is {_shortened(values)}; it must start at 0 and never fall")
    if values[-1] != total:
        raise ValueError(f"{op}: {name} ends at {values[-1]}; it must end at the number of rows, {total}")
    if max(lengths) > longest:
        raise ValueError(
            f"{op}: max_seqlen_{side} is {longest} and the longest sequence of {name} {max(lengths)}; it must "
            "not be less"
        )
    if cu_seqlens.is_cuda and not cu_seqlens.is_inference():
        _looked_at[cu_seqlens] = (cu_seqlens._version, total, longest)


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"
