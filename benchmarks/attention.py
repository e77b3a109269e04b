"""Attention: shapes, counted bytes and FLOP, peers, compiled plans."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.measure import Candidate, Problem, Refused, compile_candidate, eager_candidate
from benchmarks.static import KernelPlan
from benchmarks.tune import Tunable
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.attention._cases import make_case

# What is computed: a case's keyword arguments by the function's name.
FEATURES: dict[str, dict] = {
    "attention": {},
    "attention_causal": {"causal": True},
    "attention_window": {"window": (1023, 0)},
    "attention_bool_mask": {"mask": "bool"},
    "attention_bias": {"mask": "bias"},
    "attention_dropout": {"dropout_p": 0.1},
    "attention_alibi": {"alibi": True, "causal": True},
    "attention_softcap": {"softcap": 50.0, "causal": True},
}
FUNCTIONS = tuple(FEATURES)
SHAPE_NAMES = "BATCHxHEADSxKV_HEADSxQUERIESxKEYSxDIM"

# batch, heads, key heads, queries, keys, head_dim. Of the documents' models: the Transformer classifier (32 texts of
# 200 tokens, embedding 64, 8 heads), BERT base (32 x 128, 12 heads of 64), GPT-2 (1,024 tokens).
DOCUMENT_SHAPES = ((32, 8, 8, 200, 200, 8), (32, 12, 12, 128, 128, 64), (4, 12, 12, 1024, 1024, 64))
SHAPES = {
    "cuda": (
        *((max(1, 16384 // length), 2048 // dim, 2048 // dim, length, length, dim) for dim in (64, 128, 256)
          for length in (512, 2048, 8192, 32768)),
        (1, 64, 8, 8192, 8192, 128),
        (16, 32, 8, 1, 8192, 128),  # decoding
        *DOCUMENT_SHAPES,
    ),
    "cpu": ((1, 8, 8, 512, 512, 64), (4, 4, 4, 128, 128, 128), *DOCUMENT_SHAPES[:2]),
    "tiny": ((1, 2, 2, 16, 16, 16), (1, 2, 1, 5, 40, 64)),
}  # fmt: skip
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32, torch.bfloat16),
    "tiny": (torch.float32,),
}

# Every tile comes by 16-byte asynchronous copies and goes through the tensor cores.
_COPIES = {"*": "HMMA", "sm_80": "LDGSTS", "sm_90a": "LDGSTS"}
_FORWARD, _BACKWARD = r"^attention::attention_forward_kernel<", r"^attention::attention_backward_kernel<"
# Threads and shared bytes of each instance. Accumulators of 16 or 32 rows by head_dim fill the registers: two blocks a
# multiprocessor hide each other's waits.
static_plan = [
    *(
        KernelPlan(rf"{kernel}{type}, {dim}, \w+>", threads, 255, shared_bytes=shared, requires=_COPIES)
        for kernel, type, dim, threads, shared in (
            (_FORWARD, "__\\w+", 64, 128, 32768),
            (_FORWARD, "__\\w+", 128, 128, 49152),
            (_FORWARD, "__\\w+", 256, 128, 49152),
            (_FORWARD, "float", 64, 128, 32768),
            (_FORWARD, "float", 128, 128, 65536),
            (_FORWARD, "float", 256, 128, 98304),
            (_BACKWARD, "__\\w+", 64, 128, 41472),
            (_BACKWARD, "__\\w+", 128, 128, 53504),
            (_BACKWARD, "__\\w+", 256, 256, 84096),
            (_BACKWARD, "float", 64, 128, 57600),
            (_BACKWARD, "float", 128, 256, 86144),
            (_BACKWARD, "float", 256, 256, 100480),
        )
    ),
    # Registers at the start; setmaxnreg then moves them from the loading warpgroup to the others.
    *(
        KernelPlan(
            rf"^attention::attention_hopper_forward_kernel<__\w+, {dim}, {plain}>",
            threads,
            registers,
            shared_bytes=shared,
            requires={"sm_90a": "HGMMA UTMALDG"},
            overlapped=True,
            # Of a tile of 128 keys 32 a row and thread, two rows, and two of the maxima; a quarter are polynomials.
            max_exponentials=50 if (dim, plain) == (64, "true") else None,
        )
        for dim, plain, threads, registers, shared in (
            (64, "true", 512, 128, 114808),
            (128, "true", 384, 168, 196712),
            (192, "true", 384, 168, 196712),
            (256, "true", 384, 168, 229480),
            (64, "false", 384, 168, 65640),
            (128, "false", 384, 168, 131176),
            (192, "false", 384, 168, 196712),
            (256, "false", 384, 168, 229480),
        )
    ),
    *(
        KernelPlan(
            rf"^attention::attention_hopper_backward_kernel<__\w+, {dim}, ",
            384,
            168,
            shared_bytes=shared,
            requires={"sm_90a": "HGMMA UTMALDG"},
        )
        for dim, shared in ((64, 149220), (128, 197836), (192, 181452), (256, 230604))
    ),
    KernelPlan(r"^attention::attention_combine_kernel<", 128, 64),
    KernelPlan(r"^attention::attention_backward_rows_kernel<", 128, 64),
    KernelPlan(r"^attention::attention_backward_queries_kernel<", 256, 64),
    KernelPlan(r"^attention::attention_backward_slopes_kernel<", 128, 64),
]


# Keys a tile, warpgroups of 64 queries, exponentials of 16 that are polynomials, by head_dim.
_HOPPER_TILINGS = {
    64: ("{128, 3, 4}", "{128, 3, 0}", "{128, 3, 2}", "{128, 3, 6}", "{128, 2, 4}", "{192, 2, 4}"),
    128: ("{128, 2, 0}", "{128, 2, 2}", "{176, 2, 0}"),
    192: ("{96, 2, 0}", "{64, 2, 0}"),
    256: ("{80, 2, 0}", "{64, 2, 0}"),
}
# Stages of rows, and whether threads add grad_query's sums themselves.
_HOPPER_BACKWARD_TILINGS = {
    64: ("{3, false}", "{3, true}", "{2, false}"),
    128: ("{2, false}", "{2, true}", "{3, true}"),
    192: ("{2, true}", "{2, false}"),
}
tunables = [
    Tunable(
        f"attention {direction} on Hopper, head_dim {dim}",
        f"csrc/kernels/attention_hopper_{direction}.cuh",
        f"constexpr Hopper{direction.title()}Tiling kHopper{direction.title()}{dim} =",
        tilings,
        (9, 0),
        (
            *("attention", "--function", "attention", "attention_causal", "--dtype", "bf16", "--direction", direction),
            *(
                "--shape",
                *(f"{batch}x{2048 // dim}x{2048 // dim}x{n}x{n}x{dim}" for batch, n in ((8, 2048), (1, 16384))),
            ),
        ),
    )
    for direction, of_dim in (("forward", _HOPPER_TILINGS), ("backward", _HOPPER_BACKWARD_TILINGS))
    for dim, tilings in of_dim.items()
]


def problems(functions: tuple[str, ...], shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination.  A shape is (batch, heads, key heads, queries, keys, head_dim)."""
    found = []
    for function in functions:
        for shape in shapes:
            for dtype in dtypes:
                found.append(
                    Problem(
                        case=make_case(*shape, function=function, **FEATURES[function]),
                        shape="x".join(map(str, shape)),
                        dtype=dtype,
                        bytes=count_bytes(function, *shape, dtype.itemsize),
                        flops=count_flops(function, *shape),
                    )
                )
    return found


