"""What the convolution kernels ask of a GPU, beside the floor, shape by shape, without one.

    python -m benchmarks.conv_counters            the table
    python -m benchmarks.conv_counters --write    also rewrite benchmarks/results/conv_counters.md

conv_counters.cu records what the launchers would launch on a GPU of 132 multiprocessors and counts, by the sizes of the
tiles and the taps inside the images, the tensor-core products that warps issue and the bytes that instructions load and
store.  The emulator counts the same on small shapes (tests/benchmarks/test_conv_counters.py).
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import conv
from tests import emulated

TABLE = Path(__file__).parent / "results" / "conv_counters.md"
DIRECTIONS = ("forward", "grad_input", "grad_weight")
MULTIPROCESSORS = 132
IMAGES = 32

_SOURCE = Path(__file__).with_suffix(".cu")
_PRODUCT_FLOP = 2 * 16 * 8 * 16
_BF16 = 2
_MEMORY_BYTES = 20  # of a multiprocessor and cycle, as conv_hopper_weight_plan.cuh assumes


class Shape(ctypes.Structure):
    """ConvShape of csrc/kernels/conv.h."""

    _fields_ = (
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("channels", "height", "width", "filters", "kernel_h", "kernel_w")),
        *((name, ctypes.c_int) for name in ("out_h", "out_w", "stride_h", "stride_w", "padding_h", "padding_w")),
        *((name, ctypes.c_int) for name in ("dilation_h", "dilation_w", "groups")),
    )


class _Record(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("products", "loads", "stores", "launches", "uncounted"))


class HopperWeight(ctypes.Structure):
    """What the weight gradient's kernel of sm_90a asks for; `tile` is -1 where it does not serve."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("tile", "filters", "columns", "box_w", "box_h", "box_images", "steps", "parts", "cluster"),
            *("products", "flop", "loads", "stores", "cycles"),
        )
    )


class Count(NamedTuple):
    """Of one call: products of 16 x 8 x 16, bytes, launches; `counted` products where the kernels ran."""

    products: int
    loads: int
    stores: int
    launches: int
    counted: int


@cache
def library(build: str = "plain") -> emulated.Library:
    return emulated.open_library(emulated.build_library([_SOURCE], build, "conv_counters"), build)


def conv_shape(shape: tuple[int, ...]) -> Shape:
    images, channels, height, width, filters, kernel, stride, padding, groups = shape
    out_h, out_w = (conv.places(size, kernel, stride, padding) for size in (height, width))
    struct = Shape(images, channels, height, width, filters, kernel, kernel, out_h, out_w)
    struct.stride_h = struct.stride_w = stride
    struct.padding_h = struct.padding_w = padding
    struct.dilation_h = struct.dilation_w = 1
    struct.groups = groups
    return struct


def hopper_weight(shape: Shape) -> HopperWeight:
    found = HopperWeight()
    library().functions.conv_hopper_weight_counters(ctypes.byref(shape), ctypes.byref(found))
    return found


def count(
    shape: tuple[int, ...],
    direction: str,
    pool: tuple[int, int, int] | None = None,
    build: str = "plain",
    run: bool = False,
) -> Count:
    """Of a convolution of conv.SHAPE_NAMES, with a max pool of (kernel, stride, padding) in its forward."""
    struct = conv_shape(shape)
    record, counted = _Record(), ctypes.c_int64()
    call = library(build).functions.conv_counters
    arguments = [*(pool or (0, 0, 0)), DIRECTIONS.index(direction), run]
    code = call(ctypes.byref(struct), *arguments, ctypes.byref(record), ctypes.byref(counted))
    if code:
        raise RuntimeError(f"launch failed with code {code}")
    if record.uncounted:
        raise ValueError(f"{shape} {direction}: {record.uncounted} kernels without counters")
    return Count(record.products, record.loads, record.stores, record.launches, counted.value)


def floor_bytes(shape: tuple[int, ...], direction: str) -> int:
    """Operands read once and results written once."""
    forward = conv.count_bytes("conv2d", shape, _BF16)["forward"]
    return forward - (shape[4] * _BF16 if direction == "grad_input" else 0)


