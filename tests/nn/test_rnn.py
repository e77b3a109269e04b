"""The recurrent modules stand for torch.nn's: constructors, parameters, state, repr, copies, packed input, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import bigkern.nn
from tests import numerics
from tests.conftest import pick

LAYERS, CELLS = ["RNN", "LSTM", "GRU"], ["RNNCell", "LSTMCell", "GRUCell"]
layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", CELLS)


def pair(name, *args, **kwargs):
    """bigkern's module and torch's with the same weights."""
    mine, theirs = getattr(bigkern.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def flat(results):
    """Every tensor in nested tuples and packed sequences."""
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, torch.nn.utils.rnn.PackedSequence):
        return [results.data]
    return [tensor for part in results for tensor in flat(part)]


def assert_same(mine, theirs):
    for a, b in zip(flat(mine), flat(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ARGUMENTS = [
    {},
    {"num_layers": 2, "dropout": 0.25},
    {"bias": False},
    {"bidirectional": True, "batch_first": True},
    {"dtype": torch.bfloat16},
]


@layers
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_parameters_keys_and_repr_are_torchs(name, arguments):
    torch.manual_seed(3)
    mine = getattr(bigkern.nn, name)(4, 6, **arguments)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(4, 6, **arguments)
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert mine.state_dict()[key].dtype == value.dtype and torch.equal(mine.state_dict()[key], value)
    assert theirs.load_state_dict(mine.state_dict()) == mine.load_state_dict(theirs.state_dict()) == ([], [])


@cells
@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"dtype": torch.bfloat16}], ids=str)
def test_cells_are_torchs(name, arguments):
    mine, theirs = pair(name, 4, 6, **arguments)
    assert repr(mine) == repr(theirs) and list(mine.state_dict()) == list(theirs.state_dict())


def test_positional_arguments_are_torchs():
    mine, theirs = pair("RNN", 4, 6, 2, "relu", False, True, 0.0, True)
    assert mine.nonlinearity == theirs.nonlinearity == "relu" and mine.mode == theirs.mode
    mine, theirs = pair("LSTM", 4, 6, 2, False, True, 0.0, True, 3)
    assert [p.shape for p in mine.parameters()] == [p.shape for p in theirs.parameters()]


def test_recurrent_dropout_shows():
    assert repr(bigkern.nn.GRU(4, 6, recurrent_dropout=0.1)) == "GRU(4, 6, recurrent_dropout=0.1)"


@layers
def test_zoneout_and_layer_norm(name):
    """Their parameters stand beside torch's, start as no change, and travel in state_dict, copies and gradients."""
    extra = {"cell_zoneout": 0.2} if name == "LSTM" else {}
    torch.manual_seed(3)
    module = getattr(bigkern.nn, name)(4, 6, 2, zoneout=0.1, layer_norm=True, bidirectional=True, **extra)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(4, 6, 2, bidirectional=True)
    assert repr(module).endswith(f"zoneout=0.1, {'cell_zoneout=0.2, ' if extra else ''}layer_norm=True)")
    state, wanted = module.state_dict(), theirs.state_dict()
    for key, value in wanted.items():
        assert torch.equal(state[key], value)
    added = set(state) - set(wanted)
    ends = [f"l{layer}{suffix}" for layer in (0, 1) for suffix in ("", "_reverse")]
    kinds = ["weight_ln_ih", "weight_ln_hh"] + ["weight_ln_c", "bias_ln_c"] * bool(extra)
    assert added == {f"{kind}_{end}" for kind in kinds for end in ends}
    assert all((state[key] == float(key.startswith("weight"))).all() for key in added)
    x = torch.randn(5, 3, 4)
    flat(module(x))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(twin.eval()(x), module.eval()(x))
    plain = getattr(bigkern.nn, name)(4, 6, 2, layer_norm=True, bidirectional=True)
    plain.load_state_dict(state)
    assert not torch.equal(flat(plain.eval()(x))[0], flat(module(x))[0])
    module.train()
    assert not torch.equal(flat(module(x))[0], flat(module(x))[0])


