"""Layer norm's results and gradients on every backend: the error rule, the edge cases, dropout, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bigkern
from bigkern.ops import add_layer_norm, layer_norm, rms_norm
from bigkern.ops._torch_philox import philox4x32_10
from tests import numerics
from tests.conftest import pick
from tests.ops.forms import ADD_LAYER_NORM, EPS, FORMS, LAYER_NORM, PLAIN, RMS_NORM

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)


def check(form, inputs, seed=0):
    numerics.check(form.kernel, form.reference, inputs, names=form.names, seed=seed)


# The error rule


@forms
@dtypes
@pytest.mark.parametrize(
    "shape",
    pick(
        [
            (1, 1),
            (3, 1),
            (1, 7),
            (5, 7),
            (4, 64),
            (9, 127),
            (2, 128),
            (3, 129),
            (2, 1000),
            (3, 1024),
            (2, 4099),
            (1, 8192),
        ],
        [(3, 1), (5, 7), (4, 64), (9, 129), (2, 1000)],
    ),
    ids=str,
)
def test_sizes(backend, device, form, dtype, shape):
    check(form, form.inputs(*shape, dtype=dtype, device=device))


@forms
@pytest.mark.parametrize(
    ("shape", "dtype"),
    pick(
        [((rows, cols), dtype) for rows in (1, 3) for cols in (16385, 65536, 131075) for dtype in DTYPES]
        + [((1, 262_147), torch.float32)],
        [((2, 9001), torch.bfloat16), ((1, 131_075), torch.float32)],
    ),
    ids=str,
)
def test_long_rows(backend, device, form, shape, dtype):
    check(form, form.inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("form", [LAYER_NORM, ADD_LAYER_NORM], ids=lambda form: form.name)
def test_more_rows_than_a_grid_dimension_holds(backend, device, form):
    check(form, form.inputs(65_543, 3, device=device))


@forms
@dtypes
@pytest.mark.parametrize("scale", pick([1e-3, 1e-2, 1e2, 1e3], [1e-3, 1e3]))
def test_scales(backend, device, form, dtype, scale):
    check(form, form.inputs(4, 96, dtype=dtype, device=device, scale=scale))


@forms
@dtypes
@pytest.mark.parametrize("mean", pick([-1e3, 10.0, 1e3], [1e3]))
def test_mean_far_from_zero(backend, device, form, dtype, mean):
    # The error is that of each row's mean, so rows are what must be many for torch's own error to be more than luck.
    check(form, form.inputs(64, 160, dtype=dtype, device=device, mean=mean))


def test_constant_rows_are_zero_before_the_bias(backend, device):
    x = torch.full((3, 64), 1000.0, device=device)
    bias = torch.randn(64, device=device)
    assert torch.equal(layer_norm(x, (64,), None, bias), bias.expand(3, 64))


@half_dtypes
@pytest.mark.parametrize("form", [LAYER_NORM, RMS_NORM, ADD_LAYER_NORM], ids=lambda form: form.name)
def test_float32_parameters_under_a_half_input(backend, device, form, dtype):
    check(form, form.inputs(5, 96, dtype=dtype, device=device, parameter_dtype=torch.float32))


def test_rms_norm_takes_any_weight_dtype_as_torch(backend, device):
    for dtype, parameter_dtype in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]:
        check(RMS_NORM, RMS_NORM.inputs(4, 64, dtype=dtype, device=device, parameter_dtype=parameter_dtype))


@dtypes
def test_rms_norms_default_eps_is_torchs(backend, device, dtype):
    x = (1e-4 * torch.randn(4, 64)).to(device, dtype)
    numerics.check(lambda x: rms_norm(x, (64,)), lambda x: F.rms_norm(x, (64,), eps=2.0**-23), [x])
    assert torch.equal(F.rms_norm(x, (64,)), F.rms_norm(x, (64,), eps=2.0**-23))


def test_bias_without_weight(backend, device):
    x, bias = LAYER_NORM.inputs(4, 64, device=device)[::2]
    numerics.check(lambda x, b: layer_norm(x, (64,), None, b), lambda x, b: F.layer_norm(x, (64,), None, b), [x, bias])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 5), (7, 4, 5)], ids=str)
def test_several_normalized_dimensions(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = (torch.randn(4, 5, device=device, requires_grad=True) for _ in range(2))
    numerics.check(
        lambda *t: layer_norm(t[0], (4, 5), *t[1:]), lambda *t: F.layer_norm(t[0], (4, 5), *t[1:]), [x, w, b]
    )
    numerics.check(
        lambda x, w, b: add_layer_norm(x, x, [4, 5], w, b), lambda x, w, b: (F.layer_norm(x + x, (4, 5), w, b), x + x),
        [x, w, b],
    )  # fmt: skip


def test_one_dimensional_input(backend, device):
    check(LAYER_NORM, LAYER_NORM.inputs(64, device=device))


def test_float64(backend, device):
    inputs = ADD_LAYER_NORM.inputs(4, 32, dtype=torch.float64, device=device)
    if backend == "torch":
        check(ADD_LAYER_NORM, inputs)
    else:
        with pytest.raises(bigkern.BackendError, match=r"float64(.|\n)*torch: could serve them"):
            ADD_LAYER_NORM.kernel(*inputs)


# Strides and storage


def strided(values, layout):
    """The same values in another layout of memory."""
    rows, cols = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "row stride":
        return torch.cat([values, values], 1)[:, :cols]
    if layout == "column stride":
        return torch.stack([values, values], 2)[:, :, 0]
    if layout == "odd offset":
        storage = torch.empty(rows * cols + 1, dtype=values.dtype, device=values.device)
        return storage[1:].view(rows, cols).copy_(values)
    if layout == "odd offset and row stride":
        storage = torch.empty(rows, cols + 3, dtype=values.dtype, device=values.device)
        return storage[:, 1 : cols + 1].copy_(values)
    assert layout == "expanded"
    return values[:1].expand(rows, cols)


LAYOUTS = ["transposed", "row stride", "column stride", "odd offset", "odd offset and row stride", "expanded"]


@forms
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("cols", pick([1, 7, 64, 129], [1, 64]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, form, dtype, cols, layout):
    data, parameters = [], []
    for tensor in form.inputs(6, cols, dtype=dtype, device=device):
        tensor = tensor.detach()
        if tensor.dim() == 2:
            data.append(strided(tensor, layout).requires_grad_())
        else:
            parameters.append(torch.stack([tensor, tensor], 1)[:, 0].requires_grad_())
    check(form, [*data, *parameters])


class Relaid(torch.autograd.Function):
    """The identity; its gradient has another layout of memory."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return strided(grad, ctx.layout), None


@forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_outputs_gradient(backend, device, form, layout):
    def relaid(function):
        def call(*inputs):
            outputs = function(*inputs)
            return [Relaid.apply(y, layout) for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]

        return call

    numerics.check(relaid(form.kernel), relaid(form.reference), form.inputs(6, 64, device=device), names=form.names)


def test_channels_last(backend, device):
    x = torch.randn(2, 8, 3, 5, device=device).to(memory_format=torch.channels_last)
    w = torch.randn(5, device=device, requires_grad=True)
    inputs = [x.requires_grad_(), w]
    numerics.check(lambda x, w: layer_norm(x, (5,), w), lambda x, w: F.layer_norm(x, (5,), w), inputs)
    nhwc = x.detach().permute(0, 2, 3, 1).requires_grad_()
    check(PLAIN, [nhwc])


def test_rows_far_apart_in_storage(backend, device):
    """Three rows that span more than 2^31 elements: offsets need 64 bits.  The pages between them are never touched."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((3, 64), (stride, 1))
    values = torch.randn(3, 64).to(device, torch.bfloat16)
    x.copy_(values)
    assert torch.equal(layer_norm(x, (64,)), layer_norm(values, (64,)))
    w = torch.ones(64, device=device, dtype=torch.bfloat16, requires_grad=True)
    grads = [torch.autograd.grad(layer_norm(t, (64,), w), w, values)[0] for t in (x, values)]
    assert torch.equal(*grads)


@settings(
    max_examples=pick([200], [25])[0],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_layout_and_dtype(backend, device, data):
    form = data.draw(st.sampled_from(FORMS))
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 200))
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = form.inputs(
        rows,
        cols,
        dtype=dtype,
        device=device,
        mean=data.draw(st.sampled_from([0.0, 3.0, -100.0])),
        seed=data.draw(st.integers(0, 9)),
    )
    inputs = [
        strided(t.detach(), data.draw(st.sampled_from(LAYOUTS))).requires_grad_(data.draw(st.booleans()))
        if t.dim() == 2
        else t.detach().requires_grad_(data.draw(st.booleans()))
        for t in inputs
    ]
    check(form, inputs)


# Which gradients


@pytest.mark.parametrize("wanted", range(4), ids=ADD_LAYER_NORM.names)
def test_gradient_of_one_input_only(backend, device, wanted):
    inputs = ADD_LAYER_NORM.inputs(5, 48, device=device, grad=False)
    inputs[wanted].requires_grad_()
    check(ADD_LAYER_NORM, inputs)


@pytest.mark.parametrize("used", [0, 1], ids=["output", "summed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient_of_one_output_only(backend, device, used, dropout_p):
    inputs = ADD_LAYER_NORM.inputs(5, 48, device=device)
    philox = torch.tensor([1, 2], device=device)
    keep = mask(5, 48, philox, dropout_p)

    def kernel(x, residual, w, b):
        return add_layer_norm(x, residual, (48,), w, b, EPS, dropout_p, philox=philox)[used]

    def reference(x, residual, w, b):
        return ADD_LAYER_NORM.reference(x * keep / (1 - dropout_p), residual, w, b)[used]

    if used == 1:
        inputs = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
    numerics.check(kernel, reference, inputs, names=ADD_LAYER_NORM.names)


def test_unused_parameters_of_summed_get_no_gradient(backend, device):
    inputs = ADD_LAYER_NORM.inputs(5, 48, device=device)
    summed = ADD_LAYER_NORM.kernel(*inputs)[1]
    grads = torch.autograd.grad(summed.sum(), inputs, allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(inputs[0])) and torch.equal(grads[1], torch.ones_like(inputs[0]))
    assert not any(grad is not None and grad.any() for grad in grads[2:])


@forms
def test_no_graph_without_gradients(backend, device, form):
    inputs = form.inputs(3, 16, device=device)
    with torch.no_grad():
        outputs = form.kernel(*inputs)
    assert not any(y.requires_grad for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))
    with torch.inference_mode():
        form.kernel(*inputs)


def test_gradients_accumulate(backend, device):
    inputs = ADD_LAYER_NORM.inputs(5, 48, device=device)

    def total():
        output, summed = ADD_LAYER_NORM.kernel(*inputs)
        return (output * summed).sum()

    for _ in range(2):
        total().backward()
    for x, once in zip(inputs, torch.autograd.grad(total(), inputs), strict=True):
        torch.testing.assert_close(x.grad, 2 * once)


# Nothing, NaN and infinity


@forms
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (4, 0)], ids=str)
def test_no_elements(backend, device, form, shape):
    inputs = form.inputs(*shape, device=device)
    outputs, grads = numerics.run(form.kernel, inputs)
    torch_outputs, torch_grads = numerics.run(form.reference, inputs)
    for mine, torchs in zip(outputs + grads, torch_outputs + torch_grads, strict=True):
        assert mine.shape == torchs.shape and mine.dtype == torchs.dtype and torch.equal(mine, torchs)


@forms
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cols", [7, 64])
def test_a_bad_row_stays_alone(backend, device, form, bad, cols):
    inputs = form.inputs(6, cols, device=device, grad=False)
    inputs[0][2, cols // 2] = bad
    check(form, inputs)
    inputs[0].requires_grad_()
    outputs, (grad,) = numerics.run(form.kernel, inputs)
    assert grad[[0, 1, 3, 4, 5]].isfinite().all() and outputs[0][[0, 1, 3, 4, 5]].isfinite().all()
    assert grad[2].isnan().any() and outputs[0][2].isnan().any()


# Dropout


def mask(rows, cols, philox, dropout_p):
    """Which elements are kept, by the scalar algorithm as Salmon et al. print it, in Python's integers."""
    seed, offset = (int(value) % 2**64 for value in philox.cpu())
    kept = []
    for group in range(-(-rows * cols // 4)):
        counter = [offset % 2**32, offset >> 32, group % 2**32, group >> 32]
        key = [seed % 2**32, seed >> 32]
        for _ in range(10):
            low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                (high >> 32) ^ counter[1] ^ key[0],
                high % 2**32,
                (low >> 32) ^ counter[3] ^ key[1],
                low % 2**32,
            ]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        kept += counter
    uniform = torch.tensor(kept[: rows * cols], dtype=torch.int64).to(torch.float32) * 2.0**-32 + 2.0**-33
    return (uniform > dropout_p).view(rows, cols).to(philox.device)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**64 - 1, 2**64 - 1), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x85A308D3243F6A88, 0x0370734413198A2E),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    """The known-answer vectors of Random123, whose counter is {offset, subsequence} here."""

    def signed(value):
        return torch.tensor(value - 2**64 if value >= 2**63 else value)

    found = philox4x32_10(signed(key), signed(counter[1]).view(1), signed(counter[0]))
    assert tuple(found[0].tolist()) == words


