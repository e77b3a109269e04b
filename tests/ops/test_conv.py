"""Convolution's results and gradients on every backend: the error rule, the edge cases, memory formats, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import bigkern
from bigkern.ops import _triton_support, conv1d, conv2d
from tests import numerics
from tests.conftest import pick
from tests.ops.convolutions import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    NAMED,
    NAMES,
    NO_PADDING,
    Convolution,
    generated,
    laid_out,
)

# The interpreter takes about a second for each.
GENERATED = generated(60 if _triton_support.INTERPRETED else 320)
SELECTED = GENERATED[: 6 if _triton_support.INTERPRETED else 24]

SMALL = Convolution("small", 2, 6, 5, (5, 6), (3, 3), padding=1)
POOLED = replace(SMALL, name="pooled", activation="gelu", max_pool=2)
ONE_DIMENSION = Convolution("one dimension", 2, 6, 5, (9,), (3,), padding=1)
FEW = [SMALL, replace(POOLED, activation="relu"), ONE_DIMENSION]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def name_of(value):
    return getattr(value, "name", str(value))


few = pytest.mark.parametrize("form", FEW, ids=name_of)


@pytest.fixture(autouse=True)
def full_float32():
    """Products of float32 are float32, on torch's side too: the default of torch.backends.cudnn is TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def check(form, inputs, seed=0):
    numerics.check(form.kernel, form.reference, inputs, names=NAMES[: len(inputs)], seed=seed)


# The error rule


@pytest.mark.sanitized
@pytest.mark.parametrize("form", NAMED, ids=name_of)
@pytest.mark.parametrize("dtype", pick(DTYPES, [None]), ids=str)
def test_named(backend, device, form, dtype):
    """In the small selection the dtypes and the layouts take turns."""
    number = NAMED.index(form)
    layout = LAYOUTS[number % 2]
    check(form, form.inputs(dtype or DTYPES[number % 3], device, layout=layout))


@pytest.mark.parametrize(("form", "dtype", "layout", "weight_layout"), pick(GENERATED, SELECTED), ids=name_of)
def test_generated(backend, device, form, dtype, layout, weight_layout):
    check(form, form.inputs(dtype, device, layout=layout, weight_layout=weight_layout))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("max_pool", pick([None, 2, (3, 2, 1), ((1, 2), None, 0)], [None, (3, 2, 1)]), ids=str)
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]), ids=str)
def test_every_activation_with_and_without_pooling(backend, device, activation, max_pool, dtype):
    form = replace(SMALL, activation=activation, max_pool=max_pool)
    check(form, form.inputs(dtype, device, layout="channels_last", scale=2.0))


@dtypes
@pytest.mark.parametrize("scale", pick([1e-3, 1e-2, 1e2, 1e3], [1e-3, 1e3]))
def test_scales(backend, device, dtype, scale):
    check(SMALL, SMALL.inputs(dtype, device, scale=scale))


@dtypes
@pytest.mark.parametrize("mean", pick([-100.0, 10.0], [10.0]))
def test_mean_far_from_zero(backend, device, dtype, mean):
    check(SMALL, SMALL.inputs(dtype, device, mean=mean))


LONG_SUMS = [
    Convolution("channels", 1, 520, 4, (3, 3), (2, 2)),
    Convolution("pixels", 2, 4, 4, (24, 25), (1, 1)),
    Convolution("pixels of a depthwise one", 2, 1, 1, (17, 16), (2, 1), groups=3),
]


@pytest.mark.parametrize("form", LONG_SUMS, ids=name_of)
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.float32]), ids=str)
def test_long_sums(backend, device, form, dtype):
    """Many channels in the forward pass, or many pixels in the weight's gradient."""
    check(form, form.inputs(dtype, device))


def test_without_bias(backend, device):
    check(POOLED, POOLED.inputs(device=device)[:2])


@few
def test_unbatched(backend, device, form):
    inputs = form.inputs(device=device)
    single = [inputs[0].detach()[0].requires_grad_(), *inputs[1:]]
    check(form, single)
    assert form.kernel(*single).dim() == form.rank + 1


