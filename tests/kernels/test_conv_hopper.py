"""The convolution kernel of sm_90a: what it serves, every path of it, what it loads; against torch in float64.

The cases are of tests/kernels/test_conv.py's kind and go through the same checks, of outputs and of every gradient.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import bigkern
from benchmarks import conv as benchmark
from benchmarks.conv_counters import Shape
from bigkern.ops import _extension, conv2d
from bigkern.ops.conv import _cuda
from bigkern.ops.conv._schema import pooled_size
from tests import emulated, numerics
from tests.conftest import pick
from tests.kernels.test_conv import BF16, F16, F32, Conv, cases, check, forward, operands, randn, strided

ROW_BYTES = 128  # of a pixel or a filter in a step: 64 channels


@pytest.fixture(autouse=True)
def kernels(device, request):
    """Kernels that run as on a Hopper GPU: one of 2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability(device) != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        yield None
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=2, compute_capability=90)
    yield emulator
    emulator.set_options(**options)


def backward_input(conv: Conv, grad, weight, channels_last=True):
    return _cuda.backward_input(grad, weight, conv.size, *conv.window, conv.groups, False, channels_last)


def counted(kernels, function, *arguments) -> tuple[int, int]:
    """wgmma and bytes that TMA loads in a call."""
    kernels.reset_counters()
    function(*arguments)
    found = kernels.counters()
    return found["wgmmas"], found["tma_load_bytes"]


PATHS = {
    "tails of everything": Conv(3, 40, (10, 9), 72, (3, 3), padding=(1, 1)),
    "half a step of channels": Conv(1, 32, (6, 7), 24, (3, 3), padding=(1, 1)),
    "a step and a half": Conv(2, 96, (5, 5), 32, (3, 3), padding=(1, 1), activation=2),
    "1x1": Conv(2, 104, (7, 9), 72, (1, 1), activation=4),
    "1x1, stride 2: parities without a tap": Conv(1, 32, (7, 6), 24, (1, 1), stride=(2, 2)),
    "3x3, stride 2": Conv(2, 64, (9, 8), 40, (3, 3), stride=(2, 2), padding=(1, 1), activation=1),
    "stride 3, more than the kernel": Conv(1, 32, (11, 10), 32, (2, 2), stride=(3, 3)),
    "stride and dilation with a common factor": Conv(1, 24, (12, 13), 24, (3, 3), (2, 4), (2, 3), (2, 2)),
    "stride and dilation without": Conv(1, 32, (12, 13), 24, (3, 2), (2, 3), (1, 2), (3, 2)),
    "stride 2, one column: a phase beyond the image": Conv(1, 32, (5, 1), 32, (3, 3), (2, 2), (1, 1)),
    "dilation": Conv(1, 32, (9, 11), 24, (3, 3), padding=(2, 3), dilation=(2, 3), activation=3),
    "padding beyond the image": Conv(1, 32, (2, 3), 32, (3, 3), padding=(4, 3)),
    "even kernel": Conv(1, 32, (7, 6), 32, (2, 4), padding=(1, 2)),
    "small images, several a tile": Conv(9, 32, (5, 5), 24, (3, 3), padding=(1, 1)),
    "wide images in strips": Conv(1, 32, (2, 300), 32, (3, 3), padding=(1, 1)),
    "one dimension": Conv(2, 32, (1, 40), 24, (1, 5), padding=(0, 2)),
    "one place, no bias": Conv(1, 32, (3, 3), 24, (3, 3), bias=False),
}
POOLS = {
    "windows": Conv(2, 32, (8, 8), 32, (3, 3), padding=(1, 1), activation=1, pool=(2, 2, 2, 2, 0, 0)),
    "windows with a rest": Conv(1, 32, (9, 7), 24, (3, 3), padding=(1, 1), activation=2, pool=(2, 3, 2, 3, 0, 0)),
    "windows with gaps": Conv(1, 32, (9, 9), 24, (2, 2), activation=3, pool=(2, 2, 3, 3, 0, 0)),
    "box": Conv(2, 32, (15, 15), 24, (3, 3), padding=(1, 1), activation=1, pool=(3, 3, 2, 2, 1, 1)),
    "boxes with halos": Conv(1, 32, (21, 17), 72, (3, 3), padding=(1, 1), activation=4, pool=(3, 2, 1, 1, 1, 1)),
    "box, stride 2": Conv(1, 32, (16, 14), 24, (5, 5), (2, 2), (2, 2), activation=2, pool=(3, 3, 2, 2, 1, 1)),
    "pass of its own": Conv(1, 32, (20, 20), 24, (3, 3), pool=(9, 9, 3, 3, 4, 4)),
}


