"""The recurrent layers on every backend: the error rule, the edge cases, dropouts, bad input, and life inside torch."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.models.rnn import gru_with_state_dropout
from bigkern.ops import gru, lstm, rnn
from bigkern.ops.rnn import _torch
from bigkern.ops.rnn._schema import CELLS, GATES, VARIANTS
from tests import numerics
from tests.conftest import pick

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
OURS = {"RNN_TANH": rnn, "RNN_RELU": functools.partial(rnn, nonlinearity="relu"), "LSTM": lstm, "GRU": gru}
TORCHS = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "LSTM": torch.lstm, "GRU": torch.gru}

modes = pytest.mark.parametrize("mode", CELLS)


@dataclass(frozen=True)
class Form:
    """A stack of layers; its inputs in order are input, the states, and torch's flat list of parameters."""

    mode: str = "LSTM"
    features: int = 5
    hidden: int = 7
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def states(self) -> int:
        return 2 if self.mode == "LSTM" else 1

    @property
    def batch_sizes(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(max(self.lengths))])

    @property
    def names(self) -> list[str]:
        cells = self.layers * (2 if self.bidirectional else 1)
        params = ["W_ih", "W_hh", "b_ih", "b_hh"][: 4 if self.bias else 2]
        return ["input", "h0", "c0"][: 1 + self.states] + [f"{name} of {i}" for i in range(cells) for name in params]

    def inputs(self, steps=4, batch=3, dtype=F32, device="cpu", grad=True, scale=1.0, seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        directions = 2 if self.bidirectional else 1
        if self.lengths is not None:
            batch, shape = len(self.lengths), (sum(self.lengths), self.features)
        else:
            shape = (batch, steps, self.features) if self.batch_first else (steps, batch, self.features)
        state = (self.layers * directions, batch, self.hidden)
        shapes = [(shape, scale)] + [(state, 1.0)] * self.states
        gates = GATES[CELLS.index(self.mode)] * self.hidden
        for layer in range(self.layers):
            width = self.features if layer == 0 else directions * self.hidden
            one = [(gates, width), (gates, self.hidden), (gates,), (gates,)][: 4 if self.bias else 2]
            shapes += [(shape, self.hidden**-0.5) for shape in one * directions]
        return [
            (torch.randn(shape, generator=generator) * factor).to(device, dtype).requires_grad_(grad)
            for shape, factor in shapes
        ]

    def kernel(self, *tensors: Tensor, dropout=0.0, train=False, **options):
        x, states, params = tensors[0], tensors[1 : 1 + self.states], list(tensors[1 + self.states :])
        hx = states if self.mode == "LSTM" else states[0]
        rest = (self.bias, self.layers, dropout, train, self.bidirectional, self.batch_first)
        return OURS[self.mode](x, hx, params, *rest, batch_sizes=self.batch_sizes, **options)

    def reference(self, *tensors: Tensor, dropout=0.0, train=False):
        x, states, params = tensors[0], tensors[1 : 1 + self.states], list(tensors[1 + self.states :])
        hx = list(states) if self.mode == "LSTM" else states[0]
        rest = (hx, params, self.bias, self.layers, dropout, train, self.bidirectional)
        if self.lengths is not None:
            return TORCHS[self.mode](x, self.batch_sizes, *rest)
        return TORCHS[self.mode](x, *rest, self.batch_first)


def check(form: Form, inputs=None, **options):
    inputs = form.inputs(**options) if inputs is None else inputs
    numerics.check(form.kernel, form.reference, inputs, names=form.names)


# The error rule


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    pick(
        [(1, 1, 1, 1), (3, 2, 1, 5), (2, 1, 7, 16), (5, 8, 3, 17), (3, 9, 6, 31), (2, 17, 5, 8), (4, 3, 5, 129)],
        [(3, 2, 1, 5), (2, 9, 6, 17)],
    ),
    ids=str,
)
def test_sizes(backend, device, mode, dtype, sizes):
    steps, batch, features, hidden = sizes
    check(Form(mode, features, hidden), steps=steps, batch=batch, dtype=dtype, device=device)


GRID = list(itertools.product(CELLS, [1, 2], [False, True], [False, True], [False, True], [True, False]))


@pytest.mark.parametrize(
    ("mode", "layers", "bidirectional", "batch_first", "packed", "bias"),
    pick(GRID, [("LSTM", 2, True, True, False, True), ("GRU", 2, True, False, True, True),
                ("RNN_TANH", 1, True, False, True, False), ("LSTM", 1, True, False, True, False),
                ("GRU", 1, False, True, False, False), ("RNN_RELU", 2, False, False, True, True)]),
)  # fmt: skip
@pytest.mark.parametrize("dtype", pick(DTYPES, [F32]), ids=str)
def test_grid(backend, device, mode, layers, bidirectional, batch_first, packed, bias, dtype):
    if packed and batch_first:
        pytest.skip("a packed batch has one layout")
    lengths = (5, 5, 3, 1) if packed else None
    form = Form(mode, 3, 11, layers, bidirectional, bias, batch_first, lengths)
    check(form, dtype=dtype, device=device)