def test_float64(backend, device):
    inputs = SMALL.inputs(torch.float64, device)
    if backend == "torch":
        check(SMALL, inputs)
    else:
        with pytest.raises(bigkern.BackendError, match=r"float64(.|\n)*torch: could serve them"):
            SMALL.kernel(*inputs)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("window", "dilation"), [((3, 3), 1), ((2, 5), (1, 2)), ((4, 2), (3, 1)), ((1, 1), 1)], ids=str
)
def test_padding_as_a_string(backend, device, padding, window, dilation):
    form = Convolution("string", 1, 3, 4, (10, 9), window, padding=padding, dilation=dilation)
    check(form, form.inputs(device=device))
    if padding == "same":
        assert form.kernel(*form.inputs(device=device)).shape[2:] == (10, 9)


def test_arguments_as_torch_takes_them(backend, device):
    """Ints, tuples and lists of one or two; defaults; keywords."""
    x, w, b = SMALL.inputs(device=device, grad=False)
    for arguments in (
        {},
        {"stride": (2,)},
        {"stride": [2, 1]},
        {"padding": (1, 2)},
        {"padding": [1], "dilation": (1, 2)},
    ):
        torch.testing.assert_close(conv2d(x, w, **arguments), F.conv2d(x, w, **arguments))
    torch.testing.assert_close(conv2d(x, w, b, (2, 1), 1, 1, 1), F.conv2d(x, w, b, (2, 1), 1, 1, 1))
    torch.testing.assert_close(
        conv2d(x, w, b, max_pool=[(2, 3), None, (0, 1)]), F.max_pool2d(F.conv2d(x, w, b), (2, 3), None, (0, 1))
    )


# The residual: every way results are stored, by vectors and by elements, as rows and as planes

RESIDUAL = [
    replace(NAMED[0], activation="relu"),
    NAMED[1],
    replace(NAMED[2], max_pool=None),
    NAMED[11],
    replace(NAMED[9], max_pool=None),
    NAMED[15],
]


def residual_for(form, inputs, layout="contiguous"):
    shape = form.kernel(*[x.detach() for x in inputs]).shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(inputs[0])
    return laid_out(values, layout).requires_grad_()


def fused(form):
    """Of (input, weight, bias, residual)."""
    return lambda *inputs: form.kernel(*inputs[:-1], residual=inputs[-1])


def unfused(form):
    plain = replace(form, activation=None)
    return lambda *inputs: ACTIVATIONS[form.activation](plain.reference(*inputs[:-1]) + inputs[-1])


def check_residual(form, inputs):
    numerics.check(fused(form), unfused(form), inputs, names=(*NAMES, "residual"))


@pytest.mark.sanitized
@pytest.mark.parametrize("form", RESIDUAL, ids=name_of)
@pytest.mark.parametrize("layout", pick(LAYOUTS[:2], [None]), ids=str)
def test_residual(backend, device, form, layout):
    """Dtypes take turns, and in the small selection the layouts."""
    number = RESIDUAL.index(form)
    layout = layout or LAYOUTS[number % 2]
    inputs = form.inputs(DTYPES[(number + LAYOUTS.index(layout)) % 3], device, layout=layout)
    check_residual(form, [*inputs, residual_for(form, inputs, layout)])


@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_layouts_of_the_residual(backend, device, layout):
    inputs = RESIDUAL[0].inputs(torch.bfloat16, device, layout="channels_last")
    check_residual(RESIDUAL[0], [*inputs, residual_for(RESIDUAL[0], inputs, layout)])


