"""A launch works on addresses: whoever moves a tensor between two steps must not be answered by a stale one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bigkern import optim


def make(device, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (5, 300, 7)]
    return params, optim.Adam(params, **{"lr": 0.1, **options})


def give(params, step):
    for i, param in enumerate(params):
        generator = torch.Generator().manual_seed(10 * step + i)
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def reallocate_gradients(params, optimizer):
    for param in params:
        param.grad = param.grad.clone()


def repoint_gradients(params, optimizer):
    for param in params:
        param.grad.data = param.grad.data.clone()


def repoint_parameters(params, optimizer):
    for param in params:
        param.data = param.data.clone()


def repoint_one_parameter(params, optimizer):
    params[1].data = params[1].data.clone()


def replace_states(params, optimizer):
    for param in params:
        for name, value in optimizer.state[param].items():
            optimizer.state[param][name] = value.clone()


def repoint_states(params, optimizer):
    for param in params:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][name].data = optimizer.state[param][name].data.clone()


def new_dictionaries(params, optimizer):
    for param in params:
        optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}


def load(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


MOVES = (
    reallocate_gradients, repoint_gradients, repoint_parameters, repoint_one_parameter, replace_states, repoint_states,
    new_dictionaries, load
)  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_what_moved_is_noticed(backend, device, move):
    """The same steps with and without the move; the memory from before is overwritten: to read it would show."""
    still, twin = make(device)
    moved, optimizer = make(device)
    for step in range(3):
        for params, o in ((still, twin), (moved, optimizer)):
            give(params, step)
            if o is optimizer and step == 2:
                before = [t for p in params for t in (p.grad, p.data, *optimizer.state[p].values())]
                before = [(t, t.data_ptr(), torch.as_strided(t, t.size(), t.stride())) for t in before]
                move(params, o)
                now = {t.data_ptr() for p in params for t in (p, p.grad, *optimizer.state[p].values())}
                for _, address, alias in before:
                    if address not in now and alias.data_ptr() == address:
                        alias.detach().fill_(1e30)
            o.step()
    assert all(map(torch.equal, still, moved))
    for a, b in zip(still, moved, strict=True):
        assert all(torch.equal(value, optimizer.state[b][name]) for name, value in twin.state[a].items())


def test_states_parked_elsewhere_and_dtype_changed(backend, device):
    """As those do who lend the GPU to something else between two steps; and model.bfloat16() in mid-training."""
    params, optimizer = make(device)
    for step in range(2):
        give(params, step)
        optimizer.step()
    for param in params:
        param.data = param.data.bfloat16()
    give(params, 2)
    before = [param.clone() for param in params]
    optimizer.step()
    assert all(
        param.dtype == torch.bfloat16 and not torch.equal(param, b) for param, b in zip(params, before, strict=True)
    )
    assert all(optimizer.state[param]["exp_avg"].dtype == torch.bfloat16 for param in params)
    assert all(optimizer.state[param]["step"].item() == 3 for param in params)


def test_gradients_come_and_go(backend, device):
    """Parameters without gradient stay, and count no step; those that come later start at one."""
    params, optimizer = make(device)
    twins, twin = make(device)
    twin = torch.optim.Adam(twins, lr=0.1)
    for step, missing in enumerate(((0,), (1, 2), (), (0, 1, 2), (2,))):
        for p, o in ((params, optimizer), (twins, twin)):
            give(p, step)
            for i in missing:
                p[i].grad = None
            o.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert optimizer.state[a]["step"] == twin.state[b]["step"]


def test_a_backward_pass_notices_that_its_values_have_changed(backend, device):
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = optim.SGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
