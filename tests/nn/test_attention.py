"""Attention's modules stand for torch.nn's: constructors, parameters, state, masks, weights, Transformers, errors."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import warnings

import pytest
import torch

import bigkern.nn
from tests import numerics
from tests.conftest import pick

DIM, HEADS, BATCH, ROWS, COLS = 8, 2, 3, 5, 4
MODULES = {
    "MultiheadAttention": (DIM, HEADS),
    "TransformerEncoderLayer": (DIM, HEADS, 12),
    "TransformerDecoderLayer": (DIM, HEADS, 12),
    "Transformer": (DIM, HEADS, 2, 1, 12),
}
modules = pytest.mark.parametrize("name", MODULES)
layers = pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])


def pair(name, *args, device="cpu", **kwargs):
    """bigkern's module and torch's with the same weights, none of them 0."""
    args = args or MODULES[name]
    mine, theirs = (getattr(package, name)(*args, device=device, **kwargs) for package in (bigkern.nn, torch.nn))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def randn(*shape, device="cpu", seed=0, grad=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device).requires_grad_(grad)


def run(module, inputs, *args, **kwargs):
    """(outputs, gradients of the inputs that require one and of the parameters)."""
    outputs = module(*inputs, *args, **kwargs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    loss = sum((y * numerics.cotangent(y, i)).sum() for i, y in enumerate(outputs))
    wanted = [x for x in dict.fromkeys(inputs) if x.requires_grad]
    return outputs, torch.autograd.grad(loss, [*wanted, *module.parameters()], allow_unused=True)


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert x.shape == y.shape and x.dtype == y.dtype
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# Constructors and state


@pytest.mark.parametrize("name", [*MODULES, "TransformerEncoder", "TransformerDecoder"])
def test_constructor_is_torchs(name):
    mine, theirs = (inspect.signature(getattr(package, name)).parameters for package in (bigkern.nn, torch.nn))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert issubclass(getattr(bigkern.nn, name), getattr(torch.nn, name))


ARGUMENTS = [{}, {"bias": False, "batch_first": True}, {"dtype": torch.bfloat16, "dropout": 0.2}]
CONSTRUCTED = [(name, arguments) for name in MODULES for arguments in ARGUMENTS] + [
    ("MultiheadAttention", {"kdim": 6, "vdim": 3, "add_bias_kv": True}),
    ("TransformerEncoderLayer", {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("name", "arguments"), CONSTRUCTED, ids=str)
def test_parameters_keys_and_repr_are_torchs(name, arguments):
    built = []
    for package in (bigkern.nn, torch.nn):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if package is bigkern.nn else "ignore")
            built.append(getattr(package, name)(*MODULES[name], **arguments))
    mine, theirs = built
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert mine.state_dict()[key].dtype == value.dtype and torch.equal(mine.state_dict()[key], value)
    assert not mine.load_state_dict(theirs.state_dict()).missing_keys
    assert not theirs.load_state_dict(mine.state_dict()).missing_keys


def test_transformers_are_made_of_bigkerns_modules():
    model = bigkern.nn.Transformer(*MODULES["Transformer"])
    assert type(model.encoder) is bigkern.nn.TransformerEncoder
    assert type(model.decoder.layers[0]) is bigkern.nn.TransformerDecoderLayer
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention | torch.nn.LayerNorm):
            assert type(module).__module__.startswith("bigkern.nn")


def test_custom_halves_stay_what_they_are():
    layer = torch.nn.TransformerEncoderLayer(DIM, HEADS, 12)
    encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = bigkern.nn.Transformer(*MODULES["Transformer"], custom_encoder=encoder)
    assert model.encoder is encoder and type(encoder.layers[0].self_attn) is torch.nn.MultiheadAttention


@modules
def test_deepcopy_and_pickle(name):
    module = pair(name, dropout=0.0)[0].eval()
    inputs = [randn(ROWS, BATCH, DIM, seed=i) for i in range({"MultiheadAttention": 3}.get(name, 2))]
    inputs = inputs[:1] if name == "TransformerEncoderLayer" else inputs
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_same(run(twin, inputs), run(module, inputs))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


# Multi-head attention


def masks(kind, device):
    """(attn_mask, key_padding_mask); no row is hidden wholly."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape):
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False
        if "additive" in kind:
            return torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf).to(device)
        return hidden.to(device)

    attn_mask = drawn(*((BATCH * HEADS,) if "heads" in kind else ()), ROWS, COLS) if "attn" in kind else None
    return attn_mask, drawn(BATCH, COLS) if "padding" in kind else None


