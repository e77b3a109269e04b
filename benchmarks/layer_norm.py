"""Layer norm, RMS norm and residual add with layer norm: shapes, counted bytes and FLOP, peers, compiled plans."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from benchmarks.measure import Candidate, Problem, Refused, compile_candidate, eager_candidate
from benchmarks.static import KernelPlan
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.layer_norm._cases import make_case

FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm")

# rows x cols of the documents' models: Transformer classifier (32 texts of 200 tokens, embedding 64), Transformer on
# features (32 x 10, hidden 256), BERT base (32 x 128, 768).
DOCUMENT_SHAPES = ((6400, 64), (320, 256), (4096, 768))
SHAPES = {
    "cuda": ((4096, 4096), (4096, 8192), (8192, 12288), (1 << 20, 64), (64, 131072), *DOCUMENT_SHAPES),
    "cpu": ((512, 1024), (128, 8192), (16384, 64), (8, 131072), *DOCUMENT_SHAPES),
    "tiny": ((8, 64), (3, 1000)),
}
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32, torch.bfloat16),
    "tiny": (torch.float32,),
}

# Arithmetic an element, forward and backward; every one of these is bound by memory, so they only fill a column.
_FLOPS = {"layer_norm": (8, 13), "rms_norm": (5, 10), "add_layer_norm": (9, 14)}

# 64 registers let 1,024 threads stay on a multiprocessor, 128 let 512: enough loads in flight for either direction.
_FORWARD, _BACKWARD = 64, 128
static_plan = [
    *(
        KernelPlan(rf"^layer_norm_forward_kernel<\w+, [48], \d+, {threads}>", threads, _FORWARD, vectorised=True)
        for threads in (128, 256, 512)
    ),
    *(
        KernelPlan(rf"^layer_norm_forward_kernel<\w+, 1, \d+, {threads}>", threads, _FORWARD)
        for threads in (128, 256, 1024)
    ),
    # A row of 16,384 floats, or 32,768 16-bit numbers.
    KernelPlan(r"^layer_norm_forward_shared_kernel<\w+, [48],", 512, _FORWARD, True, shared_bytes=65536),
    KernelPlan(r"^layer_norm_forward_shared_kernel<\w+, 1,", 512, _FORWARD, shared_bytes=65536),
    KernelPlan(r"^layer_norm_forward_(moments|apply)_kernel<[\w, ]*, [48], ", 256, _FORWARD, vectorised=True),
    KernelPlan(r"^layer_norm_forward_(moments|apply)_kernel<[\w, ]*, 1, ", 256, _FORWARD),
    *(
        KernelPlan(rf"^layer_norm_backward_kernel<\w+, [48], \d+, {threads}>", threads, _BACKWARD, vectorised=True)
        for threads in (256, 512)
    ),
    *(
        KernelPlan(rf"^layer_norm_backward_kernel<\w+, 1, \d+, {threads}>", threads, _BACKWARD)
        for threads in (256, 512)
    ),
    KernelPlan(r"^layer_norm_backward_shared_kernel<", 512, _BACKWARD, vectorised=True),
    KernelPlan(r"^layer_norm_backward_sums_kernel<", 256, _FORWARD),
    KernelPlan(r"^layer_norm_backward_apply_kernel<\w+, [48], ", 256, _BACKWARD, vectorised=True),
    KernelPlan(r"^layer_norm_backward_apply_kernel<\w+, 1, ", 256, _BACKWARD),
    KernelPlan(r"^layer_norm_parameter_gradients_kernel<", 256, _FORWARD),
    # Clusters: empty but on sm_90a.
    KernelPlan(
        r"^layer_norm_forward_cluster_kernel<(__nv_bfloat16|__half), 8>", 512, _FORWARD, requires={"sm_90a": "LDG.128"}
    ),
    KernelPlan(r"^layer_norm_forward_cluster_kernel<float, 4>", 512, 128, requires={"sm_90a": "LDG.128"}),
    KernelPlan(r"^layer_norm_forward_cluster_kernel<\w+, 1>", 512, _FORWARD),
    KernelPlan(r"^layer_norm_backward_cluster_kernel<\w+, [48]>", 512, _BACKWARD, requires={"sm_90a": "LDG.128"}),
    KernelPlan(r"^layer_norm_backward_cluster_kernel<\w+, 1>", 512, _BACKWARD),
]


def problems(functions: tuple[str, ...], shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination.  A shape is (rows, cols)."""
    found = []
    for function in functions:
        for rows, cols in shapes:
            for dtype in dtypes:
                found.append(
                    Problem(
                        case=make_case(function, rows, cols),
                        shape=f"{rows}x{cols}",
                        dtype=dtype,
                        bytes=count_bytes(function, rows, cols, dtype.itemsize),
                        flops=count_flops(function, rows, cols),
                    )
                )
    return found


def count_bytes(function: str, rows: int, cols: int, itemsize: int) -> dict[str, int]:
    """What must move at least: every operand read once, every result written once.

    Row statistics are left out: a backward could take them again from the rows that it reads.
    """
    tensor, parameter = rows * cols * itemsize, cols * itemsize
    parameters = 1 if function == "rms_norm" else 2
    if function == "add_layer_norm":
        # input, residual -> output, summed; backward: grad_output, grad_summed, summed -> one gradient for both inputs
        moved = {"forward": 4 * tensor, "backward": 4 * tensor}
    else:
        moved = {"forward": 2 * tensor, "backward": 3 * tensor}
    # The forward reads weight and bias; the backward reads the weight and writes their gradients.
    return {
        "forward": moved["forward"] + parameters * parameter,
        "backward": moved["backward"] + (1 + parameters) * parameter,
    }


def count_flops(function: str, rows: int, cols: int) -> dict[str, int]:
    forward, backward = _FLOPS[function]
    return {"forward": forward * rows * cols, "backward": backward * rows * cols}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed."""
    return {
        "torch": eager_candidate,
        "torch.compile": compile_candidate,
        "liger": _liger,
        "apex": _apex,
        "quack": _quack,
    }


def _liger() -> Candidate:
    layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    rms_norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if case.function == "layer_norm":
            return lambda t: {"output": layer_norm.apply(t["input"], t["weight"], t["bias"], 1e-5)}
        if case.function == "rms_norm":
            # Its default writes the input's gradient over grad_output, which the other candidates still need.
            return lambda t: {"output": rms_norm.apply(t["input"], t["weight"], 1e-5, 0.0, "llama", False)}
        raise Refused("Liger has no residual add with layer norm")

    return Candidate("liger", prepare)


def _apex() -> Candidate:
    fused = importlib.import_module("apex.normalization.fused_layer_norm")

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if case.function == "layer_norm":
            return lambda t: {
                "output": fused.fused_layer_norm_affine(
                    t["input"], t["weight"], t["bias"], tuple(t["weight"].shape), 1e-5
                )
            }
        if case.function == "rms_norm":
            return lambda t: {
                "output": fused.fused_rms_norm_affine(t["input"], t["weight"], tuple(t["weight"].shape), 1e-5)
            }
        raise Refused("Apex has no residual add with layer norm")

    return Candidate("apex", prepare)


def _quack() -> Candidate:
    rmsnorm = importlib.import_module("quack").rmsnorm

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if case.function == "rms_norm":
            return lambda t: {"output": rmsnorm(t["input"], t["weight"], eps=1e-5)}
        raise Refused("quack trains RMS norm only")

    return Candidate("quack", prepare)
