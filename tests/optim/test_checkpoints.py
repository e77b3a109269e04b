"""A checkpoint moves between torch.optim and bigkern.optim in the middle of training, and the trajectory goes on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bigkern
from bigkern import optim
from bigkern.models.cnn import _ImageClassifier
from bigkern.models.layers import BIGKERN
from bigkern.training.data import digits
from bigkern.training.metrics import cross_entropy

STEPS = 100

KINDS = {
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 1e-3, "amsgrad": True, "weight_decay": 0.01}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-3}),
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def batches():
    """Digits for a CNN like the documents', narrow enough for emulated steps."""
    dataset = digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset.train), generator=generator)
    inputs, targets = dataset.train.batch(order[: 16 * STEPS % len(order)], torch.device("cpu"))
    return [(inputs[i : i + 16], targets[i : i + 16]) for i in range(0, len(inputs) - 15, 16)]


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh_model(device):
    torch.manual_seed(0)
    return _ImageClassifier((1, 8, 8), 10, (8, 16), (True, True), 32, 1, BIGKERN).to(device)


def train(model, optimizer, batches, device, first, last):
    for step in range(first, last):
        inputs, targets = batches[step % len(batches)]
        with bigkern.use_backend("torch"):  # the model's layers; the optimizer's backend is under test
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return loss.item()


def relative_difference(a, b):
    a, b = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("direction", ("to torch", "from torch"))
@pytest.mark.parametrize("kind", KINDS)
def test_trajectory_goes_on_in_the_other_package(backend, device, batches, kind, direction):
    """100 steps on the digits; half of them in each package, against all of them in torch's.

    The torch backend is torch's own implementation, so the bits are equal.  A kernel rounds as torch's CPU code but for
    some square roots: the trajectories part by rounding errors, as torch's own fused and for-loop implementations do.
    """
    ours, theirs, options = KINDS[kind]
    same = {"fused": True} if backend == "torch" else {"foreach": False}
    steps = STEPS if backend != "triton" or device.type == "cuda" else 6
    reference = fresh_model(device)
    train(reference, theirs(reference.parameters(), **options, **same), batches, device, 0, steps)

    model = fresh_model(device)
    first, second = (ours, theirs) if direction == "to torch" else (theirs, ours)
    before = first(model.parameters(), **options, **same)
    train(model, before, batches, device, 0, steps // 2)
    resumed = copy.deepcopy(model)
    after = second(resumed.parameters(), **options, **same)
    state = through_a_file(before.state_dict())
    after.load_state_dict(state)
    train(resumed, after, batches, device, steps // 2, steps)
    if backend == "torch":
        assert all(map(torch.equal, resumed.parameters(), reference.parameters()))
    else:
        other = fresh_model(device)
        train(other, theirs(other.parameters(), **options, fused=True), batches, device, 0, steps)
        assert relative_difference(resumed, reference) <= 2 * relative_difference(other, reference) + 1e-6
    other_state, reference_state = after.state_dict(), theirs(resumed.parameters(), **options, **same).state_dict()
    assert other_state["param_groups"][0].keys() == reference_state["param_groups"][0].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_state_layout_is_torchs(backend, device, kind):
    ours, theirs, options = KINDS[kind]
    states = []
    for cls in (ours, theirs):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
        optimizer = cls(model.parameters(), **options)
        model(torch.ones(2, 3, device=device)).sum().backward()
        model[1].bias.grad = None
        optimizer.step()
        states.append(optimizer.state_dict())
    a, b = states
    assert a["param_groups"] == b["param_groups"]
    assert list(a["param_groups"][0]) == list(b["param_groups"][0])
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert list(state) == list(b["state"][index])
        for name, tensor in state.items():
            expected = b["state"][index][name]
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (expected.dtype, expected.shape, expected.stride())
            assert tensor.device == expected.device


def small(cls=optim.Adam, device="cpu", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(device)
    return model, cls(model.parameters(), **{"lr": 0.05, **options})


def steps(model, optimizer, count=2):
    device = next(model.parameters()).device
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12, device=device).view(2, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "copier", (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))), ids=("copy", "pickle")
)
def test_deepcopy_and_pickle(backend, device, copier):
    model, optimizer = small(device=device, ema_decay=0.9, max_norm=1.0)
    steps(model, optimizer)
    twin_model, twin = copier((model, optimizer))
    assert (twin.ema_decay, twin.max_norm) == (0.9, 1.0)
    before = [param.clone() for param in model.parameters()]
    steps(twin_model, twin)
    assert all(map(torch.equal, before, model.parameters()))
    steps(model, optimizer)
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))


def test_states_of_their_own_dtype_survive_a_checkpoint(backend, device):
    model, optimizer = small(device=device, master_weights=True, ema_decay=0.9)
    model.bfloat16()

    def run(model, optimizer):
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            param.grad = torch.randn(param.shape, generator=generator).to(device, torch.bfloat16)
        optimizer.step()

    run(model, optimizer)
    resumed = copy.deepcopy(model)
    other = optim.Adam(resumed.parameters(), lr=0.05, master_weights=True, ema_decay=0.9)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for _ in range(2):
        run(model, optimizer)
        run(resumed, other)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq", "master_param", "ema_param"):
            assert optimizer.state[a][name].dtype == torch.float32
            assert torch.equal(optimizer.state[a][name], other.state[b][name])
    torch.optim.Adam(model.parameters()).load_state_dict(optimizer.state_dict())


def test_another_models_state_is_refused_and_nothing_loaded(device):
    model, optimizer = small(device=device)
    with bigkern.use_backend("torch"):
        steps(model, optimizer)
    other = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).to(device)
    fresh = optim.Adam(other.parameters(), lr=0.3)
    with pytest.raises(ValueError, match=r"state exp_avg of shape \(5, 6\).*parameter 0 has shape \(6, 5\)"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state and fresh.param_groups[0]["lr"] == 0.3
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optim.Adam(model[0].parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optim.Adam([{"params": [p]} for p in model.parameters()]).load_state_dict(optimizer.state_dict())


def test_groups_of_older_checkpoints(device):
    model, optimizer = small(device=device)
    state = optimizer.state_dict()
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    with bigkern.use_backend("torch"):
        steps(model, optimizer)