@modes
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scales(backend, device, mode, scale):
    inputs = Form(mode).inputs(dtype=F32, device=device, scale=scale)
    inputs[1 : 1 + Form(mode).states] = [
        (state.detach() * min(scale, 1.0)).requires_grad_() for state in inputs[1 : 1 + Form(mode).states]
    ]
    check(Form(mode), inputs)


@pytest.mark.parametrize(
    ("mode", "dtype", "steps"),
    pick(
        [(mode, dtype, 2000) for mode in ("LSTM", "GRU", "RNN_TANH") for dtype in DTYPES],
        [("RNN_TANH", BF16, 2000), ("GRU", BF16, 300), ("LSTM", F32, 300)],
    ),
)
def test_long_sequences(backend, device, mode, dtype, steps):
    """Rounding must not grow with the number of steps beyond torch's own."""
    if backend == "torch":
        pytest.skip("torch beside itself")
    if backend == "triton" and device.type == "cpu":
        steps = min(steps, 24)  # interpreted
    check(Form(mode, 2, 8), steps=steps, batch=1, dtype=dtype, device=device)


def test_float64(backend, device):
    form = Form("GRU")
    inputs = form.inputs(dtype=torch.float64, device=device)
    if backend == "torch":
        check(form, inputs)
    else:
        with pytest.raises(bigkern.BackendError, match=r"float64(.|\n)*torch: could serve them"):
            form.kernel(*inputs)


def test_a_projection_is_torchs_alone(backend, device):
    module = torch.nn.LSTM(4, 6, proj_size=3).to(device)
    x, h, c = (torch.randn(*shape, device=device) for shape in ((5, 2, 4), (1, 2, 3), (1, 2, 6)))
    arguments = (x, (h, c), module._flat_weights, True, 1, 0.0, False, False, False)
    if backend == "torch":
        assert torch.equal(lstm(*arguments)[0], module(x, (h, c))[0])
    else:
        with pytest.raises(bigkern.BackendError, match="proj_size"):
            lstm(*arguments)


# Layouts, gradients


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "odd offset", "column stride"])
def test_layouts(backend, device, mode, layout):
    form = Form(mode)
    laid = []
    for tensor in form.inputs(device=device):
        values = tensor.detach()
        if layout == "transposed":
            values = values.mT.contiguous().mT if values.dim() > 1 else values
        elif layout == "expanded":
            values = values[:, :1].expand_as(values) if values.dim() == 3 else values
        elif layout == "odd offset":
            storage = torch.empty(values.numel() + 1, device=values.device)
            values = storage[1:].view(values.shape).copy_(values)
        else:
            values = torch.stack([values, values], -1)[..., 0]
        laid.append(values.requires_grad_())
    check(form, laid)


@modes
def test_non_contiguous_gradients_of_outputs(backend, device, mode):
    form = Form(mode)

    def turned(function):
        return lambda *inputs: [y.mT for y in function(*inputs)]

    numerics.check(turned(form.kernel), turned(form.reference), form.inputs(batch=17, device=device), names=form.names)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("wanted", range(7))
def test_gradient_of_one_input_only(backend, device, mode, wanted):
    form = Form(mode)
    inputs = form.inputs(batch=17, device=device, grad=False)
    inputs[min(wanted, len(inputs) - 1)].requires_grad_()
    check(form, inputs)


@modes
@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_output_only(backend, device, mode, used):
    form = Form(mode)

    def one(function):
        return lambda *inputs: function(*inputs)[min(used, form.states)]

    # Enough elements for roundings to average: over few, the ratio of two errors is luck.
    numerics.check(one(form.kernel), one(form.reference), form.inputs(batch=17, device=device), names=form.names)


def test_no_graph_without_gradients(backend, device):
    form = Form()
    inputs = form.inputs(device=device)
    with torch.no_grad():
        assert not any(y.requires_grad for y in form.kernel(*inputs))
    with torch.inference_mode():
        form.kernel(*inputs)


def test_gradients_accumulate(backend, device):
    form = Form("GRU")
    inputs = form.inputs(device=device)
    for _ in range(2):
        form.kernel(*inputs)[0].square().sum().backward()
    once = torch.autograd.grad(form.kernel(*inputs)[0].square().sum(), inputs)
    for x, grad in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)


# Nothing, NaN


@modes
def test_no_sequences(backend, device, mode):
    form = Form(mode)
    outputs, grads = numerics.run(form.kernel, form.inputs(batch=0, device=device))
    torch_outputs, torch_grads = numerics.run(form.reference, form.inputs(batch=0, device=device))
    for mine, torchs in zip(outputs + grads, torch_outputs + torch_grads, strict=True):
        assert mine.shape == torchs.shape and torch.equal(mine, torchs)