def test_residual_unbatched_alone_and_differentiated_twice(backend, device):
    form = replace(SMALL, activation="silu")
    inputs = form.inputs(device=device)
    inputs.append(residual_for(form, inputs))
    single = [x.detach()[0].requires_grad_() for x in (inputs[0], inputs[3])]
    check_residual(form, [single[0], *inputs[1:3], single[1]])

    fixed = [x.detach() for x in inputs[:3]]
    alone, expected = (
        torch.autograd.grad(function(*fixed, inputs[3]).square().sum(), inputs[3])[0]
        for function in (fused(form), unfused(form))
    )
    torch.testing.assert_close(alone, expected)

    twice = []
    for function in (fused(form), unfused(form)):
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        twice.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    for mine, torchs in zip(*twice, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


# Memory formats, strides and storage


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", pick(LAYOUTS[:4], ["channels_last"]))
@few
def test_layouts(backend, device, form, layout, weight_layout):
    check(form, form.inputs(torch.bfloat16, device, layout=layout, weight_layout=weight_layout))


class Relaid(torch.autograd.Function):
    """The identity; its gradient has another layout of memory."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return laid_out(grad, ctx.layout), None


@few
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_outputs_gradient(backend, device, form, layout):
    def relaid(function):
        return lambda *inputs: Relaid.apply(function(*inputs), layout)

    inputs = form.inputs(device=device)
    numerics.check(relaid(form.kernel), relaid(form.reference), inputs, names=NAMES)


def formats_of(x):
    return [f for f in (torch.contiguous_format, torch.channels_last) if x.is_contiguous(memory_format=f)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", pick([SMALL, POOLED], [POOLED]), ids=name_of)
def test_memory_formats_propagate_as_torchs(backend, device, form, layout, weight_layout):
    inputs = form.inputs(device=device, layout=layout, weight_layout=weight_layout)
    output, expected = form.kernel(*inputs), form.reference(*inputs)
    assert formats_of(output) == formats_of(expected)
    # A gradient in its parameter's format is taken over by autograd as it is; in another it would be copied.
    grad_input, grad_weight, _ = torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert formats_of(grad_input) == formats_of(output)
    if backend != "torch":
        assert formats_of(grad_weight) == formats_of(inputs[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_one_dimension_gives_contiguous_results_as_torch(backend, device, layout):
    inputs = ONE_DIMENSION.inputs(device=device, layout=layout)
    output = ONE_DIMENSION.kernel(*inputs)
    assert output.is_contiguous() and ONE_DIMENSION.reference(*inputs).is_contiguous()
    output.view(output.shape[0], -1)


def test_images_far_apart_in_storage(backend, device):
    """Three images that span more than 2^31 elements: offsets need 64 bits.  The pages between are never touched."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 4096, dtype=torch.bfloat16, device=device)
    form = Convolution("far apart", 3, 8, 4, (4, 5), (3, 3), padding=1)
    values, w, b = form.inputs(torch.bfloat16, device)
    x = storage.as_strided((3, 8, 4, 5), (stride, 1, 40, 8))
    x.copy_(values.detach())
    x.requires_grad_()
    near = values.detach().to(memory_format=torch.channels_last).requires_grad_()
    for a, b_ in zip(numerics.run(form.kernel, [x, w, b]), numerics.run(form.kernel, [near, w, b]), strict=True):
        assert all(torch.equal(c, d) for c, d in zip(a, b_, strict=True))


@settings(
    max_examples=pick([30 if _triton_support.INTERPRETED else 150], [3 if _triton_support.INTERPRETED else 20])[0],
    deadline=None,
    derandomize=True,
    # Shrinking a failure would take the interpreter many minutes.
    phases=[Phase.explicit, Phase.generate] if _triton_support.INTERPRETED else list(Phase),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape_layout_and_dtype(backend, device, data):
    rank = data.draw(st.integers(1, 2))

    def sizes(least, most):
        return tuple(data.draw(st.integers(least, most)) for _ in range(rank))

    window, dilation, padding = sizes(1, 4), sizes(1, 3), sizes(0, 3)
    if max(window) == 1:
        padding = NO_PADDING[rank]
    reach = [d * (taps - 1) + 1 - 2 * pad for d, taps, pad in zip(dilation, window, padding, strict=True)]
    form = Convolution(
        "drawn",
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 9)),
        tuple(max(1, least) + data.draw(st.integers(0, 6)) for least in reach),
        window,
        sizes(1, 3),
        padding,
        dilation,
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from(list(ACTIVATIONS))),
        data.draw(st.sampled_from([None, 1, (1, 2, 0)])),
    )
    inputs = form.inputs(
        data.draw(st.sampled_from(DTYPES)),
        device,
        layout=data.draw(st.sampled_from(LAYOUTS)),
        weight_layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 9)),
    )
    check(form, [tensor.detach().requires_grad_(data.draw(st.booleans())) for tensor in inputs])