@pytest.mark.parametrize("name, dtype, channels_last", cases(PATHS | POOLS, [BF16, F16]), ids=str)
def test_paths(name, dtype, channels_last, device, kernels):
    conv = (PATHS | POOLS)[name]
    check(conv, dtype, device, channels_last)
    if kernels is None:
        return
    x, weight, bias = operands(conv, dtype, device, channels_last)
    assert counted(kernels, forward, conv, x, weight, bias, channels_last)[0] > 0
    grad = randn(conv.images, conv.filters, *conv.conv_size, dtype=dtype, channels_last=channels_last)
    assert counted(kernels, backward_input, conv, grad, weight, channels_last)[0] > 0


def small(count: int) -> list[tuple]:
    """(convolution, dtype, layout): every argument free."""
    draw = random.Random(11)
    found = []
    while len(found) < count:
        pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
        channels, filters = draw.choice([24, 32, 40, 72]), draw.choice([24, 32, 72])
        window = pair(1, 2, 3, 3, 5), pair(1, 1, 2, 3), pair(0, 1, 2), pair(1, 1, 2, 3)
        conv = Conv(draw.choice([1, 2, 5]), channels, pair(1, 4, 7, 8, 11), filters, *window)
        conv = replace(conv, activation=draw.randrange(5), bias=draw.random() < 0.7)
        if draw.random() < 0.4:
            extents = pair(1, 2, 3)
            padding = tuple(draw.randint(0, extent // 2) for extent in extents)
            conv = replace(conv, pool=(*extents, *pair(1, 2, 3), *padding))
        if min(conv.conv_size) >= 1 and min(pooled_size(conv.conv_size, conv.pool)) >= 1:
            found.append((conv, draw.choice([BF16, F16]), draw.random() < 0.6))
    return found


GENERATED = small(160)


@pytest.mark.parametrize("index", pick(range(len(GENERATED)), range(12)))
def test_generated(index, device):
    conv, dtype, channels_last = GENERATED[index]
    check(conv, dtype, device, channels_last)


@pytest.mark.emulated
@pytest.mark.parametrize(
    "conv, dtype, served",
    [
        (Conv(1, 32, (4, 4), 32, (3, 3)), F32, (False, False)),
        (Conv(1, 64, (4, 4), 64, (3, 3), groups=2), BF16, (False, False)),
        (Conv(1, 32, (4, 4), 32, (3, 3), groups=32), BF16, (False, False)),
        (Conv(1, 36, (4, 4), 32, (3, 3)), BF16, (False, True)),
        (Conv(1, 32, (4, 4), 36, (3, 3)), BF16, (True, False)),
        (Conv(1, 16, (4, 4), 24, (3, 3)), BF16, (False, True)),
        (Conv(1, 32, (9, 9), 32, (2, 2), stride=(5, 5)), BF16, (False, True)),
        (Conv(1, 32, (38, 60), 32, (3, 3), dilation=(18, 18)), BF16, (False, False)),
    ],
    ids=["fp32", "groups", "depthwise", "36 channels", "36 filters", "16 channels", "stride 5", "no slab large enough"],
)
def test_what_is_left_to_the_other_kernels(conv, dtype, served, kernels):
    x, weight, bias = operands(conv, dtype, "cpu")
    grad = randn(conv.images, conv.filters, *conv.conv_size, dtype=dtype, channels_last=True)
    assert (counted(kernels, forward, conv, x, weight, bias, True)[0] > 0) == served[0]
    assert (counted(kernels, backward_input, conv, grad, weight)[0] > 0) == served[1]
    check(conv, dtype, "cpu")


@pytest.mark.emulated
def test_other_architectures_run_other_kernels(kernels):
    conv = PATHS["half a step of channels"]
    for capability in (80, 89, 100, 120):
        kernels.set_options(compute_capability=capability)
        assert counted(kernels, forward, conv, *operands(conv, BF16, "cpu"), True) == (0, 0)


class Plan(NamedTuple):
    tile: int
    rows: int
    ring: int
    strips: int
    pitch: int
    slab: int
    slabs: int
    tiles: int
    most: int
    """Pixels that a tile loads to a slab, of all tiles the most."""
    cluster: int


class Pool(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("k_h", "k_w", "s_h", "s_w", "p_h", "p_w", "out_h", "out_w"))


@pytest.fixture(scope="module")
def planner():
    library = emulated.build_library(["tests/kernels/conv_hopper_plan.cu"], "plain", "conv_hopper_plan")
    return emulated.open_library(library, "plain")


def plan(planner, conv: Conv, transposed: bool) -> Plan | None:
    sizes = (conv.images, conv.channels, *conv.size, conv.filters, *conv.kernel, *conv.conv_size)
    shape = Shape(*sizes, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    pooled = conv.pool and not transposed
    pool = Pool(*conv.pool, *pooled_size(conv.conv_size, conv.pool)) if pooled else Pool()
    found = (ctypes.c_int64 * len(Plan._fields))()
    planner.functions.conv_hopper_plan(ctypes.byref(shape), ctypes.byref(pool), transposed, found)
    return Plan(*found) if found[0] >= 0 else None


def large(count: int) -> list[Conv]:
    draw = random.Random(3)
    found = []
    while len(found) < count:
        pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
        conv = Conv(
            draw.choice([1, 2, 5, 32]),
            draw.choice([32, 64, 104]),
            pair(1, 5, 7, 13, 14, 28, 37, 56, 113),
            draw.choice([32, 64, 136, 512]),
            pair(1, 2, 3, 3, 5, 7),
            pair(1, 1, 2, 3),
            pair(0, 1, 3),
            pair(1, 1, 2),
            pool=draw.choice([(), (), (2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1), (2, 3, 3, 4, 0, 0)]),
        )
        if min(conv.conv_size) >= 1 and min(pooled_size(conv.conv_size, conv.pool)) >= 1:
            found.append(conv)
    return found


@pytest.mark.emulated
def test_slabs_hold_what_every_tile_loads(planner):
    """Of shapes too large to run here; no kernel runs."""
    planner.control.set_options(multiprocessors=132)
    served, tiles = 0, set()
    for conv in large(pick([1000], [250])[0]):
        for transposed in (False, True):
            found = plan(planner, conv, transposed)
            if found is None:
                continue
            served += 1
            tiles.add(found.tile)
            assert found.most <= found.slab and found.slab * found.slabs <= found.ring and found.slabs >= 2, conv
            assert found.pitch <= 256, conv
    assert served > 200 and tiles == {0, 1, 2}


@pytest.mark.emulated
def test_resnet_is_served(planner):
    """All its convolutions of 16-bit elements but the stem's forward, in two slabs at least."""
    planner.control.set_options(multiprocessors=132)
    for shape in benchmark.SHAPES["cuda"]:
        images, channels, height, width, filters, kernel, stride, padding, groups = shape
        if images != 256 or groups > 1 or channels < 32:
            continue
        square = ((kernel, kernel), (stride, stride), (padding, padding))
        conv = Conv(images, channels, (height, width), filters, *square)
        assert plan(planner, conv, False) and plan(planner, conv, True), shape


@pytest.mark.emulated
def test_blocks_share_pixels_where_that_binds(planner):
    """By the model: L2 in a 1 x 1 convolution of many filters, not in a 3 x 3; never without a filter tile for each."""
    planner.control.set_options(multiprocessors=132)
    assert plan(planner, Conv(256, 1024, (14, 14), 512, (1, 1)), False).cluster == 2
    assert plan(planner, Conv(256, 256, (14, 14), 256, (3, 3), padding=(1, 1)), False).cluster == 1
    assert plan(planner, Conv(256, 512, (28, 28), 64, (1, 1)), False).cluster == 1
    planner.control.set_options(multiprocessors=2)
    for name in ("tails of everything", "1x1"):
        assert plan(planner, PATHS[name], False).cluster == 2


# Of a tile on one multiprocessor: 16 x 16 places, 2 steps of channels. In the last, of two filter tiles, two blocks
# share the pixels.
TILES = {
    "256x128": (Conv(1, 128, (16, 16), 128, (3, 3), padding=(1, 1)), 256, 128),
    "256x64": (Conv(1, 128, (16, 16), 64, (3, 3), padding=(1, 1)), 256, 64),
    "128x64": (Conv(1, 128, (8, 16), 64, (3, 3), padding=(1, 1)), 128, 64),
    "256x128, stride 2": (Conv(1, 128, (32, 32), 128, (3, 3), (2, 2), (1, 1)), 256, 128),
    "256x64, 1x1": (Conv(1, 128, (16, 16), 128, (1, 1)), 256, 64),
}


@pytest.mark.emulated
@pytest.mark.parametrize("name", TILES)
def test_pixels_are_loaded_once_for_all_taps(name, kernels):
    """A step of channels loads the tile's pixels with their borders, and its filters under every tap; no more."""
    conv, rows, filters = TILES[name]
    kernels.set_options(multiprocessors=1)
    check(conv, BF16, "cpu")
    taps, channel_steps = conv.kernel[0] * conv.kernel[1], 2
    lines, pitch = rows // 16, 16
    if "1x1" in name:
        pixels = rows
    elif conv.stride == (1, 1):
        pixels = (lines + 2) * (pitch + 2)
    else:  # lines of even and of odd rows, each under even and odd columns: two taps reach one line and column more
        pixels = 2 * (lines + lines + 1) * (pitch + 1)
    x, weight, bias = operands(conv, BF16, "cpu")
    found = counted(kernels, forward, conv, x, weight, bias, True)
    products = channel_steps * taps * 4 * rows // 64 * (conv.filters // filters)
    assert found == (products, channel_steps * (pixels + taps * conv.filters) * ROW_BYTES)


@pytest.mark.parametrize("name", pick(TILES, ["256x128", "256x64"]))
def test_rings_go_round_many_times(name, device, kernels):
    """One block has all tiles: more slabs than there are in the ring, the next tile's loaded while one is stored."""
    conv, _, filters = TILES[name]
    if kernels:
        kernels.set_options(multiprocessors=1)
    conv = replace(conv, images=2, channels=96, size=(17, 18), filters=filters + 8, kernel=(2, 2), activation=1)
    check(conv, F16, device)


@pytest.mark.parametrize("channels_last", [True, False])
def test_residual(channels_last, device):
    """Through the public op, with its gradients."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    conv = Conv(2, 32, (7, 6), 40, (3, 3), stride=(2, 1), padding=(1, 1))
    inputs = [*operands(conv, BF16, device, channels_last)]
    inputs.append(randn(2, 40, *conv.conv_size, dtype=BF16, device=device, seed=5).contiguous(memory_format=form))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    window = dict(stride=(2, 1), padding=1)

    def fused(x, weight, bias, residual):
        with bigkern.use_backend("cuda"):
            return conv2d(x, weight, bias, **window, activation="gelu", residual=residual)

    def unfused(x, weight, bias, residual):
        return F.gelu(F.conv2d(x, weight, bias, **window) + residual)

    numerics.check(fused, unfused, inputs)


@pytest.mark.parametrize("how", ["odd offset", "cut out of wider channels", "every other pixel", "transposed"])
def test_any_strides(how, device, kernels):
    """Those a tensor map takes are read as they lie, the others by other kernels or from copies."""
    conv = Conv(2, 32, (6, 5), 24, (3, 3), padding=(1, 1))
    x, weight, bias = operands(conv, BF16, device)
    expected = forward(conv, x, weight, bias, True)[0]
    x, weight = strided(x, how), strided(weight, how)
    found = forward(conv, x, weight, bias, True)[0]
    if how == "odd offset":  # the order of sums is another
        numerics.assert_close(
            "output", found, expected, F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        )
    else:
        assert torch.equal(found, expected)
    if kernels:
        assert (counted(kernels, forward, conv, x, weight, bias, True)[0] > 0) == (how != "odd offset")


def test_expanded_images(device):
    """Strides of 0 that mean something."""
    conv = Conv(3, 32, (5, 5), 24, (3, 3))
    x, weight, bias = operands(conv, BF16, device)
    repeated = x[:1].expand_as(x)
    found = forward(conv, repeated, weight, bias, True)[0]
    alone = F.conv2d(repeated.double(), weight.double(), bias.double())
    numerics.assert_close("output", found, F.conv2d(repeated, weight, bias), alone)


def test_a_nan_stays_where_it_is(device):
    conv = Conv(2, 32, (6, 6), 24, (3, 3), padding=(1, 1), activation=1)
    x, weight, bias = operands(conv, BF16, device)
    clean = forward(conv, x, weight, bias, True)[0]
    x[1, 3, 2, 2] = float("nan")
    output = forward(conv, x, weight, bias, True)[0]
    reached = torch.zeros(2, 24, 6, 6, dtype=torch.bool, device=device)
    reached[1, :, 1:4, 1:4] = True
    assert torch.equal(output.isnan(), reached)
    assert torch.equal(output[~reached], clean[~reached])


@pytest.mark.parametrize("name", ["a step and a half", "3x3, stride 2", "windows"])
def test_equal_inputs_give_equal_bits(name, device, kernels):
    """Under any schedule of the threads, and whenever copies and products take effect."""
    conv = (PATHS | POOLS)[name]
    x, weight, bias = operands(conv, BF16, device)
    grad = randn(conv.images, conv.filters, *conv.conv_size, dtype=BF16, device=device, channels_last=True)
    first = None
    for schedule in kernels.schedules(seeds=2) if kernels else [{}] * 3:
        if kernels:
            kernels.set_options(**{"multiprocessors": 1 + schedule["seed"] % 2, **schedule})
        results = (*forward(conv, x, weight, bias, True), backward_input(conv, grad, weight))
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.emulated
def test_images_more_than_two_to_the_31_elements_apart(kernels):
    """Address space that is reserved and never touched but for two images of it."""
    conv = Conv(2, 32, (5, 5), 24, (3, 3), padding=(1, 1))
    x, weight, bias = operands(conv, BF16, "cpu")
    near = forward(conv, x, weight, bias, True)[0]
    distance = (1 << 31) + 8
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    size = 2 * (distance + x[0].numel())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        buffer = (ctypes.c_char * size).from_buffer(memory)
        storage = torch.frombuffer(buffer, dtype=BF16, count=size // 2)
        far = storage.as_strided(x.shape, (distance, *x.stride()[1:])).copy_(x)
        assert torch.equal(forward(conv, far, weight, bias, True)[0], near)
        assert counted(kernels, forward, conv, far, weight, bias, True)[0] > 0
        del storage, buffer, far


SMALL = {
    "steps, tails": Conv(1, 72, (5, 4), 24, (3, 3), padding=(1, 1), activation=4),
    "stride 2": Conv(1, 32, (6, 5), 24, (3, 3), (2, 2), (1, 1)),
    "box": Conv(1, 32, (6, 6), 24, (2, 2), activation=1, pool=(3, 3, 2, 2, 1, 1)),
    "two blocks": Conv(1, 72, (3, 4), 72, (1, 1), activation=2),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("name", SMALL)
def test_small(name, device):
    """Small enough for the race checker and AddressSanitizer."""
    turn = list(SMALL).index(name)
    check(SMALL[name], (BF16, F16)[turn % 2], device, channels_last=turn % 2 == 0)
