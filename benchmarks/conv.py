"""Convolution with bias, activation and max pool: shapes, counted bytes and FLOP, peers, compiled plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from benchmarks.measure import Candidate, Problem, Refused, compile_candidate, eager_candidate
from benchmarks.static import KernelPlan
from benchmarks.tune import Tunable
from bigkern.ops import conv2d
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.conv._cases import make_case

# What is fused; the layout of all tensors is channels_last, but for the plain convolution in torch's default.
FUNCTIONS = ("conv2d", "conv2d_nchw", "conv2d_relu", "conv2d_relu_pool")

SHAPE_NAMES = "IMAGESxCHANNELSxHEIGHTxWIDTHxFILTERSxKERNELxSTRIDExPADDINGxGROUPS"

# Channels, size, filters, kernel, stride: every distinct convolution of ResNet-50 (He et al., 2015; strides in the 3x3
# convolutions, as in torchvision).
_RESNET = (
    (3, 224, 64, 7, 2),
    (64, 56, 64, 1, 1),
    (64, 56, 64, 3, 1),
    (64, 56, 256, 1, 1),
    (256, 56, 64, 1, 1),
    (256, 56, 128, 1, 1),
    (128, 56, 128, 3, 2),
    (256, 56, 512, 1, 2),
    (128, 28, 512, 1, 1),
    (512, 28, 128, 1, 1),
    (128, 28, 128, 3, 1),
    (512, 28, 256, 1, 1),
    (256, 28, 256, 3, 2),
    (512, 28, 1024, 1, 2),
    (256, 14, 1024, 1, 1),
    (1024, 14, 256, 1, 1),
    (256, 14, 256, 3, 1),
    (1024, 14, 512, 1, 1),
    (512, 14, 512, 3, 2),
    (1024, 14, 2048, 1, 2),
    (512, 7, 2048, 1, 1),
    (2048, 7, 512, 1, 1),
    (512, 7, 512, 3, 1),
)
# Channels, size, stride: MobileNetV2's depthwise convolutions (Sandler et al., 2018).
_MOBILENET = (
    (32, 112, 1),
    (96, 112, 2),
    (144, 56, 1),
    (144, 56, 2),
    (192, 28, 1),
    (192, 28, 2),
    (384, 14, 1),
    (576, 14, 1),
    (576, 14, 2),
    (960, 7, 1),
)
# The documents' networks: 32-64-128 filters on 32x32 images of 3 channels, 32-64 on 28x28 of one, and an autoencoder's.
_DOCUMENTS = (
    (128, 3, 32, 32, 32, 3, 1, 1, 1),
    (128, 32, 16, 16, 64, 3, 1, 1, 1),
    (128, 64, 8, 8, 128, 3, 1, 1, 1),
    (128, 1, 28, 28, 32, 3, 1, 0, 1),
    (128, 32, 13, 13, 64, 3, 1, 0, 1),
)


def _resnet(images: int) -> list[tuple[int, ...]]:
    return [(images, c, size, size, k, r, stride, r // 2, 1) for c, size, k, r, stride in _RESNET]


def _mobilenet(images: int) -> list[tuple[int, ...]]:
    return [(images, c, size, size, c, 3, stride, 1, c) for c, size, stride in _MOBILENET]


SHAPES = {
    "cuda": (*_DOCUMENTS, *_resnet(32), *_mobilenet(32), *_resnet(256), *_mobilenet(256)),
    "cpu": (*_DOCUMENTS, (4, 64, 56, 56, 64, 3, 1, 1, 1), (4, 32, 112, 112, 32, 3, 1, 1, 32)),
    "tiny": ((1, 3, 9, 8, 8, 3, 2, 1, 1), (1, 8, 6, 6, 16, 3, 1, 1, 1), (1, 8, 6, 5, 8, 3, 1, 1, 8)),
}
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32,),
    "tiny": (torch.float32,),
}

# Tiles keep two blocks of 256 threads on a multiprocessor, whose copies then overlap with the other's products.
_TILE = 128
# But for the weight gradient by single elements or fused multiply-adds, which fill the registers with one.
_ALONE = 192
_SHARED_LARGE, _SHARED_MEDIUM, _SHARED_SMALL, _SHARED_ELEMENTS, _SHARED_WEIGHT = 69632, 49152, 32768, 36864, 49152
_SHARED_HOPPER = 226 << 10  # 227 KiB with the one that cuobjdump counts among a kernel's own
_SHARED_STEM = 81568  # of ResNet's
_MMA, _COPIES = {"*": "HMMA"}, {"*": "LDGSTS"}
_GEMM, _WEIGHT = r"^conv_gemm_kernel<\w+, conv::TileShape<\w+", r"^conv_backward_weight_kernel<.*"
static_plan = [
    KernelPlan(rf"{_GEMM}, 128, 128, .*TensorCores, .*ChunkLoader", 256, _TILE, False, _SHARED_LARGE, _MMA),
    KernelPlan(rf"{_GEMM}, 128, 64, .*TensorCores, .*ChunkLoader", 256, _TILE, False, _SHARED_MEDIUM, _MMA),
    KernelPlan(rf"{_GEMM}, 64, 64, .*TensorCores, .*ChunkLoader", 128, _TILE, False, _SHARED_SMALL, _MMA),
    KernelPlan(rf"{_GEMM}, 128, 64, .*TensorCores, .*ElementLoader", 256, _TILE, False, _SHARED_ELEMENTS, _MMA),
    KernelPlan(rf"{_GEMM}, 128, 64, .*FusedMultiplyAdd, .*ChunkLoader", 256, _TILE, False, _SHARED_MEDIUM, _COPIES),
    KernelPlan(rf"{_GEMM}, 64, 64, .*FusedMultiplyAdd, .*ChunkLoader", 128, _TILE, False, _SHARED_SMALL, _COPIES),
    KernelPlan(rf"{_GEMM}, 128, 64, .*FusedMultiplyAdd, .*ElementLoader", 256, _TILE, False, _SHARED_ELEMENTS),
    KernelPlan(rf"{_WEIGHT}TensorCores, .*WeightChunkLoader", 256, _TILE, False, _SHARED_WEIGHT, _MMA),
    KernelPlan(rf"{_WEIGHT}TensorCores, .*WeightElementLoader", 256, _ALONE, False, _SHARED_WEIGHT // 2, _MMA),
    KernelPlan(rf"{_WEIGHT}FusedMultiplyAdd, .*WeightChunkLoader", 256, _ALONE, False, _SHARED_WEIGHT, _COPIES),
    KernelPlan(rf"{_WEIGHT}FusedMultiplyAdd, .*WeightElementLoader", 256, _ALONE, False, _SHARED_WEIGHT // 2),
    # One block a multiprocessor: setmaxnreg shares out 168 registers a thread. Empty on other architectures.
    KernelPlan(r"^conv_hopper_(weight_)?kernel<", 384, 168, False, _SHARED_HOPPER, {"sm_90a": "HGMMA UTMALDG"}),
    # 64 x 64 sums a warp, and the fragments of two steps; two blocks a multiprocessor where shared memory has 164 KB.
    KernelPlan(r"^conv_stem_kernel<", 128, 255, False, _SHARED_STEM, {"*": "HMMA LDGSTS"}),
    # Strips of sums in registers: enough loads in flight with 512 threads.
    KernelPlan(r"^conv_depthwise_kernel<\w+, [48],", 256, 128, vectorised=True),
    KernelPlan(r"^conv_depthwise_kernel<\w+, 1,", 256, 128),
    KernelPlan(r"^conv_depthwise_weight_kernel<", 256, 128),
    KernelPlan(r"^conv_(pool|backward_epilogue)_kernel<\w+, [48]>", 256, 128, vectorised=True),
    KernelPlan(r"^conv_(pool|backward_epilogue)_kernel<\w+, 1>", 256, 128),
    KernelPlan(r"^conv_(permute|sum_parts)_kernel<", 256, 64),
]

# Places, filters and stages of each tile that a convolution is cut into, and how many blocks may share its pixels; a
# stage more leaves slabs of pixels less room.
tunables = [
    Tunable(
        "convolution on Hopper",
        "csrc/kernels/conv_hopper_plan.cuh",
        "constexpr HopperTile kHopperTiles[] =",
        (
            "{{256, 128, 5, 2}, {256, 64, 8, 2}, {128, 64, 8, 2}}",
            "{{256, 128, 5, 1}, {256, 64, 8, 1}, {128, 64, 8, 1}}",
            "{{256, 128, 4, 2}, {256, 64, 6, 2}, {128, 64, 6, 2}}",
            "{{128, 128, 5, 2}, {256, 64, 8, 2}, {128, 64, 8, 2}}",
        ),
        (9, 0),
        (
            *("conv", "--function", "conv2d", "--dtype", "bf16", "--direction", "forward", "--shape"),
            *(f"256x{c}x{size}x{size}x{c}x3x1x1x1" for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
            *("256x512x7x7x2048x1x1x0x1", "256x256x14x14x1024x1x1x0x1"),
        ),
    ),
    # Filters, columns and stages; the plan chooses among a set by the model, so that a set may hold more than it needs.
    Tunable(
        "weight gradient on Hopper",
        "csrc/kernels/conv_hopper_weight_plan.cuh",
        "constexpr HopperWeightTile kHopperWeightTiles[] =",
        (
            "{{256, 192, 4}, {256, 128, 4}, {128, 192, 5}, {64, 256, 5}}",
            "{{256, 128, 4}, {128, 256, 4}, {128, 192, 5}, {64, 256, 5}}",
            "{{256, 192, 3}, {256, 128, 3}, {128, 192, 4}, {64, 256, 4}}",
            "{{128, 256, 4}, {128, 128, 6}, {128, 192, 5}, {64, 128, 8}}",
        ),
        (9, 0),
        (
            *("conv", "--function", "conv2d", "--dtype", "bf16", "--direction", "backward", "--shape"),
            *(f"256x{c}x{size}x{size}x{c}x3x1x1x1" for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
            *("256x512x7x7x2048x1x1x0x1", "256x256x14x14x1024x1x1x0x1"),
        ),
    ),
]


@dataclass(frozen=True)
class ConvCase(Case):
    """A case that a peer can take apart."""

    stride: int = 1
    padding: int = 0
    groups: int = 1
    max_pool: tuple[int, int, int] | None = None


def problems(functions: tuple[str, ...], shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination.  A shape is SHAPE_NAMES; kernels are square, pooling is 2 x 2, after a stem 3 x 3 by 2."""
    found = []
    for function in functions:
        for shape in shapes:
            for dtype in dtypes:
                found.append(
                    Problem(
                        case=make_conv_case(function, shape),
                        shape="x".join(map(str, shape)),
                        dtype=dtype,
                        bytes=count_bytes(function, shape, dtype.itemsize),
                        flops=count_flops(shape),
                    )
                )
    return found