def pairs(function: str, seqlen_q: int, seqlen_k: int) -> int:
    """Query-key pairs that are not hidden by the window, which the kernel may skip; other masks must be looked at."""
    causal = FEATURES[function].get("causal", False)
    left, right = FEATURES[function].get("window", (seqlen_k, 0 if causal else seqlen_k))
    return sum(max(0, min(seqlen_k, i + right + 1) - max(0, i - left)) for i in range(seqlen_q))


def count_bytes(
    function: str, batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, itemsize: int
) -> dict[str, int]:
    """What must move at least: every operand read once, every result written once, lse among them."""
    queries = batch * heads * seqlen_q * head_dim * itemsize
    keys = batch * kv_heads * seqlen_k * head_dim * itemsize
    lse = 4 * batch * heads * seqlen_q
    mask = {
        "attention_bool_mask": (batch * seqlen_q * seqlen_k, 0),
        "attention_bias": (heads * seqlen_q * seqlen_k * itemsize,) * 2,
    }.get(function, (0, 0))
    return {
        "forward": 2 * queries + 2 * keys + lse + mask[0],
        # query, output, its gradient, key, value, lse -> three gradients, and the mask's
        "backward": 4 * queries + 4 * keys + lse + sum(mask),
    }


def count_flops(
    function: str, batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, head_dim: int
) -> dict[str, int]:
    forward = 4 * batch * heads * head_dim * pairs(function, seqlen_q, seqlen_k)
    return {"forward": forward, "backward": forward * 5 // 2}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed."""
    return {
        "torch": eager_candidate,
        "torch.compile": compile_candidate,
        "sdpa flash": lambda: _sdpa("flash", "FLASH_ATTENTION"),
        "sdpa cudnn": lambda: _sdpa("cudnn", "CUDNN_ATTENTION"),
        "sdpa efficient": lambda: _sdpa("efficient", "EFFICIENT_ATTENTION"),
        "sdpa math": lambda: _sdpa("math", "MATH"),
        "flex_attention": _flex,
        "flash-attn": _flash_attn,
        "xformers": _xformers,
    }


def _traits(case: Case) -> dict[str, bool]:
    return {
        name: f" {name}" in case.name for name in ("causal", "window", "bool", "bias", "alibi", "softcap", "dropout")
    }


def _sdpa(name: str, backend: str) -> Candidate:
    attention = importlib.import_module("torch.nn.attention")
    chosen = getattr(attention.SDPBackend, backend)

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        traits = _traits(case)
        if traits["window"] or traits["alibi"] or traits["softcap"]:
            raise Refused("scaled_dot_product_attention has neither window nor ALiBi nor softcap")
        dropout_p = 0.1 if traits["dropout"] else 0.0

        def call(t: Inputs) -> Outputs:
            with attention.sdpa_kernel(chosen):
                gqa = t["query"].shape[1] != t["key"].shape[1]
                output = F.scaled_dot_product_attention(
                    t["query"], t["key"], t["value"], t.get("attn_mask"), dropout_p, traits["causal"], enable_gqa=gqa
                )
            return {"output": output}

        return call

    return Candidate(f"sdpa {name}", prepare)


def _flex() -> Candidate:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention)
    make_mask = torch.compile(flex.create_block_mask)

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        traits = _traits(case)
        if traits["dropout"]:
            raise Refused("flex_attention has no dropout")

        def score(t: Inputs) -> Callable | None:
            if traits["bias"]:
                return lambda s, b, h, i, j: s + t["attn_mask"][0, h, i, j]
            if traits["alibi"]:
                return lambda s, b, h, i, j: s - torch.exp2(-(h + 1.0)) * (i - j).abs()
            if traits["softcap"]:
                return lambda s, b, h, i, j: 50.0 * torch.tanh(s / 50.0)
            return None

        blocks: dict[int, object] = {}

        def block_mask(t: Inputs) -> object | None:
            query, key = t["query"], t["key"]
            if traits["bool"]:
                return make_mask(
                    lambda b, h, i, j: t["attn_mask"][b, 0, i, j], query.shape[0], None, query.shape[2], key.shape[2]
                )
            if not (traits["causal"] or traits["window"]):
                return None
            if 0 not in blocks:  # it depends on the lengths alone
                left = 1023 if traits["window"] else key.shape[2]
                blocks[0] = make_mask(
                    lambda b, h, i, j: (i >= j) & (i - j <= left), None, None, query.shape[2], key.shape[2]
                )
            return blocks[0]

        def call(t: Inputs) -> Outputs:
            gqa = t["query"].shape[1] != t["key"].shape[1]
            output = compiled(t["query"], t["key"], t["value"], score(t), block_mask(t), enable_gqa=gqa)
            return {"output": output}

        return call

    return Candidate("flex_attention", prepare)


