"""Attention in PyTorch's own operators: what runs without a GPU, and what is differentiated twice.

:func:`compose` is the backend: F.scaled_dot_product_attention wherever it can do what was asked, and otherwise
:func:`forward`, which states the raw op's mathematics differentiably, for query i and key j:

    s = scale q_i . k_j;    s = softcap tanh(s / softcap);    s += attn_mask_ij - slope |position_i - j|
    p = softmax over the keys that i may see, 0 in a row that sees none;     output_i = sum over j of dropout(p_ij) v_j
    lse_i = log(sum over j of exp(s_ij))

in fp32 for 16-bit inputs.  Packed sequences are padded to the longest one.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from bigkern.ops._torch_philox import dropout


def unsupported(*args) -> str | None:
    """Always None: torch serves whatever the argument checks let through."""
    return None


def compose(
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
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(output, lse) by the fastest operators torch has; lse is None unless needed.  Arguments as :func:`forward`.

    Without ``philox`` the dropout mask is drawn by torch's own dropout.
    """
    if need_lse or softcap > 0 or cu_seqlens_q is not None or philox is not None or transformed():
        return forward(
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
    is_causal = window_left < 0 and window_right == 0 and not bottom_right
    if not is_causal or attn_mask is not None or alibi_slopes is not None:
        shift = key.shape[2] - query.shape[2] if bottom_right else 0
        offset = _offsets(query.shape[2], key.shape[2], shift, query.device)
        attn_mask = _join(attn_mask, _visible(offset, window_left, window_right))
        if alibi_slopes is not None:
            attn_mask = _join(_alibi(alibi_slopes, offset), attn_mask)
        is_causal = False
    enable_gqa = key.shape[1] != query.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return differentiable_twice(output, query, key, value, attn_mask, is_causal, scale), None


def transformed() -> bool:
    """Whether forward mode or functorch is at work, for which torch's fused operators have no rules."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def differentiable_twice(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """``output`` of F.scaled_dot_product_attention on a CPU, whose fused operator torch differentiates only once.

    Where its gradients shall be differentiated themselves (create_graph), those of :func:`forward` take their place.
    The hook that sees to it keeps none of the inputs alive longer than autograd does.
    """
    node = output.grad_fn if not torch.compiler.is_compiling() else None
    if type(node).__name__ != "ScaledDotProductFlashAttentionForCpuBackward0":
        return output
    references = [weakref.ref(tensor) for tensor in (query, key, value)]

    def again(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]):
        tensors = [reference() for reference in references]
        if not torch.is_grad_enabled() or any(tensor is None for tensor in tensors):
            return None
        query, key, value = tensors
        factor = query.shape[3] ** -0.5 if scale is None else scale
        right = 0 if is_causal else -1
        options = (None, None, None, query.shape[2], key.shape[2], -1, right, False, 0.0, factor, 0.0, None, False)
        grads = backward(grad_outputs[0], None, query, key, value, None, None, attn_mask, *options, False, False, False)
        return (
            *(None if old is None else new for old, new in zip(grad_inputs[:3], grads[:3], strict=True)),
            *grad_inputs[3:],
        )

    node.register_hook(again)
    return output


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
    """(output, lse); see _schema.py.  Differentiable any number of times."""
    dtype, accumulate = query.dtype, accumulator(query.dtype)
    within = None
    if cu_seqlens_q is not None:
        index_q, within_q, sequence, position = _padding(cu_seqlens_q, max_seqlen_q, query.shape[2])
        index_k, within_k, _, _ = _padding(cu_seqlens_k, max_seqlen_k, key.shape[2])
        query = query[0][:, index_q].transpose(0, 1)
        key, value = (tensor[0][:, index_k].transpose(0, 1) for tensor in (key, value))
        # What lies beyond a sequence belongs to its neighbour: a NaN there is not this one's.
        key, value = (torch.where(within_k[:, None, :, None], tensor, 0) for tensor in (key, value))
        within = (within_q[:, :, None] & within_k[:, None, :]).unsqueeze(1)
    group = query.shape[1] // max(key.shape[1], 1)
    query, key, value = (tensor.to(accumulate) for tensor in (query, key, value))
    if group > 1:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))

    scores = (query @ key.transpose(2, 3)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    shift = key.shape[2] - query.shape[2] if bottom_right else 0
    if bottom_right and within is not None:
        shift = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).view(-1, 1, 1, 1)
    offset = _offsets(scores.shape[2], scores.shape[3], shift, scores.device)
    if alibi_slopes is not None:
        scores = scores + _alibi(alibi_slopes, offset).to(accumulate)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(accumulate)
        attn_mask = None
    for allowed in (attn_mask, _visible(offset, window_left, window_right), within):
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)

    empty = (scores == -torch.inf).all(3, keepdim=True)  # also where there is no key at all
    probabilities = torch.softmax(scores.masked_fill(empty, 0), 3).masked_fill(empty, 0)
    if scores.shape[3] == 0:
        lse = scores.new_full(scores.shape[:3], -torch.inf)
    else:
        lse = torch.logsumexp(scores.masked_fill(empty, 0), 3).masked_fill(empty.squeeze(3), -torch.inf)
    if dropout_p > 0:
        if philox is None:
            probabilities = torch.dropout(probabilities, dropout_p, True)
        else:
            probabilities = dropout(probabilities, dropout_p, philox)
    output = probabilities @ value
    if within is not None:
        # Rows that belong to no sequence, where cu_seqlens ends early, are refused by the public function.
        output = output[sequence, :, position].transpose(0, 1).unsqueeze(0)
        lse = lse[sequence, :, position].transpose(0, 1).unsqueeze(0)
    return output.to(dtype), lse if accumulate == torch.float64 else lse.float()


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask, grad_slopes); see _schema.py.

    Differentiable where grad mode is on.  The forward pass is done again: ``output`` and ``lse`` are not looked at.
    """
    *options, need_grad_mask, need_grad_slopes, _ = options
    again = torch.is_grad_enabled()
    leaves = [query, key, value] + [attn_mask] * need_grad_mask + [alibi_slopes] * need_grad_slopes
    with torch.enable_grad():
        if not again:
            leaves = [leaf.detach() for leaf in leaves]
        # Views of their own: a tensor that is two of the inputs gets a gradient for each.
        leaves = [leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        mask = leaves[3] if need_grad_mask else attn_mask
        slopes = leaves[-1] if need_grad_slopes else alibi_slopes
        outputs = forward(*leaves[:3], mask, slopes, *options)
        pairs = [(y, g) for y, g in zip(outputs, (grad_output, grad_lse), strict=True) if g is not None]
        differentiated, cotangents = zip(*pairs, strict=True)
        grads = torch.autograd.grad(differentiated, leaves, cotangents, create_graph=again)
    grad_mask = grads[3] if need_grad_mask else query.new_empty((0,))
    return (*grads[:3], grad_mask, grads[-1] if need_grad_slopes else query.new_empty((0,), dtype=torch.float32))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padding(cu_seqlens: Tensor, max_seqlen: int, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed rows to (sequences, max_seqlen) and back.

    Returns each padded place's packed row and whether it is within its sequence; each packed row's sequence and its
    position there.
    """
    places = torch.arange(max_seqlen, device=cu_seqlens.device)
    within = places < cu_seqlens.diff().unsqueeze(1)
    index = (cu_seqlens[:-1].unsqueeze(1) + places).clamp(max=max(total - 1, 0))
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.bucketize(rows, cu_seqlens[1:], right=True).clamp(max=cu_seqlens.shape[0] - 2)
    return index, within, sequence, (rows - cu_seqlens[sequence]).clamp(0, max(max_seqlen - 1, 0))


def _offsets(seqlen_q: int, seqlen_k: int, shift: int | Tensor, device: torch.device) -> Tensor:
    """Key position less query position."""
    keys = torch.arange(seqlen_k, device=device)
    return keys - (torch.arange(seqlen_q, device=device).unsqueeze(1) + shift)


def _visible(offset: Tensor, window_left: int, window_right: int) -> Tensor | None:
    visible = None
    if window_left >= 0:
        visible = offset >= -window_left
    if window_right >= 0:
        visible = offset <= window_right if visible is None else visible & (offset <= window_right)
    return visible


def _alibi(slopes: Tensor, offset: Tensor) -> Tensor:
    return -slopes.unsqueeze(-1).unsqueeze(-1) * offset.abs()


def _join(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """One mask that does what both do; of numbers, in the wider of their dtypes."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        mask, other = other, mask
    return mask.masked_fill(~other, -torch.inf) if other.dtype == torch.bool else mask + other
