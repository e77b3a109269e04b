"""The weight gradient's kernel of sm_90a: what it serves, every path of it, what it loads; against torch in float64."""

from __future__ import annotations

import ctypes
import mmap
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bigkern
from benchmarks import conv as benchmark
from benchmarks import conv_counters
from bigkern.ops import conv1d, conv2d
from bigkern.ops.conv import _cuda
from tests import numerics
from tests.conftest import pick
from tests.kernels.test_conv import BF16, F16, F32, Conv, cases, randn, strided, weight_gradient
from tests.kernels.test_conv_hopper import counted, kernels  # noqa: F401, a fixture

PLACES = 64  # of a step
STEP_BYTES = 128  # of a place in a step: 64 filters or channels


def operands(conv: Conv, dtype, device, channels_last=True) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the output, and pixels."""
    how = dict(dtype=dtype, device=device, channels_last=channels_last)
    return randn(conv.images, conv.filters, *conv.conv_size, seed=3, **how), randn(
        conv.images, conv.channels, *conv.size, **how
    )


def backward(conv: Conv, grad, x, channels_last=True) -> tuple[torch.Tensor, torch.Tensor]:
    return _cuda.backward_weight(grad, x, conv.kernel, *conv.window, conv.groups, False, channels_last, conv.bias)


def check(conv: Conv, dtype, device, channels_last=True):
    grad, x = operands(conv, dtype, device, channels_last)
    with numerics.uninitialised_memory_is_nan():
        grad_weight, grad_bias = backward(conv, grad, x, channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert grad_weight.shape == conv.weight_shape and grad_weight.is_contiguous(memory_format=form)
    truth = weight_gradient(conv, grad.double(), x.double())
    numerics.assert_close("grad_weight", grad_weight, weight_gradient(conv, grad, x), truth)
    if conv.bias:
        numerics.assert_close("grad_bias", grad_bias, grad.sum((0, 2, 3)), grad.double().sum((0, 2, 3)))


def model(conv: Conv) -> conv_counters.HopperWeight:
    """What is planned, without running anything."""
    sizes = (conv.images, conv.channels, *conv.size, conv.filters, *conv.kernel, *conv.conv_size)
    return conv_counters.hopper_weight(
        conv_counters.Shape(*sizes, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    )


PATHS = {
    "3x3": Conv(2, 64, (8, 8), 64, (3, 3), padding=(1, 1)),
    "256 filters": Conv(1, 64, (8, 8), 264, (3, 3), padding=(1, 1)),
    "128 filters, tails of channels and filters": Conv(1, 104, (8, 8), 120, (3, 3), padding=(1, 1)),
    "half a step of channels": Conv(1, 32, (9, 16), 64, (2, 3), padding=(0, 1)),
    "1x1": Conv(2, 104, (9, 7), 264, (1, 1)),
    "1x1, stride 2": Conv(2, 64, (12, 7), 64, (1, 1), stride=(2, 2)),
    "3x3, stride 2": Conv(2, 64, (16, 15), 104, (3, 3), stride=(2, 2), padding=(1, 1)),
    "stride 3 and 4, more than the kernel": Conv(1, 64, (24, 32), 64, (2, 2), stride=(3, 4)),
    "stride and dilation": Conv(1, 64, (19, 22), 64, (3, 2), (2, 3), (1, 2), (3, 2)),
    "dilation": Conv(1, 64, (8, 10), 64, (3, 3), padding=(2, 2), dilation=(2, 3)),
    "phases beyond the image": Conv(64, 64, (1, 2), 64, (3, 3), (2, 4), (1, 2)),
    "padding beyond the image": Conv(2, 64, (2, 3), 64, (3, 3), padding=(3, 2)),
    "small images, places to fill up": Conv(10, 64, (7, 7), 64, (3, 3), padding=(1, 1)),
    "images of different boxes": Conv(3, 64, (6, 8), 64, (3, 3), padding=(1, 1)),
    "one dimension": Conv(2, 64, (1, 96), 72, (1, 5), padding=(0, 2)),
    "no bias": Conv(1, 64, (8, 8), 64, (3, 1), padding=(1, 0), bias=False),
    "boxes beyond both operands": Conv(1, 64, (14, 16), 64, (2, 2), stride=(2, 2)),
}


@pytest.mark.parametrize("name, dtype, channels_last", cases(PATHS, [BF16, F16]), ids=str)
def test_paths(name, dtype, channels_last, device, kernels):  # noqa: F811
    conv = PATHS[name]
    check(conv, dtype, device, channels_last)
    if kernels:
        assert counted(kernels, backward, conv, *operands(conv, dtype, device))[0] > 0


def small(count: int) -> list[tuple]:
    """(convolution, dtype, layout): every argument free."""
    draw = random.Random(17)
    found = []
    while len(found) < count:
        pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
        channels, filters = draw.choice([32, 64, 64, 72, 104]), draw.choice([48, 64, 120, 192])
        window = pair(1, 2, 3, 3, 5), pair(1, 1, 2, 3), pair(0, 1, 2), pair(1, 1, 2)
        conv = Conv(draw.choice([1, 2, 5, 12]), channels, pair(1, 4, 7, 8, 11), filters, *window)
        conv = replace(conv, bias=draw.random() < 0.7)
        if min(conv.conv_size) >= 1 and conv.images * conv.conv_size[0] * conv.conv_size[1] <= 400:
            found.append((conv, draw.choice([BF16, F16]), draw.random() < 0.6))
    return found


GENERATED = small(120)


@pytest.mark.parametrize("index", pick(range(len(GENERATED)), range(10)))
def test_generated(index, device):
    conv, dtype, channels_last = GENERATED[index]
    check(conv, dtype, device, channels_last)


@pytest.mark.emulated
@pytest.mark.parametrize(
    "conv, dtype",
    [
        (Conv(1, 64, (8, 8), 64, (3, 3)), F32),
        (Conv(1, 128, (8, 8), 128, (3, 3), padding=(1, 1), groups=2), BF16),
        (Conv(1, 64, (8, 8), 64, (3, 3), padding=(1, 1), groups=64), BF16),
        (Conv(1, 60, (8, 8), 64, (3, 3), padding=(1, 1)), BF16),
        (Conv(1, 64, (8, 8), 60, (3, 3), padding=(1, 1)), BF16),
        (Conv(1, 24, (8, 8), 64, (3, 3), padding=(1, 1)), BF16),
        (Conv(1, 64, (40, 40), 64, (2, 2), stride=(5, 5)), BF16),
        (Conv(1, 64, (13, 13), 64, (3, 3), padding=(1, 1)), BF16),
    ],
    ids=["fp32", "groups", "depthwise", "60 channels", "60 filters", "24 channels", "stride 5", "13 places of 64"],
)
def test_what_is_left_to_the_other_kernels(conv, dtype, kernels):  # noqa: F811
    assert counted(kernels, backward, conv, *operands(conv, dtype, "cpu")) == (0, 0)
    check(conv, dtype, "cpu")


@pytest.mark.emulated
def test_other_architectures_run_other_kernels(kernels):  # noqa: F811
    conv = PATHS["3x3"]
    for capability in (80, 89, 100, 120):
        kernels.set_options(compute_capability=capability)
        assert counted(kernels, backward, conv, *operands(conv, BF16, "cpu")) == (0, 0)


@pytest.mark.emulated
@pytest.mark.parametrize(
    "name, multiprocessors",
    [
        ("3x3", 2),
        ("3x3", 8),
        ("256 filters", 1),
        ("128 filters, tails of channels and filters", 4),
        ("1x1", 3),
        ("small images, places to fill up", 1),
        ("3x3, stride 2", 2),
    ],
)
def test_the_model_counts_what_is_run(name, multiprocessors, kernels):  # noqa: F811
    conv = PATHS[name]
    conv_counters.library().control.set_options(multiprocessors=multiprocessors)
    kernels.set_options(multiprocessors=multiprocessors)
    planned = model(conv)
    found = counted(kernels, backward, conv, *operands(conv, BF16, "cpu"))
    assert found == (planned.products, planned.loads)
    check(conv, BF16, "cpu")


def overhangs(places: int, taps: int, stride: int, padding: int, dilation: int, length: int, box: int) -> bool:
    """Whether a box leaves the output over pixels that are there."""
    beyond = range(places, -(-places // box) * box)
    return any(0 <= place * stride - padding + tap * dilation < length for place in beyond for tap in range(taps))


@pytest.mark.emulated
def test_plans_of_large_shapes():
    """No kernel runs."""
    conv_counters.library().control.set_options(multiprocessors=132)
    draw = random.Random(3)
    served, tiles = 0, set()
    for _ in range(pick([2000], [500])[0]):
        pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
        window = pair(1, 2, 3, 3, 5, 7), pair(1, 1, 2, 3), pair(0, 1, 3), pair(1, 1, 2)
        size = pair(1, 5, 7, 13, 14, 28, 37, 56, 113)
        conv = Conv(draw.choice([1, 5, 32, 256]), draw.choice([64, 104]), size, draw.choice([64, 136, 512]), *window)
        if min(conv.conv_size) < 1:
            continue
        found = model(conv)
        if found.tile < 0:
            continue
        served += 1
        tiles.add(found.tile)
        box = found.box_w * found.box_h * found.box_images
        places = conv.images * conv.conv_size[0] * conv.conv_size[1]
        assert box <= PLACES and found.steps * box >= places and 1 <= found.parts <= found.steps, conv
        if conv.kernel == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
            continue  # one line of all places
        axes = zip(conv.conv_size, conv.kernel, *conv.window, conv.size, (found.box_h, found.box_w), strict=True)
        assert not any(overhangs(*axis) for axis in axes), conv
    assert served > 100 and tiles == {0, 1, 2, 3}


@pytest.mark.emulated
def test_resnet_is_served():
    """All its convolutions but the stem."""
    conv_counters.library().control.set_options(multiprocessors=132)
    for shape in benchmark.SHAPES["cuda"]:
        images, channels, groups = shape[0], shape[1], shape[-1]
        if images in (32, 256) and groups == 1 and channels >= 32:
            assert conv_counters.hopper_weight(conv_counters.conv_shape(shape)).tile >= 0, shape


@pytest.mark.parametrize("filters", [64, 128, 256])
def test_rings_go_round_many_times(filters, device, kernels):  # noqa: F811
    """More steps than stages in a part, and a last part that is shorter."""
    if kernels:
        kernels.set_options(multiprocessors=1)
    check(Conv(2, 64, (24, 16), filters, (1, 2), padding=(0, 1), stride=(1, 2)), F16, device)


@pytest.mark.parametrize("how", ["odd offset", "cut out of wider channels", "every other pixel", "transposed"])
def test_any_strides(how, device, kernels):  # noqa: F811
    """Those a tensor map takes are read as they lie, the others by other kernels or from copies."""
    conv = Conv(2, 64, (8, 8), 64, (3, 3), padding=(1, 1))
    grad, x = operands(conv, BF16, device)
    expected = backward(conv, grad, x)
    for moved in ((strided(grad, how), x), (grad, strided(x, how))):
        found = backward(conv, *moved)
        if how == "odd offset":  # the order of sums is another
            truth = weight_gradient(conv, grad.double(), x.double())
            numerics.assert_close("grad_weight", found[0], weight_gradient(conv, grad, x), truth)
        else:
            assert all(map(torch.equal, found, expected))
        if kernels:
            assert (counted(kernels, backward, conv, *moved)[0] > 0) == (how != "odd offset")


def test_expanded_operands(device):
    """Strides of 0 that mean something."""
    conv = Conv(3, 64, (8, 8), 64, (3, 3), padding=(1, 1))
    grad, x = operands(conv, BF16, device)
    grad, x = grad[:1].expand_as(grad), x[:1].expand_as(x)
    truth = weight_gradient(conv, grad.double(), x.double())
    numerics.assert_close("grad_weight", backward(conv, grad, x)[0], weight_gradient(conv, grad, x), truth)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_nan_stays_with_the_taps_that_meet_it(stride, device):
    """The last line and column lie under second taps alone, and under places beyond the output, which no box has."""
    conv = Conv(2, 64, (9 * stride + 1, 16 * stride + 1), 64, (2, 2), stride=(stride, stride))
    grad, x = operands(conv, BF16, device)
    clean = backward(conv, grad, x)[0]
    x[1, 3, -1], x[1, 3, :, -1] = float("nan"), float("nan")
    grad_weight = backward(conv, grad, x)[0]
    wanted = torch.zeros(conv.weight_shape, dtype=torch.bool, device=device)
    if stride == 1:
        wanted[:, 3] = torch.tensor([[False, True], [True, True]])
    assert torch.equal(grad_weight.isnan(), wanted)
    assert torch.equal(grad_weight[~wanted], clean[~wanted])


@pytest.mark.parametrize("name", ["3x3, stride 2", "small images, places to fill up"])
def test_equal_inputs_give_equal_bits(name, device, kernels):  # noqa: F811
    """Under any schedule of the threads, and whenever copies and products take effect."""
    conv = PATHS[name]
    grad, x = operands(conv, BF16, device)
    first = None
    for schedule in kernels.schedules(seeds=2) if kernels else [{}] * 3:
        if kernels:
            kernels.set_options(**schedule)
        results = backward(conv, grad, x)
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.emulated
def test_images_more_than_two_to_the_31_elements_apart(kernels):  # noqa: F811
    """Address space that is reserved and never touched but for two images of it."""
    conv = Conv(2, 64, (8, 4), 64, (3, 3), padding=(1, 1))
    grad, x = operands(conv, BF16, "cpu")
    near = backward(conv, grad, x)[0]
    distance = (1 << 31) + 8
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    size = 2 * (distance + x[0].numel())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        buffer = (ctypes.c_char * size).from_buffer(memory)
        storage = torch.frombuffer(buffer, dtype=BF16, count=size // 2)
        far = storage.as_strided(x.shape, (distance, *x.stride()[1:])).copy_(x)
        assert torch.equal(backward(conv, grad, far)[0], near)
        assert counted(kernels, backward, conv, grad, far)[0] > 0
        del storage, buffer, far


GEOMETRIES = {
    "3x3 by 2": (conv2d, F.conv2d, (2, 64, 16, 16), (64, 64, 3, 3), dict(stride=2, padding=1)),
    "1x1": (conv2d, F.conv2d, (1, 128, 8, 16), (64, 128, 1, 1), {}),
    "dilated": (conv2d, F.conv2d, (1, 64, 8, 8), (72, 64, 3, 3), dict(padding=2, dilation=2)),
    "one dimension": (conv1d, F.conv1d, (2, 64, 64), (64, 64, 5), dict(padding=2)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_public_op(name, device, kernels):  # noqa: F811
    op, function, image, weight, arguments = GEOMETRIES[name]
    inputs = [randn(*image, dtype=BF16, device=device), randn(*weight, dtype=BF16, device=device, seed=1, scale=0.05)]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, randn(weight[0], dtype=BF16, device=device, seed=2))]

    def fused(*tensors):
        with bigkern.use_backend("cuda"):
            return op(*tensors, **arguments, activation="relu")

    numerics.check(fused, lambda *tensors: function(*tensors, **arguments).relu(), inputs)
    if kernels:
        output = fused(inputs[0].detach(), *inputs[1:])
        assert counted(kernels, output.sum().backward)[0] > 0


SMALL = {
    "1x3, places to fill up": Conv(1, 64, (7, 8), 64, (1, 3), padding=(0, 1)),
    "stride 2": Conv(2, 64, (8, 16), 64, (2, 1), (2, 2), bias=False),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("name", SMALL)
def test_small(name, device, kernels):  # noqa: F811
    """Small enough for the race checker and AddressSanitizer."""
    turn = list(SMALL).index(name)
    check(SMALL[name], (BF16, F16)[turn % 2], device, channels_last=turn % 2 == 0)
    if kernels:
        assert counted(kernels, backward, SMALL[name], *operands(SMALL[name], BF16, device))[0] > 0