def markdown() -> str:
    library().control.set_options(multiprocessors=MULTIPROCESSORS)
    lines = [
        "# What the convolution kernels ask of a GPU",
        "",
        f"Written by `python -m benchmarks.conv_counters --write`: bf16, channels_last, {IMAGES} images, planned for "
        f"{MULTIPROCESSORS} multiprocessors.",
        "Nothing was timed. For forward, input gradient and weight gradient:",
        "",
        "- **FLOP**: tensor-core FLOP issued over useful ones (tiles are whole; padding and tails count as issued).",
        "- **asked**: bytes that instructions load and store over the floor (each operand once). Caches serve what is "
        "asked for again.",
        "- **stored**: stored bytes over those of the result; the weight gradient's parts of sums are its overhead.",
        "",
        "| shape | GFLOP | FLOP fwd, dgrad, wgrad | asked fwd, dgrad, wgrad | stored fwd, dgrad, wgrad |",
        "|---|---|---|---|---|",
    ]
    shapes = [shape for shape in conv.SHAPES["cuda"] if shape[0] in (IMAGES, 128) and shape[-1] == 1]
    for shape in shapes:
        useful = conv.count_flops(shape)["forward"]
        images, channels, height, width, filters, kernel, stride, padding, groups = shape
        out = [conv.places(size, kernel, stride, padding) for size in (height, width)]
        results = {
            "forward": images * filters * out[0] * out[1],
            "grad_input": images * channels * height * width,
            "grad_weight": filters * (channels // groups * kernel * kernel + 1),
        }
        counts = {direction: count(shape, direction) for direction in DIRECTIONS}
        cells = [
            [f"{counts[d].products * _PRODUCT_FLOP / useful:.2f}" for d in DIRECTIONS],
            [f"{(counts[d].loads + counts[d].stores) / floor_bytes(shape, d):.1f}" for d in DIRECTIONS],
            [f"{counts[d].stores / (results[d] * _BF16):.1f}" for d in DIRECTIONS],
        ]
        name = "x".join(map(str, shape))
        lines.append(f"| {name} | {useful / 1e9:.1f} | {' | '.join(', '.join(cell) for cell in cells)} |")
    lines += [
        "",
        "Forward with ReLU and a max pool: FLOP issued over useful, and bytes stored over those of the pooled output.",
        "",
        "| shape | pool | FLOP | stored |",
        "|---|---|---|---|",
    ]
    for shape in shapes:
        pool = conv.max_pool_of("conv2d_relu_pool", shape)
        if shape[1] > 64 or shape[5] == 1:
            continue
        found = count(shape, "forward", pool)
        pooled = [conv.places(conv.places(n, *shape[5:8]), *pool) for n in shape[2:4]]
        stored = found.stores / (shape[0] * shape[4] * pooled[0] * pooled[1] * _BF16)
        issued = found.products * _PRODUCT_FLOP / conv.count_flops(shape)["forward"]
        window = f"{pool[0]}x{pool[0]} by {pool[1]}"
        lines.append(f"| {'x'.join(map(str, shape))} | {window} | {issued:.2f} | {stored:.1f} |")
    lines += [
        "",
        "The weight gradient on Hopper (csrc/kernels/conv_hopper_weight.cuh): tile of filters and columns, or two "
        "in a cluster; places of a step along width, height and images; parts; FLOP, asked of L2 and stored as above; "
        "microseconds modelled at 1.6 GHz, no less than memory's floor at 4.2 TB/s.",
        "",
        "| shape | tile | step | parts | FLOP | asked | stored | us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in (shape for shape in conv.SHAPES["cuda"] if shape[-1] == 1):
        found = hopper_weight(conv_shape(shape))
        if found.tile < 0:
            continue
        floor = floor_bytes(shape, "grad_weight")
        tile = f"{found.filters}x{found.columns}" + (" x 2" if found.cluster == 2 else "")
        cells = [
            f"{found.flop / conv.count_flops(shape)['forward']:.2f}",
            f"{(found.loads + found.stores) / floor:.1f}",
            f"{found.stores / (shape[4] * (shape[1] * shape[5] ** 2 + 1) * _BF16):.1f}",
            f"{max(found.cycles, floor / (_MEMORY_BYTES * MULTIPROCESSORS)) / 1600:.1f}",
        ]
        step = f"{found.box_w}x{found.box_h}x{found.box_images}"
        lines.append(f"| {'x'.join(map(str, shape))} | {tile} | {step} | {found.parts} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv_counters", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    args = parser.parse_args(argv)
    table = markdown()
    print(table)
    if args.write:
        TABLE.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
