"""The modules stand for torch.nn's: constructors, parameters, state, repr, copies; AddLayerNorm for its two halves."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch

import bigkern.nn
from tests import numerics

PAIRS = [(bigkern.nn.LayerNorm, torch.nn.LayerNorm), (bigkern.nn.RMSNorm, torch.nn.RMSNorm)]
PAIR_NAMES = ["LayerNorm", "RMSNorm"]
pairs = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=PAIR_NAMES)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pairs
def test_constructor_is_torchs(ours, torchs):
    assert inspect.signature(ours) == inspect.signature(torchs)


ARGUMENTS = [{}, {"eps": 1e-3}, {"elementwise_affine": False}, {"dtype": torch.bfloat16}]


@pytest.mark.parametrize(
    ("ours", "torchs", "arguments"),
    [(*pair, arguments) for pair in PAIRS for arguments in ARGUMENTS] + [(*PAIRS[0], {"bias": False})],
    ids=lambda value: next(iter(value), "default") if isinstance(value, dict) else value.__module__.split(".")[0],
)
@pytest.mark.parametrize("shape", [8, (4, 8)])
def test_parameters_keys_and_repr_are_torchs(ours, torchs, arguments, shape):
    mine, theirs = ours(shape, **arguments), torchs(shape, **arguments)
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert mine.state_dict()[key].dtype == value.dtype
        assert torch.equal(mine.state_dict()[key], value)


@pairs
def test_reset_parameters(ours, torchs):
    module = randomised(ours(8))
    module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), torchs(8).parameters(), strict=True))


@pairs
def test_state_dict_goes_both_ways(ours, torchs):
    for source, target in ((ours(8), torchs(8)), (torchs(8), ours(8))):
        randomised(source)
        assert target.load_state_dict(source.state_dict()) == ([], [])
        x = torch.randn(3, 8)
        assert torch.equal(source(x), target(x))


def test_add_layer_norm_state_dict_goes_both_ways():
    ours, theirs = randomised(bigkern.nn.AddLayerNorm(8, dropout_p=0.1)), torch.nn.LayerNorm(8)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(ours.eval()(x, residual)[0], theirs(x + residual))


@pytest.mark.parametrize("make", [bigkern.nn.LayerNorm, bigkern.nn.RMSNorm, bigkern.nn.AddLayerNorm])
def test_deepcopy_and_pickle(make):
    module = randomised(make(8, eps=1e-3))
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        inputs = [torch.randn(3, 8)] * (2 if make is bigkern.nn.AddLayerNorm else 1)
        mine, its = module(*inputs), twin(*inputs)
        assert torch.equal(mine[0], its[0])


def test_add_layer_norm_repr():
    assert repr(bigkern.nn.AddLayerNorm(8, dropout_p=0.1)) == (
        "AddLayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, dropout_p=0.1)"
    )


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan")])
def test_add_layer_norm_refuses_a_wrong_probability(dropout_p):
    with pytest.raises(ValueError, match=r"dropout_p .* \[0, 1\]"):
        bigkern.nn.AddLayerNorm(8, dropout_p=dropout_p)


@pairs
@pytest.mark.parametrize("shape", [(8,), (4, 8)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_forward_and_gradients(backend, device, ours, torchs, shape, affine):
    mine = randomised(ours(shape, elementwise_affine=affine, device=device))
    theirs = torchs(shape, elementwise_affine=affine, device=device)
    torch.manual_seed(0)
    names = [name for name, _ in mine.named_parameters()]
    x = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)

    def call(module):
        return lambda x, *parameters: torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,)
        )

    numerics.check(call(mine), call(theirs), [x, *mine.parameters()], names=["input", *names])


def test_add_layer_norm_forward_and_gradients(backend, device):
    mine = randomised(bigkern.nn.AddLayerNorm(8, device=device))
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 5, 8, device=device, requires_grad=True) for _ in range(2))

    def kernel(x, residual, weight, bias):
        return torch.func.functional_call(mine, {"weight": weight, "bias": bias}, (x, residual))

    def reference(x, residual, weight, bias):
        summed = x + residual
        return torch.nn.functional.layer_norm(summed, (8,), weight, bias), summed

    numerics.check(kernel, reference, [x, residual, *mine.parameters()], names=["input", "residual", "weight", "bias"])


def test_add_layer_norm_drops_in_training_only(backend, device):
    module = bigkern.nn.AddLayerNorm(64, dropout_p=0.5, device=device)
    x, residual = torch.ones(16, 64, device=device), torch.zeros(16, 64, device=device)
    summed = module(x, residual)[1]
    assert set(summed.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(module.eval()(x, residual)[1], x)


def test_trains_as_torchs(backend, device):
    """The same steps from the same weights give the same losses, to rounding."""

    def losses(norm, add_norm):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(16, 32, device=device), torch.nn.Linear(32, 32, device=device)
        parameters = [p for module in (first, second, norm, add_norm) for p in module.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        x, target = torch.randn(24, 16, device=device), torch.randn(24, 32, device=device)
        found = []
        for _ in range(10):
            hidden = norm(first(x))
            if isinstance(add_norm, bigkern.nn.AddLayerNorm):
                output, _ = add_norm(second(hidden), hidden)
            else:
                output = add_norm(second(hidden) + hidden)
            loss = torch.nn.functional.mse_loss(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    mine = losses(bigkern.nn.LayerNorm(32, device=device), bigkern.nn.AddLayerNorm(32, device=device))
    theirs = losses(torch.nn.LayerNorm(32, device=device), torch.nn.LayerNorm(32, device=device))
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert mine[-1] < 0.9 * mine[0]