@pytest.mark.parametrize("philox", [(0, 0), (123, 4), (2**62 + 12345, 2**40 + 7), (-1, -1)], ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (1, 1), (2, 130)], ids=str)
def test_the_mask_is_philoxs_on_every_backend(backend, device, philox, shape):
    philox = torch.tensor(philox, device=device)
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    for dropout_p in (0.1, 0.5):
        _, summed = add_layer_norm(ones, zeros, shape[-1:], dropout_p=dropout_p, philox=philox)
        assert torch.equal(summed != 0, mask(*shape, philox, dropout_p))
        torch.testing.assert_close(summed[summed != 0], torch.full_like(summed[summed != 0], 1 / (1 - dropout_p)))


@dtypes
@pytest.mark.parametrize("shape", pick([(5, 7), (4, 64), (3, 1000), (2, 9001)], [(5, 7), (4, 64)]), ids=str)
def test_dropouts_result_and_gradients(backend, device, dtype, shape):
    inputs = ADD_LAYER_NORM.inputs(*shape, dtype=dtype, device=device)
    philox, dropout_p = torch.tensor([11, 3], device=device), 0.25
    keep = mask(*shape, philox, dropout_p)

    def kernel(x, residual, w, b):
        return add_layer_norm(x, residual, x.shape[-1:], w, b, EPS, dropout_p, philox=philox)

    def reference(x, residual, w, b):
        return ADD_LAYER_NORM.reference(torch.where(keep, x / (1 - dropout_p), 0), residual, w, b)

    numerics.check(kernel, reference, inputs, names=ADD_LAYER_NORM.names)


