"""Compiles the Triton kernels for GPUs that are not here, exactly as a launch would, and reads what came out.

The product's own launch code runs, on CPU tensors that nothing touches; each launch is caught and compiled instead,
through Triton's own argument specialisation, for a GPU target that a stand-in driver names.  So no list of signatures
and tile sizes has to be kept in step with the product's.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)

# Shared memory one block can use, bytes (CUDA C++ Programming Guide, technical specifications per compute capability).
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_MULTIPROCESSORS = 132

_INSTRUCTIONS = {
    "LDG": r"LDG\.",
    "LDG.128": r"LDG\.E(\.\w+)*\.128",
    "LDGSTS": r"LDGSTS\.",
    "LDGSTS.128": r"LDGSTS\.E(\.\w+)*\.128",
    "STG": r"STG\.",
    "STG.128": r"STG\.E(\.\w+)*\.128",
    "LDS": r"LDS",
    "STS": r"STS",
    "LDL": r"LDL",
    "STL": r"STL",
    "BAR": r"BAR\.",
    "ATOM": r"(ATOM|RED)G?\.",
    "MMA": r"(HMMA|HGMMA|UTC\w*MMA)\b",
}


class Case(NamedTuple):
    """One call of a raw op, as (name, function): the function runs the product's launch code."""

    name: str
    call: Callable[[], object]
    op: str = "layer_norm"


def _layer_norm(
    rows: int, cols: int, dtype: torch.dtype, features: str, parameters: torch.dtype | None = None
) -> Callable:
    """The forward and backward launches of layer norm with these features: any of "rms", "residual", "dropout"."""

    def call():
        from bigkern.ops.layer_norm import _triton

        def tensor(*shape, kind=dtype):
            return torch.empty(shape, dtype=kind)

        rms = "rms" in features
        dropout_p = 0.25 if "dropout" in features else 0.0
        residual = tensor(rows, cols) if "residual" in features else None
        weight = tensor(cols, kind=parameters or dtype)
        bias = None if rms else torch.empty_like(weight)
        philox = torch.empty(2, dtype=torch.int64)
        _triton._forward(tensor(rows, cols), residual, weight, bias, 1e-5, rms, dropout_p, philox)
        mean, rstd = tensor(0 if rms else rows, kind=torch.float32), tensor(rows, kind=torch.float32)
        grad_summed = None if residual is None else tensor(rows, cols)
        _triton._backward(
            tensor(rows, cols),
            grad_summed,
            tensor(rows, cols),
            mean,
            rstd,
            weight,
            rms,
            dropout_p,
            philox,
            True,
            not rms,
        )

    return call