def max_pool_of(function: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    if function != "conv2d_relu_pool":
        return None
    stem = shape[5] == 7
    return (3, 2, 1) if stem else (2, 2, 0)


def make_conv_case(function: str, shape: tuple[int, ...]) -> ConvCase:
    images, channels, height, width, filters, kernel, stride, padding, groups = shape
    max_pool = max_pool_of(function, shape)
    case = make_case(
        (images, channels, height, width),
        (filters, channels // groups, kernel, kernel),
        stride=stride,
        padding=padding,
        groups=groups,
        activation="relu" if "relu" in function else None,
        max_pool=max_pool,
        channels_last=function != "conv2d_nchw",
    )
    case = replace(case, function=function)
    return ConvCase(**vars(case), stride=stride, padding=padding, groups=groups, max_pool=max_pool)


def places(size: int, kernel: int, stride: int, padding: int) -> int:
    """Of a kernel or window along an axis."""
    return (size + 2 * padding - kernel) // stride + 1


def count_bytes(function: str, shape: tuple[int, ...], itemsize: int) -> dict[str, int]:
    """What must move at least: every operand read once, every result written once.

    The backward reads the output for relu's mask and, with a pool, each maximum's place in a byte; what was pooled away
    is neither written nor read.
    """
    images, channels, height, width, filters, kernel, stride, padding, groups = shape
    out_h, out_w = (places(size, kernel, stride, padding) for size in (height, width))
    if max_pool := max_pool_of(function, shape):
        out_h, out_w = (places(size, *max_pool) for size in (out_h, out_w))
    given = images * channels * height * width
    weights = filters * (channels // groups * kernel * kernel + 1)
    output = images * filters * out_h * out_w
    saved = output * itemsize if "relu" in function else 0
    return {
        "forward": (given + weights + output) * itemsize,
        "backward": (output + 2 * given + 2 * weights - filters) * itemsize + saved + (output if max_pool else 0),
    }


def count_flops(shape: tuple[int, ...]) -> dict[str, int]:
    """Products and sums of the convolution; the backward has two of its size."""
    images, channels, height, width, filters, kernel, stride, padding, groups = shape
    out_h, out_w = (places(size, kernel, stride, padding) for size in (height, width))
    forward = 2 * images * out_h * out_w * filters * (channels // groups) * kernel * kernel
    return {"forward": forward, "backward": 2 * forward}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed."""
    return {"torch": eager_candidate, "torch.compile": compile_candidate, "conv then pool": _conv_then_pool}


def _conv_then_pool() -> Candidate:
    """Our own convolution with the pool as torch's: what fusing it saves."""

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if not isinstance(case, ConvCase) or case.max_pool is None:
            raise Refused("the case has no pool")

        def call(inputs: Inputs) -> Outputs:
            output = conv2d(**inputs, stride=case.stride, padding=case.padding, groups=case.groups, activation="relu")
            return {"output": F.max_pool2d(output, *case.max_pool)}

        return call

    return Candidate("conv then pool", prepare)