@modes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sequence_stays_alone(backend, device, mode, bad):
    form = Form(mode)
    inputs = form.inputs(device=device, grad=False)
    clean = form.kernel(*inputs)
    inputs[0][1, 1, 2] = bad
    for mine, before, torchs in zip(form.kernel(*inputs), clean, form.reference(*inputs), strict=True):
        torch.testing.assert_close(mine[:, [0, 2]], before[:, [0, 2]])
        assert torch.equal(mine.isnan(), torchs.isnan())
    if bad != bad:
        inputs[0].requires_grad_()
        (grad,) = torch.autograd.grad(form.kernel(*inputs)[0].sum(), inputs[0])
        assert grad[:, [0, 2]].isfinite().all()
        assert grad[0, 1].isnan().any() or mode == "RNN_RELU"  # whose gradient at NaN is a choice


# Dropouts


def test_dropout_between_layers(backend, device):
    form = Form("GRU", layers=2)
    inputs = form.inputs(device=device)

    def call(seed, **options):
        torch.manual_seed(seed)
        return form.kernel(*inputs, **options)

    plain = call(1)[0]
    assert torch.equal(call(1, dropout=0.5)[0], plain)  # not in training
    dropped = call(1, dropout=0.5, train=True)
    again, other = call(1, dropout=0.5, train=True), call(2, dropout=0.5, train=True)
    assert torch.equal(dropped[0], again[0]) and not torch.equal(dropped[0], other[0])
    assert torch.equal(dropped[1][0], call(1)[1][0])  # the first layer's state comes before any dropout
    # With everything dropped the second layer reads zeros.
    nothing = call(1, dropout=1.0, train=True)[0]
    second = Form("GRU", features=7)
    params = [p.detach() for p in inputs[2:]]
    expected = second.reference(torch.zeros(4, 3, 7, device=device), inputs[1][1:].detach(), *params[4:])
    torch.testing.assert_close(nothing.detach(), expected[0])


@pytest.mark.parametrize("train", [True, False])
def test_recurrent_dropout(backend, device, train):
    """One mask a sequence for all steps, on what W_hh reads and not on the state that is carried on."""
    module = torch.nn.GRU(5, 7, batch_first=True).to(device)
    x = torch.randn(3, 6, 5, device=device, requires_grad=True)
    h0 = torch.zeros(1, 3, 7, device=device)
    leaves = [x, *module.parameters()]
    torch.manual_seed(5)
    mask = torch.dropout(torch.ones(1, 3, 7, device=device), 0.4, train)[0]
    expected = gru_with_state_dropout(module, x, mask)
    torch.manual_seed(5)
    found, last = gru(x, h0, module._flat_weights, True, 1, 0.0, train, False, True, recurrent_dropout=0.4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last[0], expected[:, -1])
    weights = torch.randn_like(found)
    for mine, its in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, its)