def _conv(
    input_shape: tuple[int, int, int, int],
    filters: int,
    window: int,
    dtype: torch.dtype,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: int = 1,
    max_pool: tuple[int, ...] = (),
    tf32: bool = False,
    residual: bool = False,
) -> Callable:
    """The launches of a convolution's forward and of all its gradients, channels_last, padded to keep the size."""

    def call():
        from bigkern.ops.conv import _schema, _triton

        def tensor(*shape):
            return _schema.new_tensor(torch.empty(0, dtype=dtype), shape, True)

        geometry = ((stride,) * 2, (window // 2,) * 2, (1, 1), groups)
        x, weight = tensor(*input_shape), tensor(filters, input_shape[1] // groups, window, window)
        bias = torch.empty(filters, dtype=dtype)
        size = _schema.conv_size(x.shape[2:], weight.shape[2:], *geometry[:3])
        added = tensor(x.shape[0], filters, *size) if residual else None
        results = _triton._forward(x, weight, bias, *geometry, activation, max_pool, tf32, True, True, added)
        grad = tensor(*results[0].shape)
        if activation or max_pool:
            grad = _triton._backward_epilogue(grad, *results, size, activation, max_pool)
        _triton._backward_input(grad, weight, x.shape[2:], *geometry, tf32, True)
        _triton._backward_weight(grad, x, weight.shape[2:], *geometry, tf32, True, True)

    return call


def _attention(dim: int, dtype: torch.dtype, *, features: bool = False, tf32: bool = False) -> Callable:
    """The launches of causal attention, forward and backward, with a key head for four; or of all features at once."""

    def call():
        from bigkern.ops.attention import _triton

        batch, heads, kv_heads, length = 2, 8, 2, 1024

        def tensor(count):
            return torch.empty(batch, length, count, dim, dtype=dtype).transpose(1, 2)

        query, key, value = tensor(heads), tensor(kv_heads), tensor(kv_heads)
        bias = torch.empty(1, heads, length, length, dtype=dtype) if features else None
        slopes = torch.empty(heads) if features else None
        philox = torch.zeros(2, dtype=torch.int64)
        numbers = (20.0, 0.125, 0.1) if features else (0.0, 0.125, 0.0)
        options = (bias, slopes, None, None, length, length, -1, 0, False, *numbers, philox, tf32)
        output, lse = _triton._forward(query, key, value, *options)
        _triton._backward(output, None, query, key, value, output, lse, *options, features, False, False)

    return call


def attention_cases() -> list[Case]:
    """Calls that reach every kernel of attention in every tile."""
    half, full = torch.bfloat16, torch.float32
    return [
        *(Case(f"{dim} bf16", _attention(dim, half), "attention") for dim in (64, 128, 256)),
        *(
            Case(f"{dim} bf16, all features", _attention(dim, half, features=True), "attention")
            for dim in (64, 128, 256)
        ),
        *(Case(f"{dim} fp32", _attention(dim, full), "attention") for dim in (64, 128, 256)),
        *(Case(f"{dim} TF32", _attention(dim, full, tf32=True), "attention") for dim in (64, 256)),
    ]


def _optimizer(launch: Callable) -> Callable:
    """A launch of an optimizer's raw op on tables of two tensors; what they point at does not matter."""

    def call():
        from bigkern.ops.adam import _triton
        from bigkern.ops.adam._plan import SCRATCH_WORDS, Column, Hyper

        tensors, hyper = torch.zeros(2, len(Column), dtype=torch.int64), torch.zeros(1, len(Hyper), dtype=torch.float64)
        ends, grads = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        launch(_triton, tensors, ends, grads, hyper, torch.zeros(SCRATCH_WORDS, dtype=torch.int64))

    return call


def conv_cases() -> list[Case]:
    """Calls that reach every kernel of convolution, each traversal and each dtype.

    CPU tensors stand in for a GPU's, and what tl.dot is given decides much: bf16 and TF32 take tensor cores, fp32 FMA.
    """
    half, full = torch.bfloat16, torch.float32
    pooled, overlapping = (2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1)
    return [
        Case("64 3x3 bf16", _conv((8, 64, 56, 56), 64, 3, half), "conv"),
        Case(
            "256 1x1 bf16, residual and gelu",
            _conv((8, 256, 28, 28), 128, 1, half, activation=2, residual=True),
            "conv",
        ),
        Case("64 3x3 bf16, stride 2, pooled", _conv((8, 64, 56, 56), 128, 3, half, stride=2, max_pool=pooled), "conv"),
        Case(
            "stem 7x7 fp16, pooled", _conv((8, 3, 64, 64), 64, 7, torch.float16, stride=2, max_pool=overlapping), "conv"
        ),
        Case("depthwise 3x3 bf16, silu", _conv((8, 96, 28, 28), 96, 3, half, groups=96, activation=4), "conv"),
        Case("64 3x3 fp32", _conv((8, 64, 28, 28), 64, 3, full, activation=0), "conv"),
        Case("64 3x3 TF32", _conv((8, 64, 28, 28), 64, 3, full, activation=3, tf32=True), "conv"),
    ]


def _step(rule: str, *, extras: bool) -> Callable:
    """A step, with everything that changes the code: GradScaler, clipping, zeroed gradients, stochastic rounding."""
    scalar = torch.zeros(()) if extras else None
    philox = torch.zeros(2, dtype=torch.int64) if extras else None

    def launch(_triton, tensors, ends, grads, hyper, scratch):
        _triton._step(rule)(tensors, ends, grads, hyper, scratch, scalar, scalar, scalar, 1.0, extras, philox)

    return _optimizer(launch)


def optimizer_cases() -> list[Case]:
    """Calls that reach every kernel of the optimizers."""
    return [
        Case("adam", _step("adam", extras=False), "adam"),
        Case("adam with all extras", _step("adam", extras=True), "adam"),
        Case("sgd", _step("sgd", extras=False), "adam"),
        Case("sgd with all extras", _step("sgd", extras=True), "adam"),
        *(
            Case(
                f"clip, norm {p:g}", _optimizer(lambda t, a, b, c, h, s, p=p: t._clip_grads(a, b, c, s, p, 1.0)), "adam"
            )
            for p in (1.0, 2.0, 3.0, float("inf"))
        ),
    ]


def cases() -> list[Case]:
    """Calls that together reach every kernel in every shape of tile, dtype and feature that the product launches."""
    half, full = torch.bfloat16, torch.float32
    return [
        Case("1Mx64 bf16", _layer_norm(1 << 20, 64, half, "")),
        Case("8192x1024 bf16, fp32 parameters", _layer_norm(8192, 1024, half, "", full)),
        Case("4096x4096 bf16", _layer_norm(4096, 4096, half, "")),
        Case("4096x4096 fp32", _layer_norm(4096, 4096, full, "")),
        Case("4096x4096 bf16 residual+dropout", _layer_norm(4096, 4096, half, "residual dropout")),
        Case("4096x4096 fp16 rms", _layer_norm(4096, 4096, torch.float16, "rms")),
        Case("4096x8192 bf16", _layer_norm(4096, 8192, half, "")),
        Case("4096x8192 fp32 residual+dropout", _layer_norm(4096, 8192, full, "residual dropout")),
        Case("1024x16384 bf16 residual+dropout", _layer_norm(1024, 16384, half, "residual dropout")),
        Case("1024x16384 fp32", _layer_norm(1024, 16384, full, "")),
        Case("64x131072 bf16 residual+dropout", _layer_norm(64, 131072, half, "residual dropout")),
        Case("64x131072 fp32 rms", _layer_norm(64, 131072, full, "rms")),
    ]


def essential_cases() -> list[Case]:
    """Of those, the ones nearest to a limit: the narrowest, the hungriest of registers, the widest."""
    names = (
        "1Mx64 bf16", "4096x4096 bf16 residual+dropout", "4096x8192 fp32 residual+dropout",
        "64x131072 bf16 residual+dropout"
    )  # fmt: skip
    return [case for case in cases() if case.name in names]


def odd_width() -> Case:
    return Case("512x4095 bf16", _layer_norm(512, 4095, torch.bfloat16, ""))


def width_1000() -> Case:
    return Case("512x1000 bf16", _layer_norm(512, 1000, torch.bfloat16, ""))


def too_wide() -> Case:
    return Case("256x65536 fp32", _layer_norm(256, 65536, torch.float32, ""))


class _Driver:
    """What Triton asks of a driver before it launches: the target.  Each architecture poses as its own device."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Catcher:
    """Stands in the place of a kernel: compiles what it is asked to launch."""

    def __init__(self, kernel, compiled: list):
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self._compiled.append((self._kernel.fn.__name__, self._kernel.warmup(*args, grid=grid, **options)))

        return launch


@contextlib.contextmanager
def _catching(architecture: int, op: str) -> Iterator[list]:
    from triton.runtime import driver

    from bigkern.ops import _triton_support

    _triton = importlib.import_module(f"bigkern.ops.{op}._triton")
    _triton_kernels = importlib.import_module(f"bigkern.ops.{op}._triton_kernels")

    class Caught:
        pass

    compiled: list = []
    caught = Caught()
    for name, kernel in vars(_triton_kernels).items():
        if name.endswith("_kernel"):
            setattr(caught, name, _Catcher(kernel, compiled))
    before = driver._active, _triton._loaded_kernels, _triton_support._INTERPRETED_MULTIPROCESSORS
    driver.set_active(_Driver(architecture))
    _triton._loaded_kernels, _triton_support._INTERPRETED_MULTIPROCESSORS = caught, _MULTIPROCESSORS
    try:
        yield compiled
    finally:
        driver._active, _triton._loaded_kernels, _triton_support._INTERPRETED_MULTIPROCESSORS = before


def _cuobjdump(option: str, file: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers, local memory in bytes, and counts of instructions of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", file)))
        counts: collections.Counter[str] = collections.Counter(dict.fromkeys(["instructions", *_INSTRUCTIONS], 0))
        for line in _cuobjdump("-sass", file).splitlines():
            if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
                counts["instructions"] += 1
                for name, pattern in _INSTRUCTIONS.items():
                    counts[name] += re.match(pattern, found[1]) is not None
    return {"registers": int(usage["REG"]), "local": int(usage["STACK"]) + int(usage["LOCAL"]), **counts}


def compile_case(case: Case, architecture: int) -> list[dict]:
    """One row a kernel that the call launches, compiled for the architecture (80, 90, ...): its figures."""
    with _catching(architecture, case.op) as compiled:
        case.call()
    return [
        {
            "kernel": name,
            "case": case.name,
            "arch": f"sm_{architecture}",
            "threads": kernel.metadata.num_warps * 32,
            "shared": kernel.metadata.shared,
            **inspect(kernel.asm["cubin"]),
        }
        for name, kernel in compiled
    ]


def static_report(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict]:
    """Every kernel of every case for every architecture, for tables."""
    every = [*cases(), *conv_cases(), *attention_cases()]
    return [row for case in every for architecture in architectures for row in compile_case(case, architecture)]
