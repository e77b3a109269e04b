"""The convolution kernels, called as raw ops: every path of the launchers, against torch in float64.

On the CPU these are the emulated kernels, on a GPU the compiled ones.  The public op has tests of its own.  Each stage
is judged by what it was given: gradients by the kernels' own output, argmax and gradient of the convolution.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.conv import _cuda
from bigkern.ops.conv._schema import ACTIVATIONS, conv_size, pooled_size
from tests.conftest import pick
from tests.numerics import assert_close, uninitialised_memory_is_nan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
TF32_EPS = 2.0**-11


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU so small that a few tiles keep it busy: 2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield None
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=2)
    yield emulator
    emulator.set_options(**options)


@dataclass(frozen=True)
class Conv:
    images: int
    channels: int
    size: tuple[int, int]
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: int = 0
    pool: tuple[int, ...] = ()
    bias: bool = True

    @property
    def window(self):
        return self.stride, self.padding, self.dilation

    @property
    def conv_size(self):
        return conv_size(self.size, self.kernel, *self.window)

    @property
    def weight_shape(self):
        return self.filters, self.channels // self.groups, *self.kernel


def randn(*shape, dtype=F32, device="cpu", seed=0, scale=1.0, channels_last=False):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    tensor = (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def operands(conv: Conv, dtype, device, channels_last=True) -> tuple[Tensor, Tensor, Tensor | None]:
    how = dict(dtype=dtype, device=device, channels_last=channels_last)
    scale = (conv.channels // conv.groups * conv.kernel[0] * conv.kernel[1]) ** -0.5
    return (
        randn(conv.images, conv.channels, *conv.size, **how),
        randn(*conv.weight_shape, seed=1, scale=scale, **how),
        randn(conv.filters, dtype=dtype, device=device, seed=2) if conv.bias else None,
    )


def activate(x: Tensor, activation: int) -> Tensor:
    name = ACTIVATIONS[activation]
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x if name is None else getattr(F, name)(x)


def convolve(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The activation of the convolution, and the pool's result (the same without one)."""
    activated = activate(F.conv2d(x, weight, bias, *conv.window, conv.groups), conv.activation)
    return activated, F.max_pool2d(activated, *_pairs(conv.pool)) if conv.pool else activated


def _pairs(pool):
    return pool[:2], pool[2:4], pool[4:]


def forward(conv: Conv, x, weight, bias, channels_last, tf32=False, need_backward=True):
    arguments = (x, weight, bias, *conv.window, conv.groups, conv.activation, conv.pool, tf32)
    return _cuda.forward(*arguments, channels_last, need_backward)


def input_gradient(conv: Conv, grad: Tensor, weight: Tensor) -> Tensor:
    shape = (conv.images, conv.channels, *conv.size)
    return torch.nn.grad.conv2d_input(shape, weight, grad, *conv.window, conv.groups)


def weight_gradient(conv: Conv, grad: Tensor, x: Tensor) -> Tensor:
    return torch.nn.grad.conv2d_weight(x, conv.weight_shape, grad, *conv.window, conv.groups)