# Which gradients


@few
@pytest.mark.parametrize("wanted", range(3), ids=NAMES)
def test_gradient_of_one_input_only(backend, device, form, wanted):
    inputs = form.inputs(device=device, grad=False)
    inputs[wanted].requires_grad_()
    check(form, inputs)


def test_only_the_wanted_gradients_are_computed(backend, device):
    if backend == "torch":
        pytest.skip("torch's own operators")
    for wanted, expected in (
        ((True, False, False), {"conv_backward_epilogue", "conv_backward_input"}),
        ((False, True, True), {"conv_backward_epilogue", "conv_backward_weight"}),
        ((False, False, True), {"conv_backward_epilogue"}),
    ):
        inputs = [
            x.requires_grad_(need) for x, need in zip(POOLED.inputs(device=device, grad=False), wanted, strict=True)
        ]
        output = POOLED.kernel(*inputs)
        with RawCalls() as calls:
            output.sum().backward()
        assert set(calls.names) == expected


class RawCalls(TorchDispatchMode):
    """Notes the raw ops that run, and their arguments."""

    def __init__(self):
        super().__init__()
        self.names, self.arguments = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("bigkern_"):
            self.names.append(func._schema.name.partition("::")[2])
            names = [argument.name for argument in func._schema.arguments]
            self.arguments.append(dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


def test_inference_keeps_nothing_for_a_backward(backend, device):
    inputs = POOLED.inputs(device=device)
    with torch.no_grad(), RawCalls() as calls:
        assert not POOLED.kernel(*inputs).requires_grad
    with torch.inference_mode():
        POOLED.kernel(*inputs)
    assert [call["need_backward"] for call in calls.arguments] == ([] if backend == "torch" else [False])


def test_gradients_accumulate(backend, device):
    inputs = POOLED.inputs(device=device)
    for _ in range(2):
        POOLED.kernel(*inputs).square().sum().backward()
    once = torch.autograd.grad(POOLED.kernel(*inputs).square().sum(), inputs)
    for x, grad in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)


# Nothing, NaN, infinity, ties


@pytest.mark.parametrize("form", [*FEW, replace(POOLED, activation="silu")], ids=name_of)
def test_no_images(backend, device, form):
    inputs = replace(form, images=0).inputs(device=device)
    outputs, grads = numerics.run(form.kernel, inputs)
    torch_outputs, torch_grads = numerics.run(form.reference, inputs)
    for mine, torchs in zip(outputs + grads, torch_outputs + torch_grads, strict=True):
        assert mine.shape == torchs.shape and mine.dtype == torchs.dtype and torch.equal(mine, torchs)


@few
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_pixel_reaches_what_reads_it(backend, device, form, bad):
    inputs = form.inputs(device=device, grad=False)
    inputs[0][0, 2, ..., 3] = bad
    check(form, inputs)
    expected = form.reference(*inputs)
    found = form.kernel(*inputs)
    assert torch.equal(found.isnan(), expected.isnan()) and found[1].isfinite().all() and not found[0].isfinite().all()


def test_windows_of_minus_infinity_have_a_maximum(backend, device):
    """-inf everywhere: the first place of each window counts, never the padding."""
    x = torch.full((1, 2, 5, 5), -float("inf"), device=device, requires_grad=True)
    w, b = torch.ones(3, 2, 1, 1, device=device), torch.zeros(3, device=device)
    form = Convolution("minus infinity", 1, 2, 3, (5, 5), (1, 1), max_pool=(3, 2, 1))
    for mine, torchs in zip(numerics.run(form.kernel, [x, w, b]), numerics.run(form.reference, [x, w, b]), strict=True):
        assert all(torch.equal(a, b_) for a, b_ in zip(mine, torchs, strict=True))


