"""Decoding with a cache: shapes, counted bytes and FLOP, peers, compiled plans."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.measure import Candidate, Problem, compile_candidate, eager_candidate
from benchmarks.static import KernelPlan
from benchmarks.tune import Tunable
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.attention_decode._cases import make_case

FUNCTIONS = ("attention_decode",)
SHAPE_NAMES = "BATCHxHEADSxKV_HEADSxQUERIESxCAPACITYxDIM"

# batch, heads, key heads, queries, capacity, head_dim; the cache is full after the append.
SHAPES = {
    "cuda": (
        (1, 32, 8, 1, 8192, 128),
        (1, 32, 8, 1, 131072, 128),
        (16, 32, 8, 1, 8192, 128),
        (64, 32, 8, 1, 4096, 128),
        (16, 32, 32, 1, 4096, 128),
        (16, 32, 1, 1, 16384, 128),
        (16, 12, 12, 1, 1024, 64),  # GPT-2
        (16, 16, 8, 1, 8192, 256),
        (16, 32, 8, 8, 8192, 128),  # several drafted tokens at once
    ),
    "cpu": ((1, 12, 12, 1, 1024, 64), (4, 8, 2, 1, 2048, 64)),
    "tiny": ((1, 2, 2, 1, 16, 16), (2, 2, 1, 3, 70, 64)),
}
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32, torch.bfloat16),
    "tiny": (torch.float32,),
}

# What a measured run may choose: warps a block, tiles in each one's ring, blocks a multiprocessor.
_HOPPER_TILINGS = {
    64: ("{4, 6, 2}", "{4, 3, 4}", "{8, 6, 1}"),
    128: ("{4, 3, 2}", "{4, 2, 3}", "{8, 3, 1}", "{4, 6, 1}"),
    256: ("{2, 3, 2}", "{2, 2, 3}", "{4, 3, 1}"),
}
tunables = [
    Tunable(
        f"attention_decode on Hopper, head_dim {dim}",
        "csrc/kernels/attention_decode.cuh",
        f"constexpr DecodeTiling kDecodeHopper{dim} =",
        tilings,
        (9, 0),
        (
            *("attention_decode", "--dtype", "bf16", "--shape"),
            *(f"{batch}x32x8x1x{capacity}x{dim}" for batch, capacity in ((1, 8192), (8, 4096), (16, 16384))),
        ),
    )
    for dim, tilings in _HOPPER_TILINGS.items()
]

_TILES = {"*": "HMMA", "sm_80": "LDGSTS", "sm_90a": "LDGSTS"}
# Threads, registers and shared bytes of each instance. 16-bit up to 128 fits three blocks a multiprocessor, what the
# others need is bytes in flight, which two give.
static_plan = [
    *(
        KernelPlan(
            rf"^attention::attention_decode_forward_kernel<{type}, {dim}>", threads, registers, shared_bytes=shared,
            requires=_TILES,
        )
        for type, dim, threads, registers, shared in (
            ("__\\w+", 64, 128, 168, 35328),
            ("__\\w+", 128, 128, 168, 70144),
            ("__\\w+", 256, 64, 255, 73984),
            ("float", 64, 128, 168, 70144),
            ("float", 128, 64, 255, 73984),
            ("float", 256, 32, 255, 82048),
        )
    ),
    # By TMA; empty but on sm_90a.
    *(
        KernelPlan(
            rf"^attention::attention_decode_hopper_forward_kernel<__\w+, {dim}>", threads, registers,
            shared_bytes=shared, requires={"sm_90a": "HMMA UTMALDG"},
        )
        for dim, threads, registers, shared in ((64, 128, 168, 101376), (128, 128, 168, 103232), (256, 64, 255, 106976))
    ),
    KernelPlan(r"^attention::attention_decode_combine_kernel<", 128, 64),
]  # fmt: skip


def problems(functions: tuple[str, ...], shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination.  A shape is (batch, heads, key heads, queries, capacity, head_dim)."""
    return [
        Problem(
            case=make_case(*shape),
            shape="x".join(map(str, shape)),
            dtype=dtype,
            bytes=count_bytes(*shape, dtype.itemsize),
            flops=count_flops(*shape),
        )
        for _ in functions
        for shape in shapes
        for dtype in dtypes
    ]


def count_bytes(
    batch: int, heads: int, kv_heads: int, seqlen_q: int, capacity: int, head_dim: int, itemsize: int
) -> dict[str, int]:
    """What must move at least: the cache's rows in use and the new ones read once, the new ones written once."""
    rows = batch * kv_heads * head_dim * itemsize
    queries = batch * heads * seqlen_q * head_dim * itemsize
    return {"forward": 2 * rows * (capacity + seqlen_q) + 2 * queries + 4 * batch}


def count_flops(batch: int, heads: int, kv_heads: int, seqlen_q: int, capacity: int, head_dim: int) -> dict[str, int]:
    pairs = sum(capacity - seqlen_q + i + 1 for i in range(seqlen_q))
    return {"forward": 4 * batch * heads * head_dim * pairs}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed."""
    return {
        "torch": eager_candidate,
        "torch.compile": compile_candidate,
        "sdpa flash": lambda: _sdpa("flash", "FLASH_ATTENTION"),
        "sdpa efficient": lambda: _sdpa("efficient", "EFFICIENT_ATTENTION"),
        "sdpa math": lambda: _sdpa("math", "MATH"),
        "flash-attn": _flash_attn,
    }


def _sdpa(name: str, backend: str) -> Candidate:
    """Append by a copy, and torch's operator on the rows in use, whose number the host is told beforehand.

    The mask, for several queries, is torch's lower right causal bias: its flash backend takes no other.
    """
    attention = importlib.import_module("torch.nn.attention")
    bias = importlib.import_module("torch.nn.attention.bias")
    chosen = getattr(attention.SDPBackend, backend)

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        def call(t: Inputs) -> Outputs:
            query, key, value = (t[name] for name in ("query", "key_cache", "value_cache"))
            seqlen_q, end = query.shape[2], key.shape[2]
            key[:, :, end - seqlen_q :] = t["key"]
            value[:, :, end - seqlen_q :] = t["value"]
            mask = bias.causal_lower_right(seqlen_q, end) if seqlen_q > 1 else None
            with attention.sdpa_kernel(chosen):
                gqa = query.shape[1] != key.shape[1]
                output = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=gqa)
            return {"output": output, "key_cache": key, "value_cache": value}

        return call

    return Candidate(f"sdpa {name}", prepare)


def _flash_attn() -> Candidate:
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        def call(t: Inputs) -> Outputs:
            names = ("query", "key_cache", "value_cache", "key", "value")
            query, key_cache, value_cache, key, value = (t[name].transpose(1, 2) for name in names)
            output = function(query, key_cache, value_cache, key, value, cache_seqlens=t["cache_seqlens"], causal=True)
            return {"output": output.transpose(1, 2), "key_cache": t["key_cache"], "value_cache": t["value_cache"]}

        return call

    return Candidate("flash-attn", prepare)
