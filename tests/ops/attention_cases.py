"""Attention's features crossed pairwise, and the same mathematics in plain operators."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from bigkern.ops import attention
from bigkern.ops._torch_philox import dropout

PHILOX = (0x1234_5678_9ABC, 77)


def _of(*values):
    """A field of Case with the values it is crossed over; the first is the default."""
    return field(default=values[0], metadata={"values": values})


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = _of(torch.float32, torch.bfloat16, torch.float16)  # noqa: RUF009
    head_dim: int = _of(64, 8, 33, 40, 128, 96, 200, 256)
    value_dim: int = _of(0, 24, 65)  # 0: head_dim
    lengths: tuple[int, int] = _of((33, 70), (1, 1), (7, 7), (16, 72), (70, 33), (65, 130), (1, 200), (96, 64))
    heads: tuple[int, int] = _of((2, 2), (1, 1), (4, 2), (3, 1))
    batch: int = _of(1, 2)
    mask: str = _of(
        "", "bool", "bool keys", "bool rows", "bias", "bias heads", "bias keys", "bias queries", "float bias"
    )
    causal: str = _of("", "top", "bottom")
    window: tuple[int, int] | None = _of(None, (3, 2), (1, 0), (9, -1))
    softcap: float | None = _of(None, 2.0)
    alibi: str = _of("", "heads", "batch")
    dropout_p: float = _of(0.0, 0.3)
    layout: str = _of("contiguous", "transposed", "odd", "joined", "inner")
    scale: float | None = _of(None, 0.3, -0.2)
    lse: bool = _of(False, True)

    def __str__(self) -> str:
        said = [str(self.dtype).removeprefix("torch.")]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                said.append(f"{f.name}={value}")
        return ",".join(said).replace(" ", "")

    def allowed(self) -> bool:
        # torch's functions take a causal mask or another; the lower right one is a mask of its own.
        return not (self.causal and self.mask)

    def bottom_right(self) -> bool:
        return self.causal == "bottom"

    def inputs(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        """query, key, value, and an additive mask; all require gradients."""
        generator = torch.Generator().manual_seed(seed)
        (heads, kv_heads), (seqlen_q, seqlen_k) = self.heads, self.lengths

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        value_dim = self.value_dim or self.head_dim
        tensors = [
            normal(self.batch, heads, seqlen_q, self.head_dim),
            normal(self.batch, kv_heads, seqlen_k, self.head_dim),
            normal(self.batch, kv_heads, seqlen_k, value_dim) + 0.5,
        ]
        tensors = [relaid(t.to(device, self.dtype), self.layout).requires_grad_() for t in tensors]
        if "bias" in self.mask:
            bias = normal(*self._mask_shape()).to(device, torch.float32 if "float" in self.mask else self.dtype)
            tensors.append(bias.requires_grad_())
        return tensors

    def _mask_shape(self) -> tuple[int, ...]:
        full = (self.batch, self.heads[0], *self.lengths)
        if "heads" in self.mask:
            return (1, full[1], *full[2:])
        if "keys" in self.mask:
            return (full[0], 1, 1, full[3])
        if "queries" in self.mask:
            return (full[1], full[2], 1)
        return full

    def bool_mask(self, device: torch.device | str) -> Tensor | None:
        if "bool" not in self.mask:
            return None
        generator = torch.Generator().manual_seed(5)
        mask = torch.rand(self._mask_shape(), generator=generator) > 0.4
        if "rows" in self.mask:
            mask[..., ::2, :] = False
        return mask.to(device)

    def slopes(self, device: torch.device | str) -> Tensor | None:
        if not self.alibi:
            return None
        slopes = 2.0 ** -torch.arange(1, self.heads[0] + 1, device=device, dtype=torch.float32)
        return slopes if self.alibi == "heads" else slopes * torch.arange(1, self.batch + 1, device=device).unsqueeze(1)

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, slopes: Tensor | None = None
    ):
        mask = self.bool_mask(query.device) if bias is None else bias
        if self.causal == "bottom":
            mask = causal_lower_right(*self.lengths)
        results = attention(
            query,
            key,
            value,
            mask,
            self.dropout_p,
            self.causal == "top",
            self.scale,
            self.heads[0] != self.heads[1],
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=self.slopes(query.device) if slopes is None else slopes,
            return_lse=self.lse,
            philox=torch.tensor(PHILOX, device=query.device) if self.dropout_p else None,
        )
        return results

    def reference(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None):
        output, lse = _Flash.apply(query, key, value, bias, self)
        return (output, lse) if self.lse else output

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scores, minus infinity where a query does not see a key, and their derivative by scale q . k."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
        derivative = torch.ones_like(scores)
        if self.softcap:
            squashed = (scores / self.softcap).tanh()
            scores, derivative = self.softcap * squashed, 1 - squashed**2
        seqlen_q, seqlen_k = self.lengths
        position = torch.arange(seqlen_q, device=query.device).unsqueeze(1)
        if self.bottom_right():
            position = position + seqlen_k - seqlen_q
        distance = torch.arange(seqlen_k, device=query.device) - position
        if self.alibi:
            scores = scores - (self.slopes(query.device)[..., None, None] * distance.abs()).to(scores.dtype)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        seen = torch.ones(scores.shape, dtype=torch.bool, device=query.device)
        if (mask := self.bool_mask(query.device)) is not None:
            seen = seen & mask
        if self.causal:
            seen = seen & (distance <= 0)
        if self.window is not None:
            left, right = self.window
            seen = seen & (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else True)
        return scores.masked_fill(~seen, -torch.inf), derivative


class _Flash(torch.autograd.Function):
    """The formula as torch's own kernels compute it (FlashAttention-2): scores in float32, weights rounded to the dtype
    before they meet the values, the gradient from lse and the rounded output.  In float64 it is the truth.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, case):
        dtype = query.dtype
        q, k, v = _accumulate(case, query, key, value)
        scores, _ = case.scores(q, k, bias)
        top = scores.amax(3, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        terms = (scores - top).exp()
        total = terms.sum(3, keepdim=True)
        output = ((terms * _kept(case, terms)).to(dtype).to(terms.dtype) @ v) / torch.where(total > 0, total, 1)
        output, lse = output.to(dtype), (top + total.log()).squeeze(3)
        ctx.save_for_backward(query, key, value, bias, output, lse)
        ctx.case = case
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        query, key, value, bias, output, lse = ctx.saved_tensors
        case, dtype = ctx.case, query.dtype
        q, k, v = _accumulate(case, query, key, value)
        scores, derivative = case.scores(q, k, bias)
        grad, kept = grad_output.to(q.dtype), _kept(case, scores)
        weights = torch.where(scores > -torch.inf, (scores - lse.unsqueeze(3)).exp(), 0)
        delta = (grad * output.to(q.dtype)).sum(3) - (grad_lse if case.lse else 0)
        grad_scores = weights * (grad @ v.transpose(2, 3) * kept - delta.unsqueeze(3))
        rounded = (grad_scores * derivative).to(dtype).to(q.dtype)
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        grad_value = (weights * kept).to(dtype).to(q.dtype).transpose(2, 3) @ grad

        def of_shared(x):
            return x.unflatten(1, (case.heads[1], -1)).sum(2).to(dtype)

        grad_bias = None if bias is None else grad_scores.sum_to_size(bias.shape).to(bias.dtype)
        grad_key = of_shared(rounded.transpose(2, 3) @ q * scale)
        return (rounded @ k * scale).to(dtype), grad_key, of_shared(grad_value), grad_bias, None


def _accumulate(case: Case, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    group = case.heads[0] // case.heads[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))]


def _kept(case: Case, scores: Tensor) -> Tensor:
    """Dropout's factors."""
    ones = torch.ones_like(scores, dtype=torch.float32)
    if not case.dropout_p:
        return ones.to(scores.dtype)
    return dropout(ones, case.dropout_p, torch.tensor(PHILOX, device=scores.device)).to(scores.dtype)


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout of memory."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":
        storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return storage[1:].view(x.shape).copy_(x)
    if layout == "joined":  # part of wider rows, as of a joint projection
        return torch.cat([x, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]]
    if layout == "inner":  # elements of a row apart
        return torch.stack([x, x], 4)[..., 0]
    return x


def pairwise(count: int, seed: int = 0) -> list[Case]:
    """At least ``count`` cases, in rounds that each cover every pair of values of every two fields once more."""
    rng = random.Random(seed)
    names = [f.name for f in fields(Case)]
    values = {f.name: f.metadata["values"] for f in fields(Case)}
    cases: dict[Case, None] = {}
    while len(cases) < count:
        missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]}
        missing = {pair for pair in missing if Case(**dict(pair)).allowed()}
        while missing:
            best, covered = None, -1
            first = rng.choice(sorted(missing, key=str))
            for _ in range(5):
                chosen = {name: rng.choice(values[name]) for name in names} | dict(first)
                candidate = Case(**chosen)
                if not candidate.allowed():
                    candidate = Case(**{**chosen, "causal" if dict(first).get("causal", "") == "" else "mask": ""})
                gain = len(_pairs(candidate, names) & missing)
                if gain > covered:
                    best, covered = candidate, gain
            missing -= _pairs(best, names)
            cases[best] = None
    return list(cases)


def _pairs(case: Case, names: list[str]) -> set:
    return {((a, getattr(case, a)), (b, getattr(case, b))) for a, b in itertools.combinations(names, 2)}