@pytest.mark.parametrize("max_pool", [2, (3, 2, 1), (3, 1, 1)], ids=str)
def test_of_equal_values_the_first_is_the_maximum(backend, device, max_pool):
    form = Convolution("ties", 1, 1, 2, (7, 8), (1, 1), max_pool=max_pool)
    x = torch.arange(56.0, device=device).view(1, 1, 7, 8).div(5, rounding_mode="floor").requires_grad_()
    w = torch.ones(2, 1, 1, 1, device=device)
    for mine, torchs in zip(numerics.run(form.kernel, [x, w]), numerics.run(form.reference, [x, w]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, torchs, strict=True))


# Repeated runs, TF32


@pytest.mark.parametrize("form", [NAMED[0], POOLED, NAMED[9]], ids=name_of)
def test_runs_are_bitwise_equal(backend, device, form):
    inputs = form.inputs(torch.bfloat16, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (numerics.run(form.kernel, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_as_torchs_convolutions(backend, device, allowed):
    """The kernels are told; whether they heed it shows on a GPU, and in tests/kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = SMALL.inputs(dtype, device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), RawCalls() as calls:
            SMALL.kernel(*inputs).sum().backward()
        expected = allowed and dtype == torch.float32
        assert [call["tf32"] for call in calls.arguments] == ([] if backend == "torch" else [expected] * 3)


def test_tf32_where_convolutions_and_recurrent_layers_differ(backend, device):
    """torch.backends.cudnn.allow_tf32 raises then."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        with RawCalls() as calls:
            SMALL.kernel(*SMALL.inputs(device=device, grad=False))
    finally:
        torch.backends.cudnn.allow_tf32 = False
    assert [call["tf32"] for call in calls.arguments] == ([] if backend == "torch" else [True])


def test_windows_with_more_places_than_a_byte_counts(backend, device):
    form = Convolution("wide window", 1, 2, 2, (16, 17), (1, 1), max_pool=16)
    inputs = form.inputs(device=device)
    if backend == "torch":
        check(form, inputs)
    else:
        with pytest.raises(bigkern.BackendError, match=r"max_pool(.|\n)*255(.|\n)*torch: could serve them"):
            form.kernel(*inputs)
        if _triton_support.INTERPRETED:
            return  # half a minute for the largest window that is taken
        largest = replace(form, size=(15, 17), max_pool=((15, 17), 1, 0))
        check(largest, largest.inputs(device=device))


# Bad input

X, W, B, R = torch.ones(2, 6, 5, 5), torch.ones(4, 6, 3, 3), torch.ones(4), torch.ones(2, 4, 3, 3)
REFUSED = {
    "input not a tensor": (lambda: conv2d([1.0], W), TypeError, "input is a list"),
    "weight not a tensor": (lambda: conv2d(X, [1.0]), TypeError, "weight is a list"),
    "bias not a tensor": (lambda: conv2d(X, W, [1.0] * 4), TypeError, "bias is a list"),
    "no weight": (lambda: conv2d(X, None), TypeError, "weight is a NoneType"),
    "integers": (lambda: conv2d(X.long(), W.long()), TypeError, r"dtype torch.int64; supported.*input\.float"),
    "complex": (lambda: conv2d(X.cfloat(), W.cfloat()), TypeError, "input has dtype torch.complex64"),
    "weight dtype": (lambda: conv2d(X, W.double()), TypeError, "weight has dtype torch.float64 and input.*autocast"),
    "bias dtype": (lambda: conv2d(X.half(), W.half(), B), TypeError, "bias has dtype torch.float32 and input"),
    "weight device": (lambda: conv2d(X, W.to("meta")), ValueError, "weight is on meta and input on cpu"),
    "bias device": (lambda: conv2d(X, W, B.to("meta")), ValueError, "bias is on meta and input on cpu"),
    "input rank": (lambda: conv2d(X[0, 0], W), ValueError, r"input has shape \(5, 5\).*\(N, C, H, W\) or \(C, H, W\)"),
    "input rank, one dimension": (lambda: conv1d(X, W[..., 0]), ValueError, r"\(N, C, L\) or \(C, L\)"),
    "weight rank": (lambda: conv2d(X, W[..., 0]), ValueError, r"weight has shape \(4, 6, 3\).*R, S\)"),
    "channels": (lambda: conv2d(X[:, :5], W), ValueError, r"input has 5 channels.*groups=1 takes 6"),
    "channels of groups": (lambda: conv2d(X, W, groups=2), ValueError, "groups=2 takes 12"),
    "filters of groups": (lambda: conv2d(X, W[:, :2], groups=3), ValueError, "groups is 3.*divide.*4 output channels"),
    "no groups": (lambda: conv2d(X, W, groups=0), ValueError, "groups is 0; it must be at least 1"),
    "groups not an int": (lambda: conv2d(X, W, groups=1.0), TypeError, "groups is a float"),
    "bias shape": (lambda: conv2d(X, W, B[:3]), ValueError, r"bias has shape \(3,\); it must be \(4,\)"),
    "empty kernel": (lambda: conv2d(X, W[..., :0]), ValueError, "its kernel must be at least 1"),
    "large kernel": (lambda: conv2d(X[..., :2], W), ValueError, r"kernel of \(3, 3\).*larger than the input"),
    "large dilated kernel": (lambda: conv2d(X, W, dilation=3), ValueError, r"dilation \(3, 3\) is larger"),
    "empty image": (lambda: conv2d(X[..., :0], W, padding=1), ValueError, r"larger than the input of \(5, 0\)"),
    "stride 0": (lambda: conv2d(X, W, stride=0), ValueError, "stride is 0; it must be at least 1"),
    "stride negative": (lambda: conv2d(X, W, stride=(1, -1)), ValueError, r"stride is \(1, -1\)"),
    "stride not an int": (lambda: conv2d(X, W, stride=1.5), TypeError, "stride is 1.5; expected an int or 2"),
    "strides": (lambda: conv2d(X, W, stride=(1, 1, 1)), ValueError, "expected an int or 2 of them"),
    "padding negative": (lambda: conv2d(X, W, padding=-1), ValueError, "padding is -1; it must be at least 0"),
    "padding word": (lambda: conv2d(X, W, padding="full"), ValueError, "padding is 'full'.*'valid' or 'same'"),
    "same with stride": (lambda: conv2d(X, W, padding="same", stride=2), ValueError, "'same' with stride.*stride 1"),
    "dilation 0": (lambda: conv2d(X, W, dilation=0), ValueError, "dilation is 0; it must be at least 1"),
    "activation": (lambda: conv2d(X, W, activation="tanh"), ValueError, "activation is 'tanh'; supported.*'silu'"),
    "max_pool pair": (lambda: conv2d(X, W, max_pool=(2, 2)), ValueError, r"max_pool is \(2, 2\).*three parts"),
    "max_pool word": (lambda: conv2d(X, W, max_pool="2"), TypeError, "max_pool is a str"),
    "max_pool 0": (lambda: conv2d(X, W, max_pool=0), ValueError, "kernel_size is 0; it must be at least 1"),
    "max_pool stride": (lambda: conv2d(X, W, max_pool=(2, 0, 0)), ValueError, "max_pool's stride is 0"),
    "max_pool padding": (lambda: conv2d(X, W, max_pool=(3, 1, 2)), ValueError, "at most half of its kernel_size"),
    "residual not a tensor": (lambda: conv2d(X, W, residual=1.0), TypeError, "residual is a float"),
    "residual dtype": (lambda: conv2d(X, W, residual=R.half()), TypeError, "residual has dtype torch.float16"),
    "residual device": (lambda: conv2d(X, W, residual=R.to("meta")), ValueError, "residual is on meta"),
    "residual shape": (lambda: conv2d(X, W, residual=R[:1]), ValueError, r"must be the output's, \(2, 4, 3, 3\)"),
    "residual and max_pool": (lambda: conv2d(X, W, residual=R, max_pool=2), ValueError, "only one of them can follow"),
    "max_pool large": (lambda: conv2d(X, W, max_pool=4), ValueError, r"larger than the convolution's output"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(backend, case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
