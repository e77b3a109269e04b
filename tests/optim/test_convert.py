"""``convert``: a torch optimizer goes on as bigkern's, with its state, groups, hooks and schedulers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import bigkern

KINDS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd plain": lambda params: torch.optim.SGD(params, lr=1e-2),
}


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 5e-3}]
    return model, KINDS[kind](groups)


def train(model, optimizer, steps, scheduler=None, first=0):
    for step in range(first, first + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.device)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 3])
def test_goes_on_where_torch_was(kind, before):
    model, optimizer = make(kind)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, before, scheduler)
    # torch's goes on from the same point.
    expected, twin = make(kind)
    expected.load_state_dict(copy.deepcopy(model.state_dict()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_scheduler = lr_scheduler.StepLR(twin, 2, 0.5)
    twin_scheduler.load_state_dict(scheduler.state_dict())

    groups, state = optimizer.param_groups, optimizer.state
    converted = bigkern.optim.convert(optimizer)
    assert converted is optimizer and type(converted).__module__.startswith("bigkern.optim")
    assert converted.param_groups is groups and converted.state is state
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler that misses the optimizer's steps
        train(model, optimizer, 4, scheduler, before)
        train(expected, twin, 4, twin_scheduler, before)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in twin.param_groups]
    assert optimizer.param_groups[0]["lr"] < 1e-2
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other)
    # What it saves is torch's.
    twin.load_state_dict(optimizer.state_dict())


def test_the_step_is_bigkerns(backend, device):
    """Also where a scheduler holds torch's step."""
    model, optimizer = make("adam")
    model.to(device)
    scheduler = lr_scheduler.StepLR(optimizer, 10)
    bigkern.optim.convert(optimizer)
    assert optimizer._plan is None
    train(model, optimizer, 2, scheduler)
    assert optimizer._plan is not None


def test_hooks_closures_and_pickles():
    model, optimizer = make("adamw fused")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    bigkern.optim.convert(optimizer)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert calls == ["before", "after"]
    again = copy.deepcopy(optimizer)
    assert type(again) is bigkern.optim.AdamW
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_bigkerns_own_is_returned():
    optimizer = bigkern.optim.Adam([torch.nn.Parameter(torch.ones(2))], max_norm=1.0)
    assert bigkern.optim.convert(optimizer) is optimizer and optimizer.max_norm == 1.0


def test_what_it_refuses_stays_as_it_is():
    params = [torch.nn.Parameter(torch.ones(2))]

    class Mine(torch.optim.Adam):
        pass

    for optimizer in (torch.optim.RMSprop(params), Mine(params)):
        kind = type(optimizer)
        with pytest.raises(
            TypeError, match=r"supported are torch\.optim\.Adam, torch\.optim\.AdamW, torch\.optim\.SGD"
        ):
            bigkern.optim.convert(optimizer)
        assert type(optimizer) is kind
    replaced = torch.optim.Adam(params)
    replaced.step = lambda: None
    with pytest.raises(TypeError, match="step was replaced"):
        bigkern.optim.convert(replaced)
    assert type(replaced) is torch.optim.Adam