def test_zoneout_and_layer_norm_are_refused_where_they_cannot_be():
    for arguments, message in [
        (dict(zoneout=-0.1), "zoneout should be a probability"),
        (dict(cell_zoneout=2), "cell_zoneout should be a probability"),
        (dict(proj_size=3, layer_norm=True), "proj_size goes with none of"),
    ]:
        with pytest.raises(ValueError, match=message):
            bigkern.nn.LSTM(4, 6, **arguments)
    with pytest.raises(TypeError, match="layer_norm should be of type bool"):
        bigkern.nn.GRU(4, 6, layer_norm=1)
    with pytest.raises(ValueError, match="cell_zoneout argument is only supported for LSTM"):
        bigkern.nn.GRU(4, 6, cell_zoneout=0.1)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_deepcopy_and_pickle(name):
    module = getattr(bigkern.nn, name)(4, 6)
    saved = io.BytesIO()
    torch.save(module, saved)
    # Each weight once: no flattened copy travels along.
    weights = sum(p.nbytes for p in module.parameters())
    assert saved.tell() < weights + 12_000
    saved.seek(0)
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert_same(twin(x), module(x))
        with torch.no_grad():  # the copy's own weights are what it runs
            for parameter in twin.parameters():
                parameter.zero_()
        assert not flat(twin(x))[0].any() and flat(module(x))[0].any()