def test_philox_is_drawn_from_torchs_generator_returned_and_taken(backend, device):
    x, residual = ADD_LAYER_NORM.inputs(16, 64, device=device)[:2]

    def call(**arguments):
        return add_layer_norm(x, residual, (64,), dropout_p=0.3, return_philox=True, **arguments)

    torch.manual_seed(7)
    output, summed, philox = call()
    assert philox.dtype == torch.int64 and philox.shape == (2,) and philox.device == x.device
    other = call()
    assert not torch.equal(other[2], philox) and not torch.equal(other[1], summed)
    torch.manual_seed(7)
    for again in (call(), call(philox=philox)):
        for mine, its in zip((output, summed, philox), again, strict=True):
            assert torch.equal(mine, its)
    # The seed alone decides, whether the philox is asked for or not.
    for _ in range(2):
        torch.manual_seed(9)
        results = [add_layer_norm(x, residual, (64,), dropout_p=0.3)[1] for _ in range(2)]
        assert not torch.equal(*results)


@pytest.mark.parametrize("arguments", [{"dropout_p": 0.0}, {"dropout_p": 0.5, "training": False}], ids=str)
def test_without_dropout_no_philox_is_drawn(backend, device, arguments):
    x, residual = ADD_LAYER_NORM.inputs(4, 16, device=device)[:2]
    state = torch.get_rng_state()
    _, summed, philox = add_layer_norm(x, residual, (16,), **arguments, return_philox=True)
    assert philox is None and torch.equal(summed, x + residual)
    assert torch.equal(state, torch.get_rng_state())


def test_dropping_everything(backend, device):
    inputs = ADD_LAYER_NORM.inputs(4, 16, device=device)
    output, summed = add_layer_norm(*inputs[:2], (16,), *inputs[2:], dropout_p=1.0)
    assert torch.equal(summed, inputs[1])
    grads = torch.autograd.grad((output * summed).sum(), inputs)
    assert not grads[0].any() and grads[1].isfinite().all() and grads[1].any()