MASKS = [
    "none",
    "attn",
    "attn additive",
    "attn heads",
    "attn heads additive",
    "padding",
    "padding additive",
    "attn padding",
    "attn padding additive",
    "attn heads padding",
]
OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False, "add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True},
    {"kdim": 6, "vdim": 3, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "bias": False},
]
CROSSED = [(kind, options) for kind in MASKS for options in OPTIONS]


@pytest.mark.parametrize("need_weights", [False, True, "each head"])
@pytest.mark.parametrize(
    ("kind", "options"),
    pick(CROSSED, [(kind, OPTIONS[i % len(OPTIONS)]) for i, kind in enumerate(MASKS)]),
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_forward_and_gradients(backend, device, kind, options, need_weights):
    mine, theirs = pair("MultiheadAttention", device=device, **options)
    order = (0, 1, 2) if options.get("batch_first") else (1, 0, 2)
    inputs = [
        randn(BATCH, ROWS, DIM, device=device, seed=1),
        randn(BATCH, COLS, options.get("kdim", DIM), device=device, seed=2),
        randn(BATCH, COLS, options.get("vdim", DIM), device=device, seed=3),
    ]
    inputs = [x.detach().permute(order).requires_grad_() for x in inputs]
    attn_mask, padding = masks(kind, device)
    given = dict(
        attn_mask=attn_mask,
        key_padding_mask=padding,
        need_weights=bool(need_weights),
        average_attn_weights=need_weights is True,
    )
    assert_same(run(mine, inputs, **given), run(theirs, inputs, **given))


@pytest.mark.parametrize("shared", ["self", "key is value"])
@pytest.mark.parametrize("form", ["batch_first", "batch_second", "unbatched"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_shared_inputs(backend, device, shared, form, need_weights):
    mine, theirs = pair("MultiheadAttention", device=device, batch_first=form == "batch_first")
    shape = (ROWS, DIM) if form == "unbatched" else (BATCH, ROWS, DIM)
    query, key = (randn(*shape, device=device, seed=i) for i in range(2))
    inputs = [query] * 3 if shared == "self" else [query, key, key]
    padding = torch.zeros(shape[:-1] if form != "batch_second" else (ROWS, BATCH), dtype=torch.bool, device=device)
    padding[..., -1] = True
    given = dict(key_padding_mask=padding, need_weights=need_weights)
    assert_same(run(mine, inputs, **given), run(theirs, inputs, **given))


@pytest.mark.parametrize("mask_dim", [2, 3])
def test_unbatched_masks(backend, device, mask_dim):
    mine, theirs = pair("MultiheadAttention", device=device)
    x = randn(ROWS, DIM, device=device)
    attn_mask = torch.ones((HEADS, ROWS, ROWS)[3 - mask_dim :], device=device).triu(1).bool()
    assert_same(run(mine, [x] * 3, attn_mask=attn_mask), run(theirs, [x] * 3, attn_mask=attn_mask))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_causal_hint(backend, device, padded, need_weights):
    mine, theirs = pair("MultiheadAttention", device=device, batch_first=True)
    x = randn(BATCH, ROWS, DIM, device=device)
    causal = torch.ones(ROWS, ROWS, device=device).triu(1).bool()
    padding = torch.zeros(BATCH, ROWS, dtype=torch.bool, device=device)
    padding[1, 3:] = True
    given = dict(attn_mask=causal, key_padding_mask=padding if padded else None, need_weights=need_weights)
    wanted = run(theirs, [x] * 3, **given)
    for hint in (False, True):
        assert_same(run(mine, [x] * 3, is_causal=hint, **given), wanted)


def test_the_causal_hint_leaves_added_keys_visible(backend, device):
    mine, theirs = pair("MultiheadAttention", device=device, add_bias_kv=True)
    x = randn(ROWS, BATCH, DIM, device=device)
    causal = torch.ones(ROWS, ROWS, device=device).triu(1).bool()
    given = dict(attn_mask=causal, need_weights=False)
    assert_same(run(mine, [x] * 3, is_causal=True, **given), run(theirs, [x] * 3, **given))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing(backend, device, need_weights, additive):
    module = pair("MultiheadAttention", device=device, batch_first=True)[0]
    x = randn(BATCH, ROWS, DIM, device=device)
    padding = torch.zeros(BATCH, ROWS, dtype=torch.bool, device=device)
    padding[1] = True
    if additive:
        padding = torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf)
    (output, *weights), grads = run(module, [x] * 3, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(output[1], module.out_proj.bias.expand(ROWS, DIM))
    assert all(not w[1].any() for w in weights)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][1].any() and grads[0][0].any()


def test_mixed_masks_and_their_warning(device):
    mine, theirs = pair("MultiheadAttention", device=device, batch_first=True)
    x = randn(BATCH, ROWS, DIM, device=device)
    hidden = torch.ones(ROWS, ROWS, device=device).triu(1).bool()
    padding = torch.zeros(BATCH, ROWS, device=device)
    padding[:, -1] = -3.0
    additive = torch.randn(ROWS, ROWS, device=device)
    for attn_mask, key_padding_mask in ((hidden, padding), (additive, padding < 0)):
        results = []
        for module in (mine, theirs):
            with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
                results.append(run(module, [x] * 3, attn_mask=attn_mask, key_padding_mask=key_padding_mask))
        assert_same(*results)


def test_masks_are_not_expanded_to_heads(monkeypatch):
    module = bigkern.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    seen = []
    real = bigkern.nn.attention.attention
    monkeypatch.setattr(bigkern.nn.attention, "attention", lambda *a, **k: seen.append(a[3].shape) or real(*a, **k))
    x = randn(BATCH, ROWS, DIM)
    attn_mask, padding = torch.zeros(ROWS, ROWS), torch.zeros(BATCH, ROWS)
    module(x, x, x, padding, need_weights=False)
    module(x, x, x, attn_mask=attn_mask, need_weights=False)
    module(x, x, x, padding, attn_mask=attn_mask, need_weights=False)
    assert seen == [(BATCH, 1, 1, ROWS), (1, 1, ROWS, ROWS), (BATCH, 1, ROWS, ROWS)]


def test_a_mask_learns(backend, device):
    mine, theirs = pair("MultiheadAttention", device=device, batch_first=True)
    x, mask = randn(BATCH, ROWS, DIM, device=device), randn(ROWS, ROWS, device=device, seed=1)
    grads = [
        torch.autograd.grad(module(x, x, x, need_weights=False, attn_mask=mask)[0].square().sum(), mask)
        for module in (mine, theirs)
    ]
    assert_same(*([grad] for grad in grads))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_in_training_only(backend, device, need_weights):
    module = pair("MultiheadAttention", device=device, dropout=0.5)[0]
    x = randn(ROWS, BATCH, DIM, device=device)
    torch.manual_seed(1)
    first, second = (module(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    torch.manual_seed(1)
    again = module(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    module.eval()
    assert torch.equal(*(module(x, x, x, need_weights=need_weights)[0] for _ in range(2)))


def test_returned_weights_are_those_that_were_used(device):
    module = bigkern.nn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True, device=device)
    x = randn(BATCH, ROWS, DIM, device=device)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    value = torch.nn.functional.linear(x, module.in_proj_weight[2 * DIM :], module.in_proj_bias[2 * DIM :])
    heads = weights @ value.view(BATCH, ROWS, HEADS, DIM // HEADS).transpose(1, 2)
    torch.testing.assert_close(output, module.out_proj(heads.transpose(1, 2).reshape(BATCH, ROWS, DIM)))


@pytest.mark.parametrize("shape", [(0, ROWS, DIM), (BATCH, 0, DIM)])
def test_nothing_to_attend(backend, device, shape):
    module = bigkern.nn.MultiheadAttention(DIM, HEADS, batch_first=True, device=device)
    x = randn(*shape, device=device)
    padding = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    for need_weights in (False, True):
        (output, *_), grads = run(module, [x] * 3, key_padding_mask=padding, need_weights=need_weights)
        assert output.shape == shape and all(not grad.any() for grad in grads)


def test_autocast(backend, device):
    mine, theirs = pair("MultiheadAttention", device=device, batch_first=True)
    x = randn(BATCH, ROWS, DIM, device=device)
    mask = torch.zeros(ROWS, ROWS, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for need_weights in (False, True):
            ours, torchs = (m(x, x, x, attn_mask=mask, need_weights=need_weights) for m in (mine, theirs))
            assert ours[0].dtype == torchs[0].dtype == torch.bfloat16
            torch.testing.assert_close(ours[0], torchs[0], rtol=5e-2, atol=5e-2)


X, KEY = torch.zeros(ROWS, BATCH, DIM), torch.zeros(COLS, BATCH, DIM)
WRONG = {
    "query of 4 dimensions": (X[None], X, X, {}),
    "key of 2 dimensions": (X, X[0], X, {}),
    "unbatched query, batched key": (X[0], X, X, {}),
    "another embedding": (X[..., :4], X, X, {}),
    "key and value differ": (X, KEY, X, {}),
    "another batch": (X, KEY[:, :2], KEY[:, :2], {}),
    "integer attn_mask": (X, X, X, {"attn_mask": torch.zeros(ROWS, ROWS, dtype=torch.int64)}),
    "integer padding": (X, X, X, {"key_padding_mask": torch.zeros(BATCH, ROWS, dtype=torch.int64)}),
    "2-D mask": (X, X, X, {"attn_mask": torch.zeros(ROWS, COLS)}),
    "3-D mask": (X, X, X, {"attn_mask": torch.zeros(BATCH, ROWS, ROWS)}),
    "3-D mask unbatched": (X[:, 0], X[:, 0], X[:, 0], {"attn_mask": torch.zeros(3, ROWS, ROWS)}),
    "4-D mask": (X, X, X, {"attn_mask": torch.zeros(1, 1, ROWS, ROWS)}),
    "1-D padding": (X, X, X, {"key_padding_mask": torch.zeros(ROWS)}),
    "padding of another batch": (X, X, X, {"key_padding_mask": torch.zeros(2, ROWS)}),
    "padding of another length": (X, X, X, {"key_padding_mask": torch.zeros(BATCH, COLS)}),
    "hint without mask": (X, X, X, {"is_causal": True}),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("need_weights", [False, True])
def test_errors_are_torchs(what, need_weights):
    *inputs, options = WRONG[what]
    with pytest.raises((AssertionError, RuntimeError)) as torchs:
        torch.nn.MultiheadAttention(DIM, HEADS)(*inputs, need_weights=need_weights, **options)
    # Of different batches torch says that a view is invalid.
    message = "key has a batch of 2 and query of 3" if what == "another batch" else re.escape(str(torchs.value))
    with pytest.raises(torchs.type, match=message):
        bigkern.nn.MultiheadAttention(DIM, HEADS)(*inputs, need_weights=need_weights, **options)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2, DIM), torch.zeros(3, DIM)])
    with pytest.raises(ValueError, match="pad it with"):
        bigkern.nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()(nested, nested, nested)


# Positional encoding


@pytest.mark.parametrize("dim", [8, 7, 1])
def test_positional_encoding_is_the_papers(dim):
    encoded = bigkern.nn.PositionalEncoding(dim, 0.0, 50, batch_first=True)(torch.zeros(1, 50, dim))[0]
    for position in (0, 1, 49):
        for i in range(dim):
            angle = position / 10000 ** (2 * (i // 2) / dim)
            assert encoded[position, i].item() == pytest.approx((math.sin, math.cos)[i % 2](angle), abs=1e-6)


def test_positional_encoding_adds_and_stores_nothing():
    first, second = (bigkern.nn.PositionalEncoding(6, batch_first=b).eval() for b in (True, False))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(first(x) - x, first.table[:5].expand(2, 5, 6))
    assert torch.equal(first(x).transpose(0, 1), second(x.transpose(0, 1)))
    assert torch.equal(first(x)[0], first(x[0])) and torch.equal(first(x)[0], second(x[0]))
    assert not first.state_dict() and torch.equal(copy.deepcopy(first)(x), first(x))
    assert first(x.bfloat16()).dtype == torch.bfloat16
    assert repr(first).startswith("PositionalEncoding(\n  6, max_len=5000, batch_first=True")


def test_positional_encoding_drops_in_training():
    module = bigkern.nn.PositionalEncoding(6, dropout=0.5)
    x = torch.ones(50, 2, 6)
    assert (module(x) == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert (module.eval()(x) != 0).float().mean() > 0.9


def test_positional_encoding_refuses():
    module = bigkern.nn.PositionalEncoding(6, max_len=4)
    with pytest.raises(ValueError, match="5 positions, but max_len is 4"):
        module(torch.zeros(5, 2, 6))
    with pytest.raises(ValueError, match="d_model, 6"):
        module(torch.zeros(3, 2, 7))


# Transformers


LAYER_OPTIONS = [
    {},
    {"norm_first": True},
    {"activation": "gelu", "batch_first": True, "bias": False},
    {"norm_first": True, "activation": torch.nn.functional.silu, "batch_first": True, "layer_norm_eps": 1e-2},
]


def sequences(device, batch_first):
    x, memory = randn(BATCH, ROWS, DIM, device=device), randn(BATCH, COLS, DIM, device=device, seed=1)
    order = (0, 1, 2) if batch_first else (1, 0, 2)
    return [y.detach().permute(order).requires_grad_() for y in (x, memory)]


def layer_masks(name, device):
    causal = torch.nn.Transformer.generate_square_subsequent_mask(ROWS, device=device)
    padding = torch.zeros(BATCH, ROWS, device=device)
    padding[1, 3:] = -torch.inf
    if name == "TransformerEncoderLayer":
        return {"src_mask": causal, "src_key_padding_mask": padding, "is_causal": True}
    return {
        "tgt_mask": causal,
        "tgt_key_padding_mask": padding,
        "tgt_is_causal": True,
        "memory_mask": torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(4)).to(device),
        "memory_key_padding_mask": padding[:, 1:],
    }


@layers
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_layers(backend, device, name, masked, options):
    mine, theirs = pair(name, device=device, dropout=0.0, **options)
    inputs = sequences(device, options.get("batch_first", False))[: 1 if "Encoder" in name else 2]
    given = layer_masks(name, device) if masked else {}
    assert_same(run(mine, inputs, **given), run(theirs, inputs, **given))
    with torch.no_grad():  # torch takes its fast path
        ours, torchs = mine.eval()(*inputs, **given), theirs.eval()(*inputs, **given)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_drop_in_training_only(backend, device, name, norm_first):
    module = pair(name, device=device, dropout=0.5, norm_first=norm_first)[0]
    inputs = sequences(device, False)[: 1 if "Encoder" in name else 2]
    torch.manual_seed(1)
    first, second = module(*inputs), module(*inputs)
    torch.manual_seed(1)
    assert torch.equal(first, module(*inputs)) and not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))


@layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_everything_dropped(backend, device, name, norm_first):
    """With every sublayer dropped the residual stream and the norms are left."""
    module = pair(name, device=device, dropout=1.0, norm_first=norm_first)[0]
    x, memory = sequences(device, False)
    wanted = x
    if not norm_first:
        for norm in (module.norm1, module.norm2, getattr(module, "norm3", None)):
            wanted = wanted if norm is None else norm(wanted)
    torch.testing.assert_close(module(x, *[memory][: "Decoder" in name]), wanted)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_sum_is_fused_only_where_nobody_sees_the_steps(monkeypatch, norm_first):
    calls = []
    real = bigkern.nn.attention.add_layer_norm
    monkeypatch.setattr(bigkern.nn.attention, "add_layer_norm", lambda *a: calls.append(1) or real(*a))
    module = bigkern.nn.TransformerEncoderLayer(*MODULES["TransformerEncoderLayer"], norm_first=norm_first).eval()
    x = randn(ROWS, BATCH, DIM)
    wanted = module(x)
    assert len(calls) == (1 if norm_first else 2)
    seen = []
    module.norm2.register_forward_hook(lambda _, inputs, output: seen.append(output))
    torch.testing.assert_close(module(x), wanted)
    assert len(seen) == 1 and len(calls) == (1 if norm_first else 3)
    module.norm2 = torch.nn.Identity()
    assert torch.isfinite(module(x)).all()


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "batch_first": True}], ids=["default", "norm_first"])
@pytest.mark.parametrize("causal", [None, "additive", "boolean"])
def test_transformer(backend, device, options, causal):
    mine, theirs = pair("Transformer", device=device, dropout=0.0, **options)
    inputs = sequences(device, "batch_first" in options)[::-1]
    given = {}
    if causal:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(ROWS, device=device)
        padding = torch.zeros(BATCH, COLS, device=device)
        padding[1, 2:] = -torch.inf
        if causal == "boolean":
            mask, padding = mask < 0, padding < 0
        given = dict(tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert_same(run(mine, inputs, **given), run(theirs, inputs, **given))


def test_causal_masks_are_recognised(monkeypatch):
    seen = []
    layer = bigkern.nn.TransformerEncoderLayer(*MODULES["TransformerEncoderLayer"]).eval()
    encoder = bigkern.nn.TransformerEncoder(layer, 1)
    real = bigkern.nn.attention.attention
    monkeypatch.setattr(bigkern.nn.attention, "attention", lambda *a, **k: seen.append(a[5]) or real(*a, **k))
    x = randn(ROWS, BATCH, DIM)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(ROWS)
    for mask in (causal, causal < 0, causal.tril(-1), None, causal.expand(BATCH * HEADS, ROWS, ROWS)):
        encoder(x, mask)
    encoder(x, causal, is_causal=False)
    assert seen == [True, True, False, False, False, False]


def test_padding_in_evaluation_uses_no_nested_tensors():
    """torch's encoder gives 0 where the text has ended, but on its fast path alone; ours what it gives in training."""
    layer = bigkern.nn.TransformerEncoderLayer(DIM, HEADS, 12, dropout=0.0, batch_first=True)
    encoder = bigkern.nn.TransformerEncoder(layer, 2)
    x = randn(BATCH, ROWS, DIM, grad=False)
    padding = torch.zeros(BATCH, ROWS, dtype=torch.bool)
    padding[1, 2:] = True
    trained = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), trained)


