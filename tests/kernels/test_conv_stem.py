"""The kernel of networks' first convolutions: what it serves, every path of it; against torch in float64.

The cases are of tests/kernels/test_conv.py's kind and go through the same checks, of outputs and of every gradient.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bigkern
from bigkern.ops import _extension
from bigkern.ops.conv import _cuda
from bigkern.ops.conv._schema import pooled_size
from tests import numerics
from tests.conftest import pick
from tests.kernels.test_conv import (
    BF16,
    F16,
    F32,
    Conv,
    argmax_in_image,
    cases,
    check,
    check_tensors,
    forward,
    operands,
    randn,
    strided,
)


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU of one multiprocessor when emulated: blocks go from box to box."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield None
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=1)
    yield emulator
    emulator.set_options(**options)


OVERLAPPING, APART = (3, 3, 2, 2, 1, 1), (2, 2, 2, 2, 0, 0)
# The names say what a case is there for.
PATHS = {
    "ResNet": Conv(1, 3, (30, 24), 64, (7, 7), (2, 2), (3, 3), activation=1, pool=OVERLAPPING),
    "box after box": Conv(3, 3, (25, 40), 40, (3, 3), (2, 2), (1, 1), activation=1),
    "odd step: a second copy of the lines": Conv(1, 3, (17, 16), 64, (3, 3), padding=(1, 1), activation=1, pool=APART),
    "one channel, lines of odd length": Conv(2, 1, (21, 27), 32, (3, 3), activation=1, pool=APART),
    "two channels": Conv(1, 2, (16, 20), 33, (5, 5), padding=(2, 2), activation=2),
    "four channels": Conv(1, 4, (20, 24), 16, (3, 3), (2, 2), (0, 1)),
    "filters of three tiles": Conv(1, 3, (12, 16), 130, (3, 3), padding=(1, 1), activation=1),
    "odd filters, saved sums of maxima": Conv(
        1, 3, (16, 15), 21, (2, 5), (1, 2), (1, 2), activation=3, pool=(2, 3, 1, 2, 1, 1)
    ),
    "patches": Conv(1, 3, (32, 48), 96, (4, 4), (4, 4)),
    "stride 3": Conv(1, 3, (30, 41), 24, (7, 6), (3, 3), (3, 4), activation=4, pool=OVERLAPPING),
    "1x1": Conv(1, 4, (16, 16), 8, (1, 1), bias=False),
    "one dimension": Conv(2, 3, (1, 200), 8, (1, 5), padding=(0, 2), activation=1, pool=(1, 2, 1, 2, 0, 0)),
    "padding beyond the image": Conv(1, 2, (4, 5), 8, (3, 4), padding=(4, 6), activation=1, pool=APART),
}


@pytest.mark.parametrize("name, dtype, channels_last", cases(PATHS, [BF16, F16]), ids=str)
def test_paths(name, dtype, channels_last, device):
    check(PATHS[name], dtype, device, channels_last)


def generated(count: int) -> list[tuple]:
    """(convolution, dtype, layouts of input and weight): every argument free within what the kernel serves."""
    draw = random.Random(5)
    pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
    found = []
    while len(found) < count:
        conv = Conv(
            draw.choice([1, 1, 2]),
            draw.randint(1, 4),
            pair(8, 13, 16, 27),
            draw.choice([1, 5, 8, 30, 64, 65, 130]),
            pair(*range(1, 8)),
            pair(1, 2, 2, 3),
            pair(0, 1, 2, 3),
            activation=draw.choice([0, 1, 1, 2, 4]),
            bias=draw.random() < 0.8,
        )
        if draw.random() < 0.6:
            window = pair(1, 2, 3)
            padding = tuple(draw.randint(0, extent // 2) for extent in window)
            conv = replace(conv, pool=(*window, *pair(1, 2, 3), *padding))
        if min(conv.conv_size) < 8 or min(pooled_size(conv.conv_size, conv.pool)) < 1:
            continue
        found.append((conv, draw.choice([BF16, F16]), draw.random() < 0.5, draw.random() < 0.5))
    return found


GENERATED = generated(160)


@pytest.mark.parametrize("index", pick(range(len(GENERATED)), range(6)))
def test_generated(index, device):
    check(*GENERATED[index][:2], device, *GENERATED[index][2:])


def launches(kernels, *arguments) -> int:
    before = kernels.counters()["launches"]
    forward(*arguments)
    return kernels.counters()["launches"] - before


@pytest.mark.emulated
def test_what_is_served(kernels):
    """By one launch. The general path copies weights of this layout first."""

    def count(conv: Conv, dtype=BF16, relaid=lambda x: x) -> int:
        x, weight, bias = operands(conv, dtype, "cpu", channels_last=False)
        return launches(kernels, conv, relaid(x), weight, bias, False)

    stem = Conv(1, 3, (16, 16), 8, (3, 3), (2, 2), (1, 1), activation=1, pool=OVERLAPPING)
    last = torch.channels_last
    served = [
        count(stem),
        count(stem, relaid=lambda x: x.contiguous(memory_format=last)),
        count(stem, relaid=lambda x: strided(x, "odd offset")),
        count(stem, relaid=lambda x: strided(x, "cut out of a larger image")),
        count(replace(stem, activation=2)),
        count(replace(stem, channels=4, kernel=(7, 7), padding=(3, 3), pool=())),
    ]
    assert served == [1] * len(served)
    general = [
        count(stem, F32),
        count(stem, relaid=lambda x: strided(x, "every other pixel")),
        count(stem, relaid=lambda x: strided(x, "transposed")),
        count(replace(stem, channels=5)),
        count(replace(stem, channels=4, filters=8, groups=2)),
        count(replace(stem, dilation=(2, 2), padding=(2, 2))),
        count(replace(stem, size=(9, 9))),  # one box of 25 places
        count(replace(stem, size=(64, 64), kernel=(32, 32), stride=(2, 2), padding=(15, 15))),  # taps do not fit
        count(replace(stem, stride=(1, 1), pool=(13, 13, 2, 2, 6, 6))),  # boxes are mostly halo
    ]
    assert min(general) >= 2


@pytest.mark.parametrize("how", ["odd offset", "cut out of a larger image"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_any_dense_lines(how, channels_last, device):
    conv = Conv(2, 3, (17, 16), 24, (3, 3), padding=(1, 1), activation=1, pool=OVERLAPPING)
    x, weight, bias = operands(conv, BF16, device, channels_last)
    expected = forward(conv, x, weight, bias, channels_last)
    view = x.permute(0, 3, 1, 2) if not channels_last and how == "odd offset" else x
    view = strided(view, how)
    view = view.permute(0, 2, 3, 1) if not channels_last and how == "odd offset" else view
    assert torch.equal(view, x)
    assert all(map(torch.equal, forward(conv, view, strided(weight, how), bias, channels_last), expected))


def test_expanded_tensors(device):
    """Strides of 0: one image or one channel repeated."""
    conv = Conv(3, 3, (12, 16), 8, (3, 3), activation=1, pool=APART)
    x, weight, bias = operands(conv, BF16, device, channels_last=False)
    for repeated in (x[:1].expand_as(x), x[:, :1].expand_as(x)):
        check_tensors(conv, repeated, weight, bias, channels_last=False)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bad_pixel_reaches_what_reads_it(stride, channels_last, device):
    """No further: pairs of elements hold neighbours of the window, which must not be multiplied."""
    conv = Conv(1, 3, (20, 21), 16, (3, 3), (stride, stride), (1, 1), activation=1)
    x, weight, bias = operands(conv, BF16, device, channels_last)
    clean = forward(conv, x, weight, bias, channels_last)[0]
    for channel in range(3):
        bad = x.clone(memory_format=torch.preserve_format)
        bad[0, channel, 8, 9] = float("nan")
        output = forward(conv, bad, weight, bias, channels_last)[0]
        reached = F.conv2d(bad.double(), weight.double(), bias.double(), *conv.window).isnan()
        assert 0 < reached.sum() < reached.numel()
        assert torch.equal(output.isnan(), reached)
        assert torch.equal(output[~reached], clean[~reached])


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("pool", [APART, OVERLAPPING])
def test_maxima_of_equal_and_of_no_numbers(pool, activation, device):
    """The first of equal maxima, zeros of either sign among them, the last NaN, as torch."""
    conv = Conv(2, 4, (18, 17), 4, (1, 1), activation=activation, pool=pool)
    weight = torch.eye(4, device=device, dtype=BF16).view(4, 4, 1, 1)
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-2, 3, (2, 1, *conv.size), generator=generator).expand(2, 4, *conv.size)
    for value in (None, float("nan")):
        x = base.to(BF16)
        if value is not None:
            x = torch.where(torch.rand(2, 1, *conv.size, generator=generator) < 0.1, value, x)
        for last in (True, False):
            form = torch.channels_last if last else torch.contiguous_format
            bias = torch.full((4,), -0.0, dtype=BF16, device=device)
            output, _, argmax = forward(conv, x.to(device).contiguous(memory_format=form), weight, bias, last)
            windows = (pool[:2], pool[2:4], pool[4:])
            active = x.relu() if activation else x
            expected, indices = F.max_pool2d(active.float(), *windows, return_indices=True)
            assert torch.equal(output.cpu().float().nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
            assert torch.equal(argmax_in_image(conv, argmax).cpu(), indices)


def test_nothing_but_zeros(device):
    """Sums of -0 are zeros that relu leaves."""
    conv = Conv(1, 3, (16, 16), 8, (3, 3), padding=(1, 1), activation=1, pool=APART)
    x, weight, bias = (tensor * -0.0 for tensor in operands(conv, BF16, device))
    output, _, argmax = forward(conv, x, weight, bias, True)
    assert (output == 0).all() and (argmax == 0).all()


def test_without_backward_nothing_is_kept(device):
    conv = PATHS["odd filters, saved sums of maxima"]
    x, weight, bias = operands(conv, BF16, device)
    output, preactivation, argmax = forward(conv, x, weight, bias, True, need_backward=False)
    assert preactivation.shape == argmax.shape == (0,)
    assert torch.equal(output, forward(conv, x, weight, bias, True)[0])


@pytest.mark.parametrize("name", ["ResNet", "odd step: a second copy of the lines"])
def test_equal_inputs_give_equal_bits(name, device, kernels):
    """Under any schedule of the threads, and whenever copies take effect."""
    conv = replace(PATHS[name], images=2, filters=8)
    x, weight, bias = operands(conv, BF16, device)
    first = None
    for schedule in kernels.schedules(seeds=1) if kernels else [{}] * 3:
        if kernels:
            kernels.set_options(**schedule)
        results = forward(conv, x, weight, bias, True)
        first = first or results
        assert all(map(torch.equal, results, first))


SMALL = {
    "odd step": Conv(2, 3, (12, 16), 8, (3, 3), padding=(1, 1), activation=1, pool=OVERLAPPING),
    "planes, elements": Conv(1, 2, (17, 18), 33, (3, 3), (2, 2), (1, 1), activation=2, pool=(2, 2, 1, 1, 0, 0)),
    "pixels, without a pool": Conv(1, 3, (16, 24), 9, (2, 3), (2, 2), activation=4),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("name", SMALL)
def test_small(name, device):
    """Small enough for the race checker and AddressSanitizer."""
    turn = list(SMALL).index(name)
    conv, last, dtype = SMALL[name], turn % 2 == 0, (BF16, F16)[turn % 2]
    x, weight, bias = operands(conv, dtype, device, last)
    output, preactivation, argmax = forward(conv, x, weight, bias, last)
    assert torch.isfinite(output).all()
    for kept in (preactivation, argmax):
        assert kept.numel() in (0, output.numel())


@pytest.mark.emulated
def test_images_more_than_two_to_the_31_elements_apart():
    """Address space that is reserved and never touched but for two images of it."""
    conv = Conv(2, 3, (12, 16), 8, (3, 3), padding=(1, 1), activation=1)
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
        del storage, buffer, far


@pytest.mark.parametrize("channels_last", [True, False])
def test_block_trains_as_torchs_layers(channels_last, device):
    """nn.ConvBlock2d with its gradients, from images of either layout."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = randn(2, 3, 24, 32, dtype=BF16, device=device).contiguous(memory_format=form)
    stem = bigkern.nn.ConvBlock2d(3, 16, 7, stride=2, padding=3, activation="relu", max_pool=(3, 2, 1))
    stem = stem.to(device, BF16, memory_format=form)
    assert _cuda.unsupported(x, stem.weight, stem.bias, (2, 2), (3, 3), (1, 1), 1, "relu", OVERLAPPING) is None

    def fused(x, weight, bias):
        with bigkern.use_backend("cuda"):
            return torch.func.functional_call(stem, {"weight": weight, "bias": bias}, (x,))

    def unfused(x, weight, bias):
        return F.max_pool2d(F.conv2d(x, weight, bias, 2, 3).relu(), 3, 2, 1)

    inputs = [tensor.detach().requires_grad_() for tensor in (x, stem.weight, stem.bias)]
    numerics.check(fused, unfused, inputs)
