"""Decoding's cases for ``bigkern selfcheck``, ``bigkern accuracy`` and the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import attention_decode
from bigkern.ops._case import DTYPES, Case, Inputs, Outputs


def cases() -> list[Case]:
    """Every instance and feature, small enough for the emulated kernels."""
    return [
        make_case(2, 4, 2, 1, 300, 64),
        make_case(2, 2, 2, 1, 70, 40, ragged=True),
        make_case(1, 4, 1, 5, 200, 128),
        make_case(1, 2, 1, 1, 150, 256),
        make_case(1, 2, 1, 1, 200, 64, scale=1e-3),
        # With larger scores one weight is 1 and torch multiplies by it exactly, where two tf32 parts leave 2^-22.
        make_case(1, 2, 1, 1, 200, 64, scale=3.0),
        make_case(1, 4, 2, 3, 200, 32, window=64),
        make_case(2, 4, 2, 2, 90, 64, softcap=20.0, alibi=True, ragged=True),
    ]


def make_case(
    batch: int,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    capacity: int,
    head_dim: int,
    *,
    window: int | None = None,
    alibi: bool = False,
    softcap: float | None = None,
    ragged: bool = False,
    scale: float = 1.0,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Decoding of normal tensors times ``scale``: the new rows fill the cache, of some of the batch if ``ragged``.

    ``window`` is the number of keys to the left.
    """
    traits = [
        "ragged" if ragged else "",
        f"window {window}" if window else "",
        "alibi" if alibi else "",
        f"softcap {softcap:g}" if softcap else "",
        f"scale {scale:g}" if scale != 1 else "",
    ]
    shape = f"{batch}x{heads}:{kv_heads}x{seqlen_q}:{capacity}x{head_dim}"

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return (scale * torch.randn(sizes, generator=generator, device=device)).to(dtype)

        steps = torch.arange(batch, device=device) if ragged else torch.zeros(batch, dtype=torch.int64, device=device)
        return {
            "query": normal(batch, seqlen_q, heads, head_dim).transpose(1, 2),
            "key_cache": normal(batch, kv_heads, capacity, head_dim),
            "value_cache": normal(batch, kv_heads, capacity, head_dim),
            "key": normal(batch, seqlen_q, kv_heads, head_dim).transpose(1, 2),
            "value": normal(batch, seqlen_q, kv_heads, head_dim).transpose(1, 2),
            "cache_seqlens": ((capacity - seqlen_q) // (1 + steps)).int(),
        }

    def slopes(device: torch.device) -> Tensor | None:
        return 2.0 ** -torch.arange(1, heads + 1, device=device, dtype=torch.float32) if alibi else None

    def call(inputs: Inputs) -> Outputs:
        output = attention_decode(
            *(inputs[name] for name in ("query", "key_cache", "value_cache", "key", "value", "cache_seqlens")),
            enable_gqa=heads != kv_heads,
            window=None if window is None else (window, 0),
            softcap=softcap,
            alibi_slopes=slopes(inputs["query"].device),
        )
        return {"output": output, "key_cache": inputs["key_cache"], "value_cache": inputs["value_cache"]}

    def reference(inputs: Inputs) -> Outputs:
        query, key, value, lengths = (inputs[name] for name in ("query", "key_cache", "value_cache", "cache_seqlens"))
        dtype, device = query.dtype, query.device
        place = lengths.long().view(-1, 1) + torch.arange(seqlen_q, device=device)
        which = torch.arange(batch, device=device).view(-1, 1)
        for cache, new in ((key, inputs["key"]), (value, inputs["value"])):
            cache.transpose(1, 2)[which, place] = new.transpose(1, 2)
        distance = torch.arange(capacity, device=device) - place.view(batch, 1, seqlen_q, 1)
        visible = distance <= 0
        if window is not None:
            visible &= distance >= -window
        outputs = {"key_cache": key, "value_cache": value}
        if not (softcap or alibi):
            gqa = heads != kv_heads
            return {"output": F.scaled_dot_product_attention(query, key, value, visible, enable_gqa=gqa), **outputs}
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(accumulate) for x in (query, key, value))
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * head_dim**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi:
            scores = scores - slopes(device).to(accumulate).view(-1, 1, 1) * distance.abs()
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), 3)
        return {"output": (weights @ value).to(dtype), **outputs}

    return Case(
        function="attention_decode",
        name=" ".join(["attention_decode", shape, *filter(None, traits)]),
        make_inputs=make_inputs,
        call=call,
        reference=reference,
        gradients=(),
        dtypes=dtypes,
    )