def argmax_in_image(conv: Conv, argmax: Tensor) -> Tensor:
    """The kernels' place in a window as an index into the convolution's P x Q."""
    (kernel, stride, padding), (_, width) = _pairs(conv.pool), conv.conv_size
    rows = torch.arange(argmax.shape[2], device=argmax.device).view(-1, 1) * stride[0] - padding[0]
    columns = torch.arange(argmax.shape[3], device=argmax.device) * stride[1] - padding[1]
    place = argmax.long()
    return (rows + place // kernel[1]) * width + columns + place % kernel[1]


def undo_epilogue(conv: Conv, grad: Tensor, output: Tensor, preactivation: Tensor, argmax: Tensor) -> Tensor:
    """What conv_backward_epilogue computes, in torch's operators and the dtype of its arguments."""
    if ACTIVATIONS[conv.activation] == "relu":
        grad = torch.where(output <= 0, 0, grad)
    elif conv.activation:
        leaf = preactivation.detach().requires_grad_()
        (grad,) = torch.autograd.grad(activate(leaf, conv.activation), leaf, grad)
    if not conv.pool:
        return grad
    spread = grad.new_zeros(*grad.shape[:2], conv.conv_size[0] * conv.conv_size[1])
    spread.scatter_add_(2, argmax_in_image(conv, argmax).flatten(2), grad.flatten(2))
    return spread.view(*grad.shape[:2], *conv.conv_size)


def check(conv: Conv, dtype, device, channels_last=True, weight_channels_last=None, tf32=False):
    """Forward and every gradient by the error rule of tests/numerics.py."""
    x, weight, bias = operands(conv, dtype, device, channels_last)
    if weight_channels_last is not None and weight_channels_last != channels_last:
        weight = weight.contiguous(
            memory_format=torch.channels_last if weight_channels_last else torch.contiguous_format
        )
    check_tensors(conv, x, weight, bias, channels_last, tf32)


def check_tensors(conv: Conv, x, weight, bias, channels_last=True, tf32=False):
    assert _cuda.unsupported(x, weight, bias, *conv.window, conv.groups, None, conv.pool) is None

    def compare(name: str, actual: Tensor, function, *arguments: Tensor | None):
        double = [None if argument is None else argument.double() for argument in arguments]
        if not tf32:
            assert_close(name, actual, function(*arguments), function(*double))
            return
        # Operands of k products rounded to 11 bits each: the sum of the errors' magnitudes bounds the error.
        magnitudes = function(*(None if argument is None else argument.abs() for argument in double))
        assert ((actual - function(*double)).abs() <= 2.5 * TF32_EPS * magnitudes).all(), name

    def memory_format(tensor: Tensor, last: bool):
        assert tensor.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    with uninitialised_memory_is_nan():
        output, preactivation, argmax = forward(conv, x, weight, bias, channels_last, tf32)
    size = pooled_size(conv.conv_size, conv.pool)
    assert output.shape == (conv.images, conv.filters, *size) and output.dtype == x.dtype
    memory_format(output, channels_last)
    compare("output", output, lambda *t: convolve(conv, *t)[1], x, weight, bias)
    keeps = ACTIVATIONS[conv.activation] not in (None, "relu")
    assert preactivation.shape == (output.shape if keeps else (0,))
    assert argmax.shape == (output.shape if conv.pool else (0,)) and argmax.dtype == torch.uint8
    if conv.pool:
        activated, pooled = convolve(conv, *(None if t is None else t.double() for t in (x, weight, bias)))
        found = activated.flatten(2).gather(2, argmax_in_image(conv, argmax).flatten(2)).view(output.shape)
        tolerance = 4 * TF32_EPS if tf32 else 2 * torch.finfo(x.dtype).eps + 2e-6
        assert ((pooled - found).abs() <= tolerance * pooled.abs().max().clamp(min=1)).all()

    grad = randn(*output.shape, dtype=x.dtype, device=x.device, seed=3, channels_last=channels_last)
    with uninitialised_memory_is_nan():
        if conv.activation or conv.pool:
            saved = (output, preactivation, argmax)
            grad_conv = _cuda.backward_epilogue(grad, *saved, conv.conv_size, conv.activation, conv.pool)
        else:
            grad_conv = grad
        grad_input = _cuda.backward_input(grad_conv, weight, conv.size, *conv.window, conv.groups, tf32, channels_last)
        grad_weight, grad_bias = _cuda.backward_weight(
            grad_conv, x, conv.kernel, *conv.window, conv.groups, tf32, channels_last, True
        )
    if conv.activation or conv.pool:
        memory_format(grad_conv, True)
        torch_result = undo_epilogue(conv, grad, *saved)
        truth = undo_epilogue(conv, grad.double(), output.double(), preactivation.double(), argmax)
        assert_close("grad_conv", grad_conv, torch_result, truth)
    memory_format(grad_input, channels_last)
    memory_format(grad_weight, channels_last)
    compare("grad_input", grad_input, lambda *t: input_gradient(conv, *t), grad_conv, weight)
    compare("grad_weight", grad_weight, lambda *t: weight_gradient(conv, *t), grad_conv, x)
    assert_close("grad_bias", grad_bias, grad_conv.sum((0, 2, 3)), grad_conv.double().sum((0, 2, 3)))
    return output, argmax, grad_conv, grad_input, grad_weight, grad_bias


# What each launcher chooses between; the names say what a case is there for.
PATHS = {
    "64x64 tile": Conv(1, 8, (5, 5), 24, (3, 3), padding=(1, 1)),
    "128x64 tile": Conv(3, 8, (10, 9), 40, (3, 3), padding=(1, 1)),
    "128x128 tile": Conv(2, 16, (12, 12), 136, (1, 1)),
    "several steps of k, with a tail": Conv(1, 40, (6, 5), 16, (3, 3), padding=(1, 1)),
    "channels of single elements": Conv(2, 5, (7, 6), 11, (3, 3), padding=(1, 1)),
    "stem": Conv(1, 3, (13, 15), 16, (7, 7), stride=(2, 2), padding=(3, 3)),
    "one channel": Conv(2, 1, (9, 9), 8, (5, 5)),
    "1x1": Conv(2, 16, (5, 7), 8, (1, 1)),
    "1x1, stride 2: places without a tap": Conv(1, 8, (7, 6), 8, (1, 1), stride=(2, 2)),
    "stride 3, more than the kernel": Conv(1, 8, (11, 10), 8, (2, 2), stride=(3, 3)),
    "stride and dilation with a common factor": Conv(1, 8, (12, 13), 8, (3, 3), (2, 4), (2, 3), (2, 2)),
    "stride and dilation without": Conv(1, 8, (12, 13), 8, (3, 2), (2, 3), (1, 2), (3, 2)),
    "padding beyond the image": Conv(1, 8, (2, 3), 8, (3, 3), padding=(4, 3)),
    "kernel as large as the image": Conv(2, 8, (4, 6), 8, (4, 6)),
    "wide kernel": Conv(1, 8, (1, 40), 8, (1, 33), padding=(0, 16)),
    "groups of chunks": Conv(2, 24, (5, 5), 48, (3, 3), padding=(1, 1), groups=3),
    "groups of single elements": Conv(1, 9, (5, 6), 6, (3, 2), groups=3),
    "filters a channel": Conv(1, 4, (6, 6), 12, (3, 3), padding=(1, 1), groups=4),
    "depthwise": Conv(2, 16, (7, 9), 16, (3, 3), padding=(1, 1), groups=16),
    "depthwise, stride 2": Conv(1, 8, (9, 10), 8, (3, 3), stride=(2, 2), padding=(1, 1), groups=8),
    "depthwise, single channels": Conv(1, 7, (6, 5), 7, (3, 3), padding=(1, 1), groups=7),
    "depthwise, 5x4 taps apart": Conv(1, 8, (12, 13), 8, (5, 4), (1, 2), (3, 2), (2, 2), groups=8),
    "depthwise, many channels": Conv(1, 132, (3, 4), 132, (3, 3), padding=(1, 1), groups=132),
    "many places: parts of the weight gradient": Conv(3, 8, (19, 18), 8, (3, 3), padding=(1, 1)),
    "no bias": Conv(1, 8, (4, 4), 8, (3, 3), bias=False),
    "one place": Conv(1, 8, (3, 3), 8, (3, 3)),
}
POOLS = {
    "windows": Conv(2, 8, (8, 8), 16, (3, 3), padding=(1, 1), activation=1, pool=(2, 2, 2, 2, 0, 0)),
    "windows with a rest": Conv(1, 8, (9, 7), 8, (3, 3), padding=(1, 1), activation=2, pool=(2, 3, 2, 3, 0, 0)),
    "windows with gaps": Conv(1, 8, (9, 9), 8, (2, 2), activation=3, pool=(2, 2, 3, 3, 0, 0)),
    "box": Conv(2, 8, (15, 15), 8, (3, 3), padding=(1, 1), activation=1, pool=(3, 3, 2, 2, 1, 1)),
    "boxes with halos": Conv(1, 8, (21, 17), 72, (3, 3), padding=(1, 1), activation=4, pool=(3, 2, 1, 1, 1, 1)),
    "box of single elements": Conv(1, 3, (16, 14), 20, (5, 5), (2, 2), (2, 2), activation=2, pool=(3, 3, 2, 2, 1, 1)),
    "pass of its own": Conv(1, 8, (20, 20), 8, (3, 3), activation=1, pool=(9, 9, 3, 3, 4, 4)),
    "pass of its own, single elements": Conv(1, 8, (14, 14), 5, (1, 1), activation=4, pool=(13, 12, 1, 1, 0, 0)),
    "window larger than a tile": Conv(1, 8, (15, 15), 8, (1, 1), activation=3, pool=(15, 15, 15, 15, 0, 0)),
    "depthwise": Conv(1, 8, (8, 8), 8, (3, 3), padding=(1, 1), groups=8, activation=2, pool=(2, 2, 2, 2, 0, 0)),
    "without an activation": Conv(1, 8, (7, 8), 8, (3, 3), pool=(2, 2, 2, 2, 1, 1)),
    "one dimension": Conv(2, 8, (1, 20), 8, (1, 3), activation=1, pool=(1, 2, 1, 2, 0, 0)),
}


def cases(named, dtypes):
    """Every case in every dtype; in the small selection the dtypes and layouts take turns."""
    turns = [(name, dtypes[i % len(dtypes)], i // 2 % 2 == 0) for i, name in enumerate(named)]
    return pick([(name, dtype, last) for name in named for dtype in dtypes for last in (True, False)], turns)


@pytest.mark.parametrize("name, dtype, channels_last", cases(PATHS, DTYPES), ids=str)
def test_paths(name, dtype, channels_last, device):
    check(PATHS[name], dtype, device, channels_last)


@pytest.mark.parametrize("name, dtype, channels_last", cases(POOLS, [BF16, F32, F16]), ids=str)
def test_pools(name, dtype, channels_last, device):
    check(POOLS[name], dtype, device, channels_last)


@pytest.mark.parametrize("name", pick(PATHS, ["128x64 tile", "128x128 tile", "channels of single elements"]))
def test_tf32(name, device):
    check(PATHS[name], F32, device, tf32=True)


def test_fp32_is_fp32(device):
    """Without tf32 the products keep every bit that TF32 would drop."""
    conv = Conv(1, 8, (4, 4), 8, (1, 1), bias=False)
    x, weight, _ = operands(conv, F32, device)
    exact = F.conv2d(x.double(), weight.double())
    errors = [(forward(conv, x, weight, None, True, tf32)[0] - exact).abs().max() for tf32 in (False, True)]
    assert errors[0] < 1e-6 < 1e-5 < errors[1]


def generated(count: int) -> list[tuple]:
    """(convolution, dtype, layouts of input and weight): shapes drawn small, every argument free."""
    draw = random.Random(7)
    found = []
    while len(found) < count:
        groups = draw.choice([1, 1, 1, 2, 3, 8])
        channels, filters = (draw.choice([1, 2, 3, 4, 8, 8, 16, 20]) for _ in range(2))
        if draw.random() < 0.15:
            channels = filters = 1
            groups = draw.choice([4, 8, 9, 24])
        pair = lambda *values: (draw.choice(values), draw.choice(values))  # noqa: E731
        kernel, size = pair(1, 2, 3, 3, 5), pair(1, 4, 7, 8, 11)
        conv = Conv(
            draw.choice([1, 2, 3]),
            channels * groups,
            size,
            filters * groups,
            kernel,
            pair(1, 1, 2, 3),
            pair(0, 1, 2),
            pair(1, 1, 2, 3),
            groups,
            draw.randrange(5),
            (),
            draw.random() < 0.7,
        )
        if draw.random() < 0.4:
            window = pair(1, 2, 3)
            padding = tuple(draw.randint(0, extent // 2) for extent in window)
            conv = replace(conv, pool=(*window, *pair(1, 2, 3), *padding))
        if min(conv.conv_size) < 1 or min(pooled_size(conv.conv_size, conv.pool)) < 1:
            continue
        found.append((conv, draw.choice(DTYPES), draw.random() < 0.6, draw.random() < 0.6))
    return found


GENERATED = generated(320)


@pytest.mark.parametrize("index", pick(range(len(GENERATED)), range(24)))
def test_generated(index, device):
    check(*GENERATED[index][:2], device, *GENERATED[index][2:])


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values, laid out so that no layout of torch's fits."""
    images, channels, height, width = tensor.shape
    if how == "odd offset":
        storage = tensor.new_empty(tensor.numel() + 1)
        return storage[1:].view(images, height, width, channels).permute(0, 3, 1, 2).copy_(tensor)
    if how == "cut out of wider channels":
        return tensor.new_empty(images, height, width, channels + 8).permute(0, 3, 1, 2)[:, :channels].copy_(tensor)
    if how == "cut out of a larger image":
        large = tensor.new_empty(images, channels, height + 2, width + 3)
        return large[:, :, 1:-1, 1:-2].copy_(tensor)
    if how == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    assert how == "every other pixel"
    return tensor.new_empty(images, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)[:, :, ::2, ::2].copy_(tensor)


@pytest.mark.parametrize(
    "how",
    ["odd offset", "cut out of wider channels", "cut out of a larger image", "transposed", "every other pixel"],
)
def test_any_strides(how, device):
    for conv in (
        Conv(2, 8, (6, 5), 8, (3, 3), padding=(1, 1), activation=2, pool=(2, 2, 2, 2, 0, 0)),
        Conv(2, 8, (6, 5), 8, (3, 3), padding=(1, 1), groups=8),
    ):
        x, weight, bias = operands(conv, BF16, device)
        expected = check_tensors(conv, x, weight, bias)
        found = check_tensors(conv, strided(x, how), strided(weight, how), bias)
        assert all(map(torch.equal, expected, found))
        output, preactivation, argmax = forward(conv, x, weight, bias, True)
        grad = randn(*output.shape, dtype=BF16, device=device, seed=3)
        if conv.pool:
            saved = [strided(t, how) for t in (grad, output, preactivation, argmax)]
            grad_conv = _cuda.backward_epilogue(*saved, conv.conv_size, conv.activation, conv.pool)
            assert torch.equal(grad_conv, expected[2])
        grad_conv = strided(expected[2], how)
        arguments = (*conv.window, conv.groups, False, True)
        assert torch.equal(_cuda.backward_input(grad_conv, strided(weight, how), conv.size, *arguments), expected[3])
        grads = _cuda.backward_weight(grad_conv, strided(x, how), conv.kernel, *arguments, True)
        assert all(map(torch.equal, grads, expected[4:]))


def test_expanded_tensors(device):
    """Strides of 0: one image or one channel repeated."""
    conv = Conv(3, 8, (5, 5), 8, (3, 3))
    x, weight, bias = operands(conv, F32, device)
    for repeated in (x[:1].expand_as(x), x[:, :1].expand_as(x)):
        check_tensors(conv, repeated, weight, bias)
        check_tensors(conv, repeated, weight, bias, channels_last=False)


@pytest.mark.parametrize("name", ["windows", "box", "pass of its own"])
def test_maxima_of_equal_and_of_no_numbers(name, device):
    """The first of equal maxima, the last NaN, as torch; padding never wins, not even over -inf."""
    conv = replace(POOLS[name], activation=0, channels=8, filters=8, kernel=(1, 1), padding=(0, 0), bias=False)
    weight = torch.eye(8, device=device).view(8, 8, 1, 1)
    base = torch.randint(-2, 3, (conv.images, 8, *conv.size), generator=torch.Generator().manual_seed(1)).float()
    # A product with a NaN or an infinity elsewhere in its sum would be NaN: one value fills all channels of a place.
    for value in (None, float("nan")):
        x = base.clone()
        if value is not None:
            x[torch.rand(conv.images, 1, *conv.size).expand_as(x) < 0.1] = value
        output, _, argmax = forward(conv, x.to(device), weight, None, True)
        expected, indices = F.max_pool2d(x, *_pairs(conv.pool), return_indices=True)
        assert torch.equal(output.cpu().nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
        assert torch.equal(argmax_in_image(conv, argmax).cpu(), indices)
    low = torch.full_like(base, -float("inf")).to(device)
    output, _, argmax = forward(replace(conv, channels=1, filters=1), low[:, :1], weight[:1, :1], None, True)
    assert (output == -float("inf")).all()
    size = torch.tensor(conv.conv_size).prod()
    assert (argmax_in_image(conv, argmax) >= 0).all() and (argmax_in_image(conv, argmax) < size).all()


@pytest.mark.parametrize("activation", range(1, 5))
def test_a_nan_stays_where_it_is(activation, device):
    conv = Conv(2, 8, (6, 6), 8, (3, 3), padding=(1, 1), activation=activation)
    x, weight, bias = operands(conv, F32, device)
    clean = forward(conv, x, weight, bias, True)[0]
    x[1, 3, 2, 2] = float("nan")
    output = forward(conv, x, weight, bias, True)[0]
    reached = torch.zeros(2, 8, 6, 6, dtype=torch.bool, device=device)
    reached[1, :, 1:4, 1:4] = True
    assert torch.equal(output.isnan(), reached)
    assert torch.equal(output[~reached], clean[~reached])


def test_without_backward_nothing_is_kept(device):
    conv = POOLS["windows with a rest"]
    x, weight, bias = operands(conv, F32, device)
    output, preactivation, argmax = forward(conv, x, weight, bias, True, need_backward=False)
    assert preactivation.shape == argmax.shape == (0,) and argmax.dtype == torch.uint8
    assert torch.equal(output, forward(conv, x, weight, bias, True)[0])


def test_bias_gradient_only_where_asked(device):
    conv = PATHS["depthwise"]
    x, weight, bias = operands(conv, F32, device)
    output = forward(conv, x, weight, bias, True)[0]
    grads = _cuda.backward_weight(output, x, conv.kernel, *conv.window, conv.groups, False, True, False)
    assert grads[1].shape == (0,)


@pytest.mark.parametrize(
    "name",
    [
        "several steps of k, with a tail",
        "channels of single elements",
        "depthwise",
        "many places: parts of the weight gradient",
    ],
)
def test_equal_inputs_give_equal_bits(name, device, kernels):
    """Under any schedule of the threads."""
    conv = replace(PATHS[name], activation=4, pool=(2, 2, 2, 2, 0, 0))
    x, weight, bias = operands(conv, BF16, device)
    first = None
    for schedule in kernels.schedules(seeds=1) if kernels else [{}] * 3:
        if kernels:
            kernels.set_options(**schedule)
        saved = forward(conv, x, weight, bias, True)
        grad_conv = _cuda.backward_epilogue(saved[0], *saved, conv.conv_size, conv.activation, conv.pool)
        arguments = (*conv.window, conv.groups, False, True)
        grad_input = _cuda.backward_input(grad_conv, weight, conv.size, *arguments)
        grads = _cuda.backward_weight(grad_conv, x, conv.kernel, *arguments, True)
        results = (*saved, grad_conv, grad_input, *grads)
        first = first or results
        assert all(map(torch.equal, results, first))


SMALL = {
    "chunks, box": Conv(1, 8, (6, 6), 8, (3, 3), padding=(1, 1), activation=1, pool=(3, 3, 2, 2, 1, 1)),
    "chunks, steps": Conv(1, 24, (4, 4), 8, (3, 3), stride=(2, 2), padding=(1, 1)),
    "single elements, windows": Conv(1, 3, (6, 6), 5, (3, 3), padding=(1, 1), activation=2, pool=(2, 2, 2, 2, 0, 0)),
    "depthwise": Conv(1, 8, (5, 6), 8, (3, 3), padding=(1, 1), groups=8, activation=4),
    "depthwise, stride 2, pool": Conv(1, 5, (6, 7), 5, (3, 2), (2, 2), (1, 1), groups=5, pool=(2, 2, 1, 1, 1, 1)),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("name", SMALL)
def test_small(name, device):
    """One case for every kernel, small enough for the race checker and AddressSanitizer."""
    turn = list(SMALL).index(name)
    check(SMALL[name], DTYPES[turn % 3], device, channels_last=turn % 2 == 0)


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize(
    ("pool", "dtype"), [((), BF16), ((2, 2, 2, 2, 0, 0), BF16), ((), F32)], ids=["plain", "pooled", "TF32"]
)
def test_shared_memory_without_bank_conflicts(pool, dtype, device, kernels):
    """The main path: copies into the ring, ldmatrix; in the race build, the tile of results and the epilogue too."""
    conv = Conv(1, 64, (8, 8), 64, (3, 3), padding=(1, 1), activation=1, pool=pool)
    x, weight, bias = operands(conv, dtype, device, channels_last=True)
    kernels.set_options(bank_conflicts=True)
    kernels.reset_counters()
    forward(conv, x, weight, bias, channels_last=True, tf32=True)
    counted = kernels.counters()
    kernels.set_options(bank_conflicts=False)
    assert counted["shared_load_wavefronts"] > 0 and counted["shared_store_wavefronts"] > 0
    assert counted["bank_conflict_places"] == []


@pytest.mark.emulated
@pytest.mark.parametrize(
    "conv",
    [
        Conv(2, 8, (5, 5), 16, (3, 3), padding=(1, 1), activation=1),
        Conv(2, 8, (4, 5), 8, (3, 3), padding=(1, 1), groups=8, activation=1),
        Conv(2, 8, (5, 4), 7, (3, 3), activation=1),
    ],
    ids=["chunks", "depthwise", "single elements"],
)
def test_images_more_than_two_to_the_31_elements_apart(conv):
    """Address space that is reserved and never touched but for two images of it."""
    x, weight, bias = operands(conv, BF16, "cpu")
    distance = (1 << 31) + 8
    output, *_ = near = forward(conv, x, weight, bias, True)
    grad = randn(*output.shape, dtype=BF16, seed=3, channels_last=True)
    grad_conv = _cuda.backward_epilogue(grad, *near, conv.conv_size, 1, ())
    rest = (*conv.window, conv.groups, False, True)
    grad_input = _cuda.backward_input(grad_conv, weight, conv.size, *rest)
    grads = _cuda.backward_weight(grad_conv, x, conv.kernel, *rest, True)

    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    size = 2 * (distance + x[0].numel() + output[0].numel())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        buffer = (ctypes.c_char * size).from_buffer(memory)
        storage = torch.frombuffer(buffer, dtype=BF16, count=size // 2)

        def far(tensor, storage=storage):
            return storage.as_strided(tensor.shape, (distance, *tensor.stride()[1:])).copy_(tensor)

        assert all(map(torch.equal, forward(conv, far(x), weight, bias, True), near))
        found = _cuda.backward_weight(grad_conv, far(x), conv.kernel, *rest, True)
        assert all(map(torch.equal, found, grads))
        assert torch.equal(_cuda.backward_input(far(grad_conv), weight, conv.size, *rest), grad_input)
        assert torch.equal(_cuda.backward_epilogue(far(grad), *near, conv.conv_size, 1, ()), grad_conv)
        del storage, buffer, far


def test_no_images(device):
    conv = Conv(0, 8, (5, 5), 8, (3, 3), activation=2, pool=(2, 2, 2, 2, 0, 0))
    x, weight, bias = operands(conv, F32, device)
    output, preactivation, argmax = forward(conv, x, weight, bias, True)
    assert output.shape == preactivation.shape == argmax.shape == (0, 8, 1, 1)
    grad_conv = _cuda.backward_epilogue(output, output, preactivation, argmax, (3, 3), 2, conv.pool)
    assert grad_conv.shape == (0, 8, 3, 3)
    assert _cuda.backward_input(grad_conv, weight, (5, 5), *conv.window, 1, False, True).shape == x.shape
    grads = _cuda.backward_weight(grad_conv, x, (3, 3), *conv.window, 1, False, True, True)
    assert torch.equal(grads[0], torch.zeros_like(weight)) and torch.equal(grads[1], torch.zeros_like(bias))


def test_refusals_name_the_argument(device):
    """Raw ops check what keeps a kernel inside its tensors."""
    conv = Conv(1, 8, (5, 5), 4, (3, 3), activation=2, pool=(2, 2, 2, 2, 0, 0))
    x, weight, bias = operands(conv, F32, device)
    names = "input weight bias stride padding dilation groups activation max_pool tf32 channels_last need_backward"
    values = (x, weight, bias, *conv.window, 1, 2, conv.pool, False, True, True)
    good = dict(zip(names.split(), values, strict=True))
    bad = {
        "input": [(x[0], "input .* expected four dimensions"), (x.double(), "weight is Float.*expected Double")],
        "weight": [
            (weight[0], "weight .* expected four dimensions"),
            (weight.half(), "weight is Half.*expected Float"),
            (weight[:, :4], "8 channels in 1 groups"),
            (weight.repeat(1, 1, 3, 1), "output height is 0"),
        ],
        "bias": [(bias[:3], r"bias .*expected a contiguous Float \[4\]"), (bias.half(), "bias is Half")],
        "stride": [([1], "stride has 1 values"), ([0, 1], "stride is 0"), ([1, 2**31], "stride is 2147483648")],
        "padding": [([-1, 0], "padding is -1")],
        "dilation": [([0, 1], "dilation is 0"), ([1, 2**30], "output width is 0")],
        "groups": [(3, "channels in 3 groups"), (0, "groups is 0")],
        "activation": [(5, "activation is 5")],
        "max_pool": [
            ((2, 2, 2, 2), "max_pool has 4 values"),
            ((2, 2, 0, 2, 0, 0), "max_pool stride is 0"),
            ((2, 2, 2, 2, 2, 0), "max_pool padding is 2, 0"),
            ((4, 2, 2, 2, 0, 0), "pooled height is 0"),
            ((16, 16, 2, 2, 8, 8), "windows of 256 places"),
        ],
    }
    for name, faults in bad.items():
        for value, message in faults:
            with pytest.raises(RuntimeError, match=message):
                torch.ops.bigkern_cuda.conv_forward(**{**good, name: value})
    like = torch.empty(1, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    for residual, message in (
        (like[:, :3], r"residual is .*expected Float"),
        (like.half(), r"residual is .*expected Float"),
        (like[:1, :1].expand(like.shape), "residual is .*with gaps"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.bigkern_cuda.conv_forward(**{**good, "max_pool": ()}, residual=residual)
    with pytest.raises(RuntimeError, match="residual with max_pool"):
        torch.ops.bigkern_cuda.conv_forward(**good, residual=like)
    output, preactivation, argmax = forward(conv, x, weight, bias, True)
    epilogue = torch.ops.bigkern_cuda.conv_backward_epilogue
    with pytest.raises(RuntimeError, match=r"preactivation is .*expected Float"):
        epilogue(output, output, preactivation[:, :1], argmax, (3, 3), 2, conv.pool)
    with pytest.raises(RuntimeError, match=r"argmax is .*expected Byte"):
        epilogue(output, output, preactivation, output, (3, 3), 2, conv.pool)
    with pytest.raises(RuntimeError, match=r"grad_output is .*expected the size 2 x 2"):
        epilogue(output, output, preactivation, argmax, (4, 4), 2, conv.pool)
    grad_conv = torch.zeros(1, 4, 3, 3, device=device)
    with pytest.raises(RuntimeError, match=r"grad_conv is .*expected Float"):
        torch.ops.bigkern_cuda.conv_backward_input(grad_conv, weight, (6, 5), *conv.window, 1, False, True)
    with pytest.raises(RuntimeError, match=r"grad_conv is .*expected Float"):
        torch.ops.bigkern_cuda.conv_backward_weight(grad_conv, x, (2, 2), *conv.window, 1, False, True, True)


@pytest.mark.emulated
def test_unsupported_says_why():
    conv = Conv(1, 8, (5, 5), 4, (3, 3))
    x, weight, bias = operands(conv, BF16, "cpu")
    window = (*conv.window, 1, None)
    assert _cuda.unsupported(x, weight, bias, *window, ()) is None
    assert "float64" in _cuda.unsupported(x.double(), weight, bias, *window, ())
    assert "one dtype" in _cuda.unsupported(x, weight.float(), bias, *window, ())
    assert "one dtype" in _cuda.unsupported(x, weight, bias.float(), *window, ())
    assert "up to 255" in _cuda.unsupported(x, weight, bias, *window, (16, 16, 1, 1, 8, 8))
    assert "meta" in _cuda.unsupported(x.to("meta"), weight, bias, *window, ())