@modes
def test_recurrent_dropout_is_the_same_on_every_backend(backend, device, mode):
    form = Form(mode, bidirectional=True, layers=2, lengths=(4, 3, 1))
    inputs = form.inputs(device=device)

    def run():
        torch.manual_seed(3)
        return numerics.run(functools.partial(form.kernel, train=True, recurrent_dropout=0.3), inputs)

    mine = run()
    with bigkern.use_backend("torch"):
        torchs = run()
    for a, b in zip(mine[0] + mine[1], torchs[0] + torchs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Zoneout and layer-normalised cells: the CUDA kernels have the first, the torch backend both


def random_norms(form: Form, dtype=torch.float64) -> list[Tensor]:
    """layer_norm's tensors for each direction of one layer."""
    generator = torch.Generator().manual_seed(4)
    rows = GATES[CELLS.index(form.mode)] * form.hidden
    sizes = [rows, rows] + ([form.hidden] * 2 if form.mode == "LSTM" else [])
    directions = 2 if form.bidirectional else 1
    return [(1 + 0.3 * torch.randn(n, generator=generator)).to(dtype) for n in sizes * directions * form.layers]


def step_by_step(form: Form, tensors: list[Tensor], norms: list[Tensor] | None, zones=(0.0, 0.0)) -> list[Tensor]:
    """One layer and direction as the papers write it, unpacked; zones are the weights of the old states."""
    x, states, (w_ih, w_hh, b_ih, b_hh) = tensors[0], tensors[1 : 1 + form.states], tensors[1 + form.states :]
    h, c = states[0][0], states[-1][0]

    def norm(a, i):
        if norms is None:
            return a
        a = (a - a.mean(1, keepdim=True)) * (a.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
        return a * norms[i]

    outputs = []
    for row in x:
        of_input, of_state = norm(row @ w_ih.t(), 0) + b_ih, norm(h @ w_hh.t(), 1) + b_hh
        if form.mode == "LSTM":
            i, f, g, o = (of_input + of_state).chunk(4, 1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * (new_c if norms is None else norm(new_c, 2) + norms[3]).tanh()
            c = zones[1] * c + (1 - zones[1]) * new_c
        elif form.mode == "GRU":
            (xr, xz, xn), (ar, az, an) = of_input.chunk(3, 1), of_state.chunk(3, 1)
            z = (xz + az).sigmoid()
            new_h = (1 - z) * (xn + (xr + ar).sigmoid() * an).tanh() + z * h
        else:
            new_h = (of_input + of_state).tanh() if form.mode == "RNN_TANH" else (of_input + of_state).relu()
        h = zones[0] * h + (1 - zones[0]) * new_h
        outputs.append(h)
    return [torch.stack(outputs), h[None], *([c[None]] if form.mode == "LSTM" else [])]


def refused(backend, form, inputs, **options) -> bool:
    """Whether the backend has no such cells, of which it must say why."""
    if backend == "torch" or (backend == "cuda" and "layer_norm" not in options):
        return False
    with pytest.raises(bigkern.BackendError, match=f"{backend}: {next(iter(options))} given(.|\n)*torch: could serve"):
        form.kernel(*inputs, **options)
    return True


@modes
@pytest.mark.parametrize("normalised", [False, True], ids=["zoneout", "layer_norm"])
def test_zoneout_and_layer_norm_are_the_papers(backend, device, mode, normalised):
    """In evaluation, where zoneout is its mean; outputs and gradients of everything."""
    form = Form(mode, 3, 5)
    norms = random_norms(form) if normalised else None
    zones = (0.0, 0.0) if normalised else (0.3, 0.2)
    options = dict(layer_norm=[n.float().to(device) for n in norms]) if normalised else dict(zoneout=zones[0])
    if mode == "LSTM" and not normalised:
        options["cell_zoneout"] = zones[1]
    if refused(backend, form, form.inputs(device=device), **options):
        return
    inputs = form.inputs(dtype=torch.float64 if backend == "torch" else F32, device=device)
    norms = [n.to(device).requires_grad_() for n in norms or ()]

    def mine(*tensors):
        own = tensors[len(inputs) :]
        return form.kernel(*tensors[: len(inputs)], **{**options, **({"layer_norm": own} if own else {})})

    def papers(*tensors):
        return step_by_step(form, tensors[: len(inputs)], list(tensors[len(inputs) :]) or None, zones)

    for found, expected in zip(
        numerics.run(mine, [*inputs, *norms]), numerics.run(papers, [*inputs, *norms]), strict=True
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@modes
@pytest.mark.parametrize("train", [True, False])
def test_zoneout_is_the_same_on_every_backend(backend, device, mode, train):
    """From the same seed the same draws; packed, two directions, two layers, with recurrent dropout beside it."""
    if backend == "torch":
        pytest.skip("torch beside itself")
    form = Form(mode, bidirectional=True, layers=2, lengths=(4, 3, 1))
    inputs = form.inputs(device=device)
    options = dict(train=train, zoneout=0.4, recurrent_dropout=0.2)
    if mode == "LSTM":
        options["cell_zoneout"] = 0.3
    if backend == "triton":
        assert refused(backend, form, inputs, zoneout=0.4)
        return

    def run():
        torch.manual_seed(3)
        return numerics.run(functools.partial(form.kernel, **options), inputs)

    mine = run()
    with bigkern.use_backend("torch"):
        torchs = run()
    for a, b in zip(mine[0] + mine[1], torchs[0] + torchs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if not train:  # also where the gradient is differentiated
        second = second_order(functools.partial(form.kernel, **options), inputs)
        with bigkern.use_backend("torch"):
            expected = second_order(functools.partial(form.kernel, **options), inputs)
        for a, b in zip(second, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer_norm", [False, True])
@modes
def test_no_sequences_with_zoneout_or_layer_norm(backend, device, mode, layer_norm):
    """Gradients are zeros, as torch's without either."""
    form = Form(mode, bidirectional=True, layers=2)
    norms = [n.to(device).requires_grad_() for n in random_norms(form, F32)] if layer_norm else None
    options = dict(layer_norm=norms) if layer_norm else dict(zoneout=0.5, train=True)
    inputs = form.inputs(batch=0, device=device)
    if refused(backend, form, inputs, **options):
        return
    outputs = form.kernel(*inputs, **options)
    plain = form.reference(*inputs)
    assert [y.shape for y in outputs] == [y.shape for y in plain]
    grads = torch.autograd.grad(outputs, [*inputs, *(norms or ())], [torch.ones_like(y) for y in outputs])
    for tensor, grad in zip([*inputs, *(norms or ())], grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@modes
def test_zoneout_keeps_units_at_random(mode):
    """While training each unit's state is the old one or the cell's new one, at the rate that was asked for."""
    form = Form(mode, 3, 40)
    inputs = form.inputs(steps=6, batch=9, grad=False)
    with bigkern.use_backend("torch"):
        torch.manual_seed(1)
        output, *last = form.kernel(*inputs, train=True, zoneout=0.3)
        torch.manual_seed(1)
        assert torch.equal(output, form.kernel(*inputs, train=True, zoneout=0.3)[0])
        assert not torch.equal(output, form.kernel(*inputs, train=True, zoneout=0.3)[0])
        still = form.kernel(*inputs, train=True, zoneout=1.0)
    assert torch.equal(still[0], inputs[1].expand_as(still[0]))
    old, state, kept = inputs[1], inputs[2:3] if mode == "LSTM" else [], []
    for row, new in zip(inputs[0], output, strict=True):
        one, _, *state = step_by_step(form, [row[None], old, *state, *inputs[1 + form.states :]], None)
        is_old = new == old[0]
        torch.testing.assert_close(torch.where(is_old, one[0], new), one[0])
        kept.append(is_old)
        old = new[None]
    assert torch.equal(last[0], output[-1:])
    if mode == "LSTM":
        torch.testing.assert_close(last[1], state[0])  # cell_zoneout is 0: c is never kept
    if mode != "RNN_RELU":  # where a new 0 after an old one looks kept
        assert torch.stack(kept).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_zoneout_and_layer_norm_of_packed_stacks():
    """Both together, packed, two directions: a sequence's result is that of the sequence alone."""
    form = Form("LSTM", 3, 5, bidirectional=True, lengths=(4, 2))
    inputs, norms = form.inputs(dtype=torch.float64), random_norms(form)
    options = dict(zoneout=0.2, cell_zoneout=0.4, layer_norm=norms)
    with bigkern.use_backend("torch"):
        output, hn, cn = form.kernel(*inputs, **options)
        short = Form("LSTM", 3, 5, bidirectional=True)
        rows = [1, 3]  # the second sequence's
        states = [state[:, 1:] for state in inputs[1:3]]
        alone = short.kernel(inputs[0][rows].unsqueeze(1), *states, *inputs[3:], **options)
        torch.testing.assert_close(output[rows], alone[0][:, 0])
        torch.testing.assert_close(hn[:, 1:], alone[1])
        torch.testing.assert_close(cn[:, 1:], alone[2])
        assert torch.autograd.gradgradcheck(lambda *tensors: form.kernel(*tensors, **options), inputs, fast_mode=True)


def test_bad_layer_norm_and_zoneout(backend, device):
    form = Form("GRU", 3, 5)
    inputs, norms = form.inputs(device=device), [n.to(device) for n in random_norms(form, F32)]
    for options, error, message in [
        (dict(zoneout=1.5), ValueError, "gru: zoneout is 1.5"),
        (dict(layer_norm=norms[:1]), ValueError, "layer_norm holds 1 tensors; expected 2, 2 for each"),
        (dict(layer_norm=[norms[0], norms[1][:5]]), ValueError, r"layer_norm\[1\] is \(5,\); expected .* \(15,\)"),
        (dict(layer_norm=[norms[0], norms[1].long()]), TypeError, r"layer_norm\[1\] has dtype torch.int64"),
        (dict(layer_norm=[norms[0], norms[1].to("meta")]), ValueError, r"layer_norm\[1\] is on meta"),
    ]:
        with pytest.raises(error, match=message):
            form.kernel(*inputs, **options)


# Repeated runs


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_runs_are_bitwise_equal(backend, device, dtype):
    form = Form("LSTM", hidden=40, bidirectional=True)
    inputs = form.inputs(dtype=dtype, device=device)
    first, second = (numerics.run(form.kernel, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


# Inside torch


def raw_arguments(cell: int, device, packed: bool):
    torch.manual_seed(cell)
    hidden, directions, gates = 6, 2, GATES[cell]
    lengths = [3, 2] if packed else [3, 3]
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(3)])
    rows = sum(lengths)

    def data(*shape):
        return torch.randn(*shape).to(device)

    return (
        data(rows, directions * gates * hidden),
        data(directions, gates * hidden, hidden) / 3,
        data(directions, hidden) if CELLS[cell] == "GRU" else None,
        data(directions, 2, hidden),
        data(directions, 2, hidden) if CELLS[cell] == "LSTM" else None,
        None,
        (sizes.cumsum(0) - sizes).to(device) if packed else None,
        torch.tensor(lengths, device=device) if packed else None,
        cell,
    )


@pytest.mark.parametrize("cell", range(4), ids=CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_raw_ops(backend, device, cell, packed):
    """opcheck; and every result beside the torch backend's statement of the mathematics."""
    arguments = raw_arguments(cell, device, packed)
    expected = _torch.forward(*arguments, True)
    grads = [torch.randn_like(expected[i]) for i in range(3)]
    rest = (expected[0], expected[3], arguments[1], *arguments[3:])
    expected_grads = _torch.backward(grads[0], grads[1], grads[2] if CELLS[cell] == "LSTM" else None, *rest)
    if backend == "torch":
        leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments[:-1]]
        outputs = _torch.forward(*leaves, cell, False)[: 3 if CELLS[cell] == "LSTM" else 2]
        found = torch.autograd.grad(outputs, [leaves[0], leaves[3]], grads[: len(outputs)])
        torch.testing.assert_close(found[0], expected_grads[0])
        torch.testing.assert_close(found[1], expected_grads[2])
        return
    raw = getattr(torch.ops, f"bigkern_{backend}")
    forward = (*arguments, True, 0)
    backward = (grads[0], grads[1], grads[2] if CELLS[cell] == "LSTM" else None, *expected[::3])
    backward += (arguments[1].mT.contiguous(), *arguments[3:], 0)
    found = raw.rnn_forward.default(*forward), raw.rnn_backward.default(*backward)
    for mine, its in zip(found[0] + found[1], expected + expected_grads, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(raw.rnn_forward.default, forward)
    torch.library.opcheck(raw.rnn_backward.default, backward)


@pytest.mark.parametrize(("variant", "dtype"), [("block", BF16), ("step", BF16), ("step", F32)], ids=str)
@pytest.mark.parametrize("cell", range(4), ids=CELLS)
def test_triton_runs_all_steps_in_one_program_or_each_in_one(backend, device, cell, dtype, variant):
    """More sequences than a program takes, a mask, two directions, ragged and not; beside float64."""
    if backend != "triton":
        pytest.skip("the CUDA kernels' variants are tested with the kernels")
    generator = torch.Generator().manual_seed(cell)
    hidden, directions, gates = 19, 2, GATES[cell]

    def data(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    for lengths in ([2] * 3, [3, 2, 2] + [1] * 15):
        batch, packed = len(lengths), lengths[0] != lengths[-1]
        sizes = torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])
        state = (directions, batch, hidden)
        arguments = (
            data(sum(lengths), directions * gates * hidden),
            data(directions, gates * hidden, hidden, scale=hidden**-0.5),
            data(directions, hidden) if CELLS[cell] == "GRU" else None,
            data(*state),
            data(*state) if CELLS[cell] == "LSTM" else None,
            (torch.rand(state, generator=generator) < 0.7).to(device, dtype),
            (sizes.cumsum(0) - sizes).to(device) if packed else None,
            torch.tensor(lengths, device=device) if packed else None,
            cell,
            True,
        )
        found = torch.ops.bigkern_triton.rnn_forward.default(*arguments, VARIANTS.index(variant))
        exact = _torch.forward(*(numerics.to_double(a) if isinstance(a, Tensor) else a for a in arguments))
        grads = [data(*y.shape) for y in found[:2]] + [data(*state) if arguments[4] is not None else None]
        rest = (arguments[1].mT.contiguous(), *arguments[3:9])
        found += torch.ops.bigkern_triton.rnn_backward.default(
            *grads, found[0], found[3], *rest, VARIANTS.index(variant)
        )
        kept = (*grads, found[0], found[3], arguments[1], *arguments[3:9])
        exact += _torch.backward(*(numerics.to_double(a) if isinstance(a, Tensor) else a for a in kept))
        for mine, truth in zip(found, exact, strict=True):
            assert mine.shape == truth.shape and mine.dtype == dtype
            error = (mine.double() - truth).norm() / truth.norm() if truth.numel() else 0
            assert error <= (1.5 * torch.finfo(dtype).eps if dtype == BF16 else 5e-7)


def test_triton_refuses_variants_that_it_has_not(backend, device):
    if backend != "triton":
        pytest.skip("the CUDA kernels' refusals are tested with the kernels")
    arguments = raw_arguments(0, device, False)
    for variant in ("grid", "flags"):
        with pytest.raises(ValueError, match=f"variant is '{variant}'"):
            torch.ops.bigkern_triton.rnn_forward.default(*arguments, True, VARIANTS.index(variant))
    with pytest.raises(ValueError, match="the Triton kernels have no zoneout"):
        torch.ops.bigkern_triton.rnn_forward.default(*arguments, True, 0, zoneout=0.5)
    wide = [torch.zeros(6, 400, device=device), torch.zeros(2, 200, 200, device=device), None]
    wide += [torch.zeros(2, 2, 200, device=device), None, None, None, None, 0, True]
    with pytest.raises(ValueError, match="no program holds 200 hidden units in torch"):
        torch.ops.bigkern_triton.rnn_forward.default(*wide, VARIANTS.index("block"))


@modes
def test_gradcheck_and_gradgradcheck(mode):
    """In float64, which the torch backend serves; the other backends' second order is compared with torch's below."""
    form = Form(mode, 2, 2, bidirectional=True, lengths=(2, 1))
    inputs = form.inputs(dtype=torch.float64)
    with bigkern.use_backend("torch"):
        assert torch.autograd.gradcheck(form.kernel, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(form.kernel, inputs)


def second_order(function, inputs):
    outputs = function(*inputs)
    cotangents = [numerics.cotangent(y, i).requires_grad_() for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
    penalty = sum(grad.square().sum() * (i + 1) for i, grad in enumerate(grads))
    return torch.autograd.grad(penalty, [*inputs, *cotangents], allow_unused=True)


@modes
def test_double_backward_is_torchs(backend, device, mode):
    form = Form(mode, 2, 3, lengths=(3, 1))
    inputs = form.inputs(device=device)
    doubles = [numerics.to_double(x) for x in inputs]
    for mine, torchs in zip(second_order(form.kernel, inputs), second_order(form.reference, doubles), strict=True):
        torch.testing.assert_close(mine.double(), torchs, rtol=1e-4, atol=1e-4)


@modes
def test_forward_mode_and_functorch(backend, device, mode):
    form = Form(mode, 2, 3)
    inputs = form.inputs(steps=2, batch=2, device=device, grad=False)
    doubles = [numerics.to_double(x) for x in inputs]
    tangents = [torch.randn_like(x) for x in inputs]
    mine = torch.func.jvp(form.kernel, tuple(inputs), tuple(tangents))[1]
    torchs = torch.func.jvp(form.reference, tuple(doubles), tuple(t.double() for t in tangents))[1]
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    def scalar(function):
        return lambda *tensors: sum(y.square().sum() for y in function(*tensors))

    every = tuple(range(len(inputs)))
    mine, torchs = (
        torch.func.grad(scalar(f), every)(*x) for f, x in ((form.kernel, inputs), (form.reference, doubles))
    )
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    batched = torch.func.vmap(lambda x: form.kernel(x, *inputs[1:])[0])(torch.stack([inputs[0], 2 * inputs[0]]))
    torch.testing.assert_close(batched[1], form.kernel(2 * inputs[0], *inputs[1:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", pick(CELLS, ["LSTM", "GRU"]))
def test_compile_fullgraph(backend, device, mode):
    form = Form(mode, bidirectional=True)
    inputs = form.inputs(steps=2, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(form.kernel, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(numerics.run(compiled, inputs), numerics.run(form.kernel, inputs), strict=True):
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_packed(backend, device):
    """Whole on the kernels; torch's own decomposition of a packed layer reads the batch sizes, and says so."""
    form = Form("GRU", bidirectional=True, lengths=(4, 3, 1))
    inputs, batch_sizes = form.inputs(device=device), form.batch_sizes

    def call(*tensors):
        return gru(tensors[0], tensors[1], list(tensors[2:]), True, 1, 0.0, False, True, False, batch_sizes=batch_sizes)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if backend == "torch":
        with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
            compiled(*inputs)
        return
    for mine, eager in zip(numerics.run(compiled, inputs), numerics.run(call, inputs), strict=True):
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Model(torch.nn.Module):
    """Two layers and directions, then a cell."""

    def __init__(self):
        super().__init__()
        self.gru = bigkern.nn.GRU(4, 6, num_layers=2, bidirectional=True)
        self.cell = bigkern.nn.LSTMCell(12, 5)

    def forward(self, x):
        return self.cell(self.gru(x)[0][-1])[0]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(backend, device, strict):
    module, sequences = Model().to(device), torch.export.Dim("sequences", min=2, max=64)
    x = torch.randn(3, 5, 4, device=device)
    program = torch.export.export(module, (x,), strict=strict, dynamic_shapes={"x": {1: sequences}})
    for batch in (x, torch.randn(3, 9, 4, device=device)):
        torch.testing.assert_close(program.module()(batch), module(batch), rtol=1e-4, atol=1e-5)
    ops = program.graph_module.print_readable(print_output=False)
    assert (f"bigkern_{backend}.rnn_forward" in ops) == (backend != "torch")


def _train_in_parallel(rank: int, backend: str, device: str, port: int, folder: str) -> None:
    import torch.distributed as dist

    if backend == "cuda" and device == "cpu":
        from tests import emulated

        emulated.load("plain")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with bigkern.use_backend(backend):
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(Model().to(device))
        x = torch.randn(3, 8, 4).to(device)
        model(x[:, rank::2]).square().mean().backward()
    torch.save([p.grad.cpu() for p in model.parameters()], os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # not by way of destructors: see test_layer_norm_integration.py


def test_distributed_data_parallel(backend, device, tmp_path):
    """Two processes with half the batch each end with the gradients of one with the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (backend, device.type, port, str(tmp_path))
    processes = torch.multiprocessing.spawn(_train_in_parallel, arguments, nprocs=2, join=False)
    deadline = time.monotonic() + 300
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the two processes hang"
    torch.manual_seed(0)
    model = Model().to(device)
    model(torch.randn(3, 8, 4).to(device)).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for mine, whole in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(mine, whole.grad.cpu(), rtol=1e-4, atol=1e-6)


def test_checkpoint_redraws_the_same_masks(backend, device):
    form = Form("GRU", layers=2)
    inputs = form.inputs(device=device)

    def total(*tensors):
        return form.kernel(*tensors, dropout=0.5, train=True, recurrent_dropout=0.3)[0].square().sum()

    torch.manual_seed(0)
    expected = torch.autograd.grad(total(*inputs), inputs)
    torch.manual_seed(0)
    loss = checkpoint(total, *inputs, use_reentrant=False)
    torch.rand(5, device=device)  # the generator moves on between forward and recomputation
    for mine, its in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("hidden", [64, 512])
def test_cuda_graph_replays(backend, device, mode, hidden):
    form = Form(mode, 32, hidden)
    inputs = form.inputs(steps=20, batch=16, dtype=BF16, device=device, grad=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        form.kernel(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = form.kernel(*inputs)
    for seed in range(3):
        inputs[0].copy_(form.inputs(steps=20, batch=16, dtype=BF16, seed=seed)[0])
        graph.replay()
        for mine, eager in zip(outputs, form.kernel(*inputs), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.cuda
def test_autocast(backend, device):
    form = Form("LSTM")
    inputs = form.inputs(device=device)
    with torch.autocast("cuda", BF16):
        outputs, grads = numerics.run(form.kernel, inputs)
    assert all(y.dtype == BF16 for y in outputs) and all(g.dtype == F32 for g in grads)


# Bad input


def arguments(**changes):
    """A good call of lstm with some of its arguments changed."""
    x, h, c, *params = Form().inputs(grad=False)
    good = dict(
        input=x, hx=(h, c), params=params, has_biases=True, num_layers=1, dropout=0.0, train=False,
        bidirectional=False, batch_first=False,
    )  # fmt: skip
    return {**good, **changes}


X, H = Form().inputs(grad=False)[:2]
W = Form().inputs(grad=False)[3:]
REFUSED = {
    "features": (dict(input=X[:, :, :4]), ValueError, r"params\[0\] has shape \(28, 5\); expected \(28, 4\)"),
    "dimensions": (dict(input=X[0]), ValueError, r"input has shape \(3, 5\); expected \(steps, batch, features\)"),
    "not a tensor": (dict(input=[1.0]), TypeError, "input is a list"),
    "integers": (dict(input=X.long()), TypeError, "input has dtype torch.int64"),
    "h0 shape": (dict(hx=(H[:, :2], H)), ValueError, r"hx has shape \(1, 2, 7\); expected \(1, 3, 7\)"),
    "one state": (dict(hx=(H,)), ValueError, "hx holds 1 tensors; expected 2"),
    "params": (dict(params=W[:3]), ValueError, "params holds 3 tensors"),
    "layers": (dict(num_layers=2), ValueError, "params holds 4 tensors; 2 layers of 1 directions with biases have 8"),
    "no layers": (dict(num_layers=0), ValueError, "num_layers is 0"),
    "weight dtype": (dict(params=[W[0].half(), *W[1:]]), TypeError, r"params\[0\] has dtype torch.float16"),
    "device": (dict(hx=(H.to("meta"), H)), ValueError, "hx is on meta and input on cpu"),
    "dropout": (dict(dropout=1.5, train=True), ValueError, "dropout is 1.5"),
    "recurrent dropout": (dict(recurrent_dropout=-0.1, train=True), ValueError, "recurrent_dropout is -0.1"),
    "no steps": (dict(input=X[:0]), ValueError, "no steps"),
    "batch sizes rise": (
        dict(input=X[0], batch_sizes=torch.tensor([1, 2])), ValueError, r"batch_sizes is \[1, 2\].*do not rise",
    ),
    "batch sizes end in zero": (
        dict(input=X[0], batch_sizes=torch.tensor([3, 0])), ValueError, r"batch_sizes is \[3, 0\]",
    ),
    "batch sizes and rows": (
        dict(input=X[0], batch_sizes=torch.tensor([3, 1])), ValueError, r"\[3, 1\] for 3 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(backend, case):
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        lstm(**arguments(**changes))


def test_unknown_nonlinearity(backend):
    x, h, *params = Form("RNN_TANH").inputs(grad=False)
    with pytest.raises(ValueError, match="nonlinearity is 'gelu'; supported"):
        rnn(x, h, params, True, 1, 0.0, False, False, False, nonlinearity="gelu")