def test_transformer_refuses_as_torch():
    model = bigkern.nn.Transformer(*MODULES["Transformer"])
    with pytest.raises(RuntimeError, match="batch number of src and tgt must be equal"):
        model(torch.zeros(ROWS, 2, DIM), torch.zeros(ROWS, 3, DIM))
    with pytest.raises(RuntimeError, match="feature number of src and tgt must be equal to d_model"):
        model(torch.zeros(ROWS, 2, 4), torch.zeros(ROWS, 2, 4))


# Compiled


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_attention(backend, device, need_weights):
    module = pair("MultiheadAttention", device=device, batch_first=True)[0]
    x = randn(BATCH, ROWS, DIM, device=device)
    padding = torch.zeros(BATCH, ROWS, dtype=torch.bool, device=device)
    padding[1, 3:] = True
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = dict(key_padding_mask=padding, need_weights=need_weights)
    (*ours,) = (y for y in compiled(x, x, x, **given) if y is not None)
    wanted = [y for y in module(x, x, x, **given) if y is not None]
    assert_same([ours], [wanted])
    assert_same(*([torch.autograd.grad(f(x, x, x, **given)[0].square().sum(), x)] for f in (compiled, module)))


def test_compile_transformer(backend, device):
    model = pair("Transformer", device=device, dropout=0.0)[0]
    x, memory = sequences(device, False)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(ROWS, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(*([(f(memory, x, tgt_mask=mask),)] for f in (compiled, model)))
