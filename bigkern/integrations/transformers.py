"""``attn_implementation="bigkern"`` for the models of transformers 5.

    import bigkern.integrations.transformers
    bigkern.integrations.transformers.register()
    model = AutoModel.from_pretrained("...", attn_implementation="bigkern")

The name has no "flash" in it: transformers takes whatever has for one of flash-attn's and prepares other masks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bigkern.ops import attention, attention_varlen

NAME = "bigkern"

# Arguments that models pass along and that change nothing here: positions are in the mask already, bigkern's gradients
# are reproducible anyway, and the rest concerns the model around.
_HARMLESS = frozenset(
    (
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)


def register() -> None:
    """Make ``"bigkern"`` known to transformers: its attention, and the mask that goes with it.

    Then ``attn_implementation="bigkern"`` works in ``from_pretrained``, ``from_config`` and
    ``model.set_attn_implementation``.  A second call does nothing more.

    Raises:
        ImportError: transformers is missing, or older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "bigkern.integrations.transformers.register: transformers 5 or later is needed: "
            "pip install 'bigkern[transformers]'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of its own no mask would come, and padding would be attended to in silence.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(output, weights) for one attention layer of transformers, by :func:`bigkern.ops.attention`.

    Args:
        module: the layer; its ``is_causal`` counts where no mask is given.
        query: (batch, heads, seqlen_q, head_dim); key, value: the same with as many heads or fewer (grouped queries).
        attention_mask: bool or additive, broadcastable to (batch, heads, seqlen_q, seqlen_k).
        dropout: probability, 0 in evaluation.
        scaling: factor of the scores; None is ``1 / sqrt(head_dim)``.
        position_bias: added to the scores, as T5's; it has a gradient.
        softcap: as Gemma 2's.
        sliding_window: how many keys a query sees, where no mask says so.
        output_attentions: return the weights too: (batch, heads, seqlen_q, seqlen_k), computed by torch's operators.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed into a batch of one, without a mask.

    Returns:
        output: (batch, seqlen_q, heads, head_dim), contiguous; weights: None unless asked for.

    Raises:
        ValueError: an argument that bigkern's attention has no answer to, as attention sinks; nothing is dropped.
    """
    refused = sorted(name for name, value in kwargs.items() if value is not None and name not in _HARMLESS)
    if refused:
        raise ValueError(
            f'attn_implementation="bigkern" does not know {", ".join(refused)}, which {type(module).__name__} passes; '
            'choose "sdpa" or "eager" for this model'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None:
        if attention_mask is not None or position_bias is not None or output_attentions or _weights_are_collected():
            raise ValueError(
                'attn_implementation="bigkern": cu_seq_lens_q came with a mask, a position_bias or output_attentions; '
                "packed sequences take none of them: leave one out"
            )
        return _packed(
            query,
            key,
            value,
            (cu_seq_lens_q, cu_seq_lens_k),
            (max_length_q, max_length_k),
            dropout,
            causal,
            scaling,
            softcap,
            sliding_window,
        ), None
    rows = query.shape[2]
    causal = rows > 1 and attention_mask is None and causal
    if causal and key.shape[2] > rows:
        # The first tokens, into a cache that has room for more: the rest of it is empty.
        key, value = key[:, :, :rows], value[:, :, :rows]
        position_bias = None if position_bias is None else position_bias[..., :rows]
    window = None
    if causal and sliding_window is not None and sliding_window < key.shape[2]:
        window = (sliding_window - 1, 0)
    if position_bias is not None:
        attention_mask = _add_bias(position_bias, attention_mask, causal)
        causal = False
    if output_attentions or _weights_are_collected():
        return _with_weights(query, key, value, attention_mask, dropout, causal, scaling, softcap, window)
    output = attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        window=window,
        softcap=softcap,
    )
    return output.transpose(1, 2).contiguous(), None


def _weights_are_collected() -> bool:
    """Whether the model was called with ``output_attentions=True``; not every model tells its layers (GPT-2's).

    What transformers collects while a model runs is no public interface, but without a look at it the weights would be
    missing in silence.  The tests hold it against the pinned release.
    """
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None:
        return False
    if torch.compiler.is_compiling():  # a ContextVar cannot be traced
        collected = collector.global_var if collector.compiling else None
    else:
        collected = collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: tuple[Tensor, Tensor],
    max_lengths: tuple[int, int],
    dropout: float,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    if query.shape[0] != 1:
        raise ValueError(
            f'attn_implementation="bigkern": cu_seq_lens_q came with a batch of {query.shape[0]}; packed sequences lie '
            "in a batch of one"
        )
    output = attention_varlen(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        *(lengths.to(torch.int32) for lengths in cu_seq_lens),
        *(int(length) for length in max_lengths),
        dropout,
        causal,
        scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        window=None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1),
        softcap=softcap,
    )
    return output.unsqueeze(0)


def _add_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        rows, cols = bias.shape[-2:]
        mask = torch.ones(rows, cols, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    window: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """The kernels never have the weights as a matrix."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if window is not None:
            mask = mask.triu(-window[0])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -torch.inf).all(3, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), 3, dtype=torch.float32).masked_fill(empty, 0)
    weights = torch.dropout(weights.to(query.dtype), dropout, dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous(), weights
