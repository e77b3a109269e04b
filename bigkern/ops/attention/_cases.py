"""Attention's cases for ``bigkern selfcheck``, ``bigkern accuracy`` and the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import attention
from bigkern.ops._case import DTYPES, Case, Inputs, Outputs
from bigkern.ops._torch_philox import dropout


def cases() -> list[Case]:
    """Every feature and kernel path, small enough for the emulated and interpreted kernels."""
    return [
        make_case(1, 2, 2, 64, 64, 64),
        make_case(2, 2, 2, 33, 70, 40),
        make_case(1, 2, 1, 65, 65, 128, causal=True),
        make_case(1, 1, 1, 20, 50, 256),
        make_case(1, 2, 2, 1, 300, 64),
        make_case(1, 2, 2, 48, 48, 64, scale=1e-3),
        make_case(1, 2, 2, 48, 48, 64, scale=30.0),
        make_case(1, 2, 2, 70, 70, 64, window=(9, 0)),
        make_case(2, 2, 2, 33, 40, 32, mask="bool"),
        make_case(2, 2, 2, 33, 40, 32, mask="bias"),
        make_case(1, 4, 2, 40, 40, 64, alibi=True, softcap=20.0),
        make_case(1, 2, 2, 40, 48, 64, dropout_p=0.2),
    ]


def make_case(
    batch: int,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    mask: str | None = None,
    alibi: bool = False,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    function: str = "attention",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Attention of normal tensors times ``scale``; mask is None, "bool" or "bias" (one for all of the batch).

    ``function`` is what the benchmarks call this choice of features.
    """
    traits = [
        "causal" if causal else "",
        f"window {window}" if window else "",
        mask or "",
        "alibi" if alibi else "",
        f"softcap {softcap:g}" if softcap else "",
        f"dropout {dropout_p:g}" if dropout_p else "",
        f"scale {scale:g}" if scale != 1 else "",
    ]
    shape = f"{batch}x{heads}:{kv_heads}x{seqlen_q}:{seqlen_k}x{head_dim}"

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device)

        # As a projection leaves them: rows of all heads.
        inputs: Inputs = {
            name: (scale * normal(batch, length, count, head_dim)).to(dtype).transpose(1, 2)
            for name, count, length in (
                ("query", heads, seqlen_q),
                ("key", kv_heads, seqlen_k),
                ("value", kv_heads, seqlen_k),
            )
        }
        if mask == "bool":
            inputs["attn_mask"] = normal(batch, 1, seqlen_q, seqlen_k) > -0.5
        if mask == "bias":
            inputs["attn_mask"] = normal(1, heads, seqlen_q, seqlen_k).to(dtype)
        if dropout_p:
            inputs["philox"] = torch.tensor([seed + 1, 4], dtype=torch.int64, device=device)
        return inputs

    def slopes(device: torch.device) -> Tensor | None:
        return 2.0 ** -torch.arange(1, heads + 1, device=device, dtype=torch.float32) if alibi else None

    def call(inputs: Inputs) -> Outputs:
        query = inputs["query"]
        output = attention(
            query,
            inputs["key"],
            inputs["value"],
            inputs.get("attn_mask"),
            dropout_p,
            causal,
            enable_gqa=heads != kv_heads,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes(query.device),
            philox=inputs.get("philox"),
        )
        return {"output": output}

    def reference(inputs: Inputs) -> Outputs:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        given, gqa = inputs.get("attn_mask"), heads != kv_heads
        if not (window or alibi or softcap or dropout_p):
            return {"output": F.scaled_dot_product_attention(query, key, value, given, 0.0, causal, enable_gqa=gqa)}
        dtype = query.dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(accumulate) for x in (query, key, value))
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        distance = torch.arange(seqlen_k, device=query.device) - torch.arange(seqlen_q, device=query.device).view(-1, 1)
        scores = query @ key.transpose(2, 3) * head_dim**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi:
            scores = scores - slopes(query.device).to(accumulate).view(-1, 1, 1) * distance.abs()
        left, right = window or (seqlen_k, 0 if causal else seqlen_k)
        if window or causal:
            scores = scores.masked_fill((distance < -left) | (distance > right), -torch.inf)
        if given is not None:
            scores = scores.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else scores + given
        weights = torch.softmax(scores, 3)
        if dropout_p:
            weights = weights * dropout(torch.ones(weights.shape, device=query.device), dropout_p, inputs["philox"])
        return {"output": (weights @ value).to(dtype)}

    return Case(
        function=function,
        name=" ".join(["attention", shape, *filter(None, traits)]),
        make_inputs=make_inputs,
        call=call,
        reference=reference,
        gradients=("query", "key", "value", *(["attn_mask"] if mask == "bias" else [])),
        dtypes=dtypes,
    )