def _flash_attn() -> Candidate:
    function = importlib.import_module("flash_attn").flash_attn_func

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        traits = _traits(case)
        if traits["bool"] or traits["bias"]:
            raise Refused("flash-attn has no masks")

        def call(t: Inputs) -> Outputs:
            heads = t["query"].shape[1]
            slopes = 2.0 ** -torch.arange(1, heads + 1, device=t["query"].device, dtype=torch.float32)
            output = function(
                *(t[name].transpose(1, 2) for name in ("query", "key", "value")),
                dropout_p=0.1 if traits["dropout"] else 0.0,
                causal=traits["causal"],
                window_size=(1023, 0) if traits["window"] else (-1, -1),
                softcap=50.0 if traits["softcap"] else 0.0,
                alibi_slopes=slopes if traits["alibi"] else None,
            )
            return {"output": output.transpose(1, 2)}

        return call

    return Candidate("flash-attn", prepare)


def _xformers() -> Candidate:
    ops = importlib.import_module("xformers.ops")

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        traits = _traits(case)
        if traits["window"] or traits["alibi"] or traits["softcap"] or traits["bool"]:
            raise Refused("this benchmark asks xFormers for causal masks, biases and dropout alone")

        def call(t: Inputs) -> Outputs:
            query, key, value = (t[name].transpose(1, 2) for name in ("query", "key", "value"))
            if query.shape[2] != key.shape[2]:
                group = query.shape[2] // key.shape[2]
                key, value = (x.repeat_interleave(group, 2) for x in (key, value))
            bias = ops.LowerTriangularMask() if traits["causal"] else t.get("attn_mask")
            if isinstance(bias, torch.Tensor):
                bias = bias.expand(query.shape[0], *bias.shape[1:])
            output = ops.memory_efficient_attention(query, key, value, bias, 0.1 if traits["dropout"] else 0.0)
            return {"output": output.transpose(1, 2)}

        return call

    return Candidate("xformers", prepare)