def test_share_of_elements_dropped(backend, device):
    ones, zeros = torch.ones(256, 64, device=device), torch.zeros(256, 64, device=device)
    torch.manual_seed(0)
    kept = (add_layer_norm(ones, zeros, (64,), dropout_p=0.3)[1] != 0).double().mean().item()
    assert abs(kept - 0.7) < 5 * (0.7 * 0.3 / (256 * 64)) ** 0.5


# Repeated runs


@forms
def test_runs_are_bitwise_equal(backend, device, form):
    inputs = form.inputs(300, 40, dtype=torch.bfloat16, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (numerics.run(form.kernel, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


# Bad input

X, W = torch.ones(4, 8), torch.ones(8)
REFUSED = {
    "shape": (lambda: layer_norm(X, (7,)), ValueError, r"input has shape \(4, 8\).*normalized_shape \(7,\)"),
    "too many dimensions": (lambda: layer_norm(X, (2, 4, 8)), ValueError, "does not end in normalized_shape"),
    "no dimension": (lambda: layer_norm(X, ()), ValueError, "at least one"),
    "scalar input": (lambda: layer_norm(torch.ones(()), (1,)), ValueError, r"input has shape \(\)"),
    "integers": (lambda: layer_norm(X.long(), (8,)), TypeError, r"dtype torch.int64; supported.*input\.float"),
    "complex": (lambda: rms_norm(X.cfloat(), (8,)), TypeError, "rms_norm: input has dtype torch.complex64"),
    "not a tensor": (lambda: layer_norm([1.0, 2.0], (2,)), TypeError, "input is a list"),
    "eps 0": (lambda: layer_norm(X, (8,), eps=0.0), ValueError, "eps is 0.0; it must be positive"),
    "eps negative": (lambda: rms_norm(X, (8,), eps=-1e-5), ValueError, "eps is -1e-05"),
    "eps NaN": (lambda: add_layer_norm(X, X, (8,), eps=float("nan")), ValueError, "eps is nan"),
    "weight shape": (lambda: layer_norm(X, (8,), W[:7]), ValueError, r"weight has shape \(7,\).*\(8,\)"),
    "bias shape": (lambda: layer_norm(X, (8,), W, W.view(1, 8)), ValueError, r"bias has shape \(1, 8\)"),
    "weight dtype": (lambda: layer_norm(X, (8,), W.half(), W.half()), TypeError, "weight has dtype torch.float16"),
    "bias dtype": (lambda: layer_norm(X.half(), (8,), W.half(), W), TypeError, "weight has dtype.*and bias"),
    "integer weight": (lambda: rms_norm(X, (8,), W.long()), TypeError, "weight has dtype torch.int64"),
    "weight not a tensor": (lambda: layer_norm(X, (8,), [1.0] * 8), TypeError, "weight is a list"),
    "weight device": (lambda: layer_norm(X, (8,), W.to("meta")), ValueError, "weight is on meta and input on cpu"),
    "residual shape": (lambda: add_layer_norm(X, X[:1], (8,)), ValueError, r"residual has shape \(1, 8\).*\(4, 8\)"),
    "residual dtype": (lambda: add_layer_norm(X, X.half(), (8,)), TypeError, "residual has dtype.*autocast"),
    "residual device": (lambda: add_layer_norm(X, X.to("meta"), (8,)), ValueError, "residual is on meta"),
    "residual not a tensor": (lambda: add_layer_norm(X, None, (8,)), TypeError, "residual is a NoneType"),
    "dropout_p negative": (lambda: add_layer_norm(X, X, (8,), dropout_p=-0.1), ValueError, r"is -0.1.*\[0, 1\]"),
    "dropout_p above 1": (lambda: add_layer_norm(X, X, (8,), dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "dropout_p in evaluation": (
        lambda: add_layer_norm(X, X, (8,), dropout_p=2.0, training=False), ValueError, "dropout_p is 2.0",
    ),
    "philox dtype": (
        lambda: add_layer_norm(X, X, (8,), dropout_p=0.5, philox=torch.ones(2)), ValueError, "philox is torch.float32",
    ),
    "philox shape": (
        lambda: add_layer_norm(X, X, (8,), dropout_p=0.5, philox=torch.tensor([1])), ValueError, r"of shape \(1,\)",
    ),
    "philox not a tensor": (
        lambda: add_layer_norm(X, X, (8,), dropout_p=0.5, philox=(1, 2)), ValueError, "philox is tuple",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(backend, case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