@layers
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("form", ["batch", "batch_first", "unbatched", "sorted", "unsorted"])
def test_forward_and_gradients(backend, device, name, states, form):
    arguments = dict(batch_first=form == "batch_first", bidirectional=True, num_layers=pick([2], [1])[0])
    mine, theirs = (module.to(device) for module in pair(name, 4, 6, **arguments))
    torch.manual_seed(0)
    batch = () if form == "unbatched" else (3,)
    x = torch.randn(*((3, 5, 4) if form == "batch_first" else (5, *batch, 4)), device=device, requires_grad=True)
    shape = (2 * arguments["num_layers"], *batch, 6)
    hx = [torch.randn(shape, device=device, requires_grad=True) for _ in range(1 + (name == "LSTM"))]

    def run(module):
        given = x
        if form == "sorted":
            given = pack_padded_sequence(x, [5, 3, 3])
        elif form == "unsorted":
            given = pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
        results = module(given, (tuple(hx) if name == "LSTM" else hx[0]) if states else None)
        loss = sum((y * numerics.cotangent(y, i)).sum() for i, y in enumerate(flat(results)))
        return results, torch.autograd.grad(loss, [x, *module.parameters(), *(hx if states else [])])

    (mine_results, mine_grads), (results, grads) = run(mine), run(theirs)
    assert type(mine_results[0]) is type(results[0])
    if form in ("sorted", "unsorted"):
        for a, b in zip(mine_results[0][1:], results[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert_same(pad_packed_sequence(mine_results[0]), pad_packed_sequence(results[0]))
    assert_same(mine_results, results)
    assert_same(mine_grads, grads)


@cells
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_cells_forward_and_gradients(backend, device, name, batched, states):
    mine, theirs = (module.to(device) for module in pair(name, 4, 6, bias=batched))
    batch = (3,) if batched else ()
    x = torch.randn(*batch, 4, device=device, requires_grad=True)
    hx = tuple(torch.randn(*batch, 6, device=device) for _ in range(1 + (name == "LSTMCell")))
    given = (hx if name == "LSTMCell" else hx[0]) if states else None

    def run(module):
        results = module(x, given)
        loss = sum(y.square().sum() for y in flat(results))
        return results, torch.autograd.grad(loss, [x, *module.parameters()])

    assert_same(run(mine), run(theirs))


def test_relu_cell(backend, device):
    mine, theirs = (module.to(device) for module in pair("RNNCell", 4, 6, nonlinearity="relu"))
    x = torch.randn(3, 4, device=device)
    assert_same(mine(x), theirs(x))


@layers
def test_functional_call_uses_the_given_weights(backend, device, name):
    mine, theirs = (module.to(device) for module in pair(name, 4, 6))
    given = {key: torch.randn_like(value) for key, value in mine.named_parameters()}
    x = torch.randn(3, 2, 4, device=device)
    assert_same(*(torch.func.functional_call(module, given, (x,)) for module in (mine, theirs)))


@layers
def test_dropouts_act_in_training_only(backend, device, name):
    module = getattr(bigkern.nn, name)(4, 6, num_layers=2, dropout=0.5, recurrent_dropout=0.3).to(device)
    x = torch.randn(5, 3, 4, device=device)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("name", pick(LAYERS, ["LSTM"]))
def test_compile_fullgraph(backend, device, name):
    """The reason why the layers are not subclasses of torch.nn's."""
    module = getattr(bigkern.nn, name)(4, 6).to(device)
    x = torch.randn(2, 2, 4, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), module(x))
    assert_same(*(torch.autograd.grad(f(x)[0].square().sum(), x) for f in (compiled, module)))


def test_compile_packed(backend, device):
    """The module whole, packed input included; the torch backend's refusal is tested with the op."""
    if backend == "torch":
        pytest.skip("torch's own decomposition of a packed layer reads the batch sizes")
    module = bigkern.nn.GRU(4, 6, bidirectional=True).to(device)
    packed = pack_padded_sequence(torch.randn(5, 3, 4, device=device), [5, 3, 2])
    torch._dynamo.reset()
    assert_same(torch.compile(module, fullgraph=True, backend="aot_eager")(packed), module(packed))


def test_projection(device):
    mine, theirs = (module.to(device) for module in pair("LSTM", 4, 6, proj_size=3))
    with bigkern.use_backend("torch"):
        x = torch.randn(5, 2, 4, device=device)
        assert_same(mine(x), theirs(x))


# Errors


@layers
@pytest.mark.parametrize(
    "make",
    [
        dict(hidden_size=0),
        dict(input_size=0),
        dict(num_layers=0),
        dict(dropout=1.5),
        dict(dropout=True),
        dict(bias=1),
        dict(batch_first=1),
        dict(hidden_size=2.5),
    ],
    ids=str,
)
def test_constructor_errors_are_torchs(name, make):
    arguments = {"input_size": 4, "hidden_size": 6, **make}
    with pytest.raises((TypeError, ValueError)) as theirs:
        getattr(torch.nn, name)(**arguments)
    with pytest.raises(type(theirs.value)) as mine:
        getattr(bigkern.nn, name)(**arguments)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_projection_is_refused_where_torch_refuses_it(name):
    with pytest.raises((TypeError, ValueError), match="proj_size"):
        getattr(bigkern.nn, name)(4, 6, proj_size=2)


def test_unknown_nonlinearity_and_probability():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        bigkern.nn.RNN(4, 6, nonlinearity="gelu")
    with pytest.raises(ValueError, match="recurrent_dropout"):
        bigkern.nn.LSTM(4, 6, recurrent_dropout=1.1)


def test_dropout_with_one_layer_warns_as_torch():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        bigkern.nn.LSTM(4, 6, dropout=0.5)


@layers
def test_call_errors_are_torchs(backend, device, name):
    mine, theirs = (module.to(device) for module in pair(name, 4, 6))
    wide = torch.zeros(1, 3, 7, device=device)
    good = torch.zeros(1, 3, 6, device=device)

    def states(h, c=good):
        return (h, c) if name == "LSTM" else h

    x = torch.randn(5, 3, 4, device=device)
    for arguments in [
        (x[..., :3],),
        (x[0, 0],),
        (x[None],),
        (x.double(),),
        (x, states(wide)),
        (x, states(good[:, :2])),
        (x, states(good[0])),
        (x[:, 0], states(good)),
        (x[:0],),
    ]:
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            theirs(*arguments)
        with pytest.raises((RuntimeError, ValueError)) as found:
            mine(*arguments)
        assert str(found.value)
        assert isinstance(found.value, (type(wanted.value), ValueError))


def test_packing_refuses_what_is_not_a_batch():
    with pytest.raises(RuntimeError, match="sorted"):
        pack_padded_sequence(torch.zeros(3, 2, 4), [1, 3])
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(torch.zeros(3, 2, 4), [3, 0])
    module = bigkern.nn.GRU(4, 6)
    with pytest.raises(RuntimeError, match="input_size"):
        module(pack_sequence([torch.zeros(3, 5)]))
