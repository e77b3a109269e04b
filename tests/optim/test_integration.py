"""The optimizers among the rest of PyTorch: compile, schedulers, groups, hooks, data and fully sharded parallelism."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from torch import nn

import bigkern
from bigkern import optim
from tests.conftest import pick


def pair(device, cls="Adam", **options):
    """The same small model twice, one with bigkern's optimizer and one with torch's."""
    found = []
    for package in (optim, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
        found.append((model, getattr(package, cls)(model.parameters(), **{"lr": 0.05, **options})))
    return found


def backward(model):
    device = next(model.parameters()).device
    loss = model(torch.linspace(-1, 1, 12, device=device).view(2, 6)).square().sum()
    loss.backward()
    return loss


def step(model, optimizer):
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def assert_close(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


def test_schedulers_groups_and_frozen_parameters(backend, device):
    """lr schedules, options changed by hand, a group added, requires_grad toggled, amsgrad switched on."""
    runs = pair(device, "AdamW")
    for model, optimizer in runs:
        extra = nn.Parameter(torch.ones(4, device=device))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for i in range(6):
            optimizer.zero_grad()
            backward(model)
            if i == 2:
                model[0].weight.requires_grad_(False)
            if i == 3:
                optimizer.add_param_group({"params": [extra], "lr": 0.2, "weight_decay": 0.0})
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
                optimizer.param_groups[0]["betas"] = (0.7, 0.8)
                model[0].weight.requires_grad_(True)
            if i >= 3:
                extra.grad = extra.detach() * 2
            optimizer.step()
            scheduler.step()
        model.extra = extra
    assert_close(runs[0][0], runs[1][0])


def test_groups_with_their_own_extras(backend, device):
    params = [nn.Parameter(torch.full((3,), 2.0, device=device)) for _ in range(2)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = optim.SGD([{"params": params[:1], "l1": 0.5, "ema_decay": 0.5}, {"params": params[1:]}], lr=1.0)
    optimizer.step()
    assert (params[0] == 1.5).all() and (params[1] == 2.0).all()
    assert (optimizer.state[params[0]]["ema_param"] == 1.75).all() and not optimizer.state.get(params[1])


@pytest.mark.parametrize("choice", ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}), ids=str)
def test_foreach_and_fused_are_accepted(backend, device, choice):
    """They choose among torch's implementations: its bits on the torch backend, one launch on the kernels."""
    (model, optimizer), (twin, reference) = pair(device, **choice)
    for _ in range(3):
        step(model, optimizer)
        step(twin, reference)
    if backend == "torch":
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert_close(model, twin)
    assert optimizer.param_groups[0]["fused"] is choice.get("fused")


def test_closure_and_hooks(backend, device):
    (model, optimizer), _ = pair(device)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        return backward(model)

    assert optimizer.step(closure).item() > 0
    assert calls == ["pre", "closure", "post"]


def test_nothing_to_do(backend, device):
    (model, optimizer), _ = pair(device)
    before = [param.clone() for param in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
    clipped = optim.Adam(model.parameters(), max_norm=1.0)
    clipped.step()
    assert not clipped.state


@pytest.mark.filterwarnings("ignore")
def test_compiled_step_equals_eager(backend, device):
    """A graph break at the step: what is compiled around it, and the step, do what they do in eager mode."""
    (model, optimizer), (twin, _) = pair(device)
    eager = optim.Adam(twin.parameters(), lr=0.05)
    compiled = torch.compile(lambda: step(model, optimizer), backend="eager")
    for _ in range(3):
        compiled()
        step(twin, eager)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_the_backend_may_change_between_steps(backend, device):
    (model, optimizer), (twin, reference) = pair(device)
    for name in (backend, "torch", backend):
        with bigkern.use_backend(name):
            step(model, optimizer)
        step(twin, reference)
    assert_close(model, twin)


def test_automatic_choice_on_a_cpu_is_torch():
    (model, optimizer), (twin, reference) = pair("cpu", fused=True)
    with bigkern.use_backend(None):
        step(model, optimizer)
    step(twin, reference)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def _train_in_parallel(rank: int, backend: str, device: str, port: int, kind: str, folder: str) -> None:
    import torch.distributed as dist

    if backend == "cuda" and device == "cpu":
        from tests import emulated

        emulated.load("plain")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with bigkern.use_backend(backend):
        (model, _), _ = pair(device)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(model, mesh=init_device_mesh(device, (2,)))
        optimizer = optim.AdamW(wrapped.parameters(), lr=0.05, max_norm=0.5)
        for i in range(3):
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 24, device=device).view(4, 6) * (i + 1)
            wrapped(x[rank::2]).square().mean().backward()
            optimizer.step()
        states = [optimizer.state[param]["exp_avg"] for param in wrapped.parameters()]
        if kind == "fsdp":
            assert all(type(state) is type(param) for state, param in zip(states, wrapped.parameters(), strict=True))
        whole = [t.full_tensor() if kind == "fsdp" else t for t in (*wrapped.parameters(), *states)]
    torch.save([tensor.detach().cpu() for tensor in whole], os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    # Not by way of destructors, which can hang (tests/ops/test_layer_norm_integration.py).
    os._exit(0)


@pytest.mark.parametrize("kind", pick(("ddp", "fsdp"), ("fsdp",)))
def test_two_processes_train_as_one(backend, device, tmp_path, kind):
    """DDP, and fully_shard with its DTensor parameters, clipped by the norm of all shards."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the tables are those of the CUDA kernels; interpreted, two processes take minutes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (backend, device.type, port, kind, str(tmp_path))
    processes = torch.multiprocessing.spawn(_train_in_parallel, arguments, nprocs=2, join=False)
    deadline = time.monotonic() + 300
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the two processes hang"
    _, (model, _) = pair(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for i in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 24, device=device).view(4, 6) * (i + 1)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    expected = [*model.parameters(), *(optimizer.state[param]["exp_avg"] for param in model.parameters())]
    for rank in range(2):
        for mine, whole in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(mine, whole.detach().cpu(), rtol=1e-4, atol=1e-5)


# On a GPU


@pytest.mark.cuda
def test_cuda_graph_capture_and_replay(backend, device):
    """With capturable=True and a tensor lr: replays count steps, follow the lr, and read the tables they captured."""
    if backend == "torch":
        pytest.skip("torch's own")
    lr = torch.tensor(0.05, device=device)
    (model, _), (twin, _) = pair(device)
    optimizer = optim.Adam(model.parameters(), lr=lr, capturable=True)
    reference = torch.optim.Adam(twin.parameters(), lr=0.05)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        backward(model)
        optimizer.step()
        for param in model.parameters():
            param.grad.zero_()
    for i in range(3):
        lr.fill_(0.05 / (i + 1))
        graph.replay()
    for _ in range(3):
        step(twin, reference)
    for i in range(3):
        reference.param_groups[0]["lr"] = 0.05 / (i + 1)
        step(twin, reference)
    assert_close(model, twin)
    assert all(state["step"].item() == 6 for state in optimizer.state.values())


@pytest.mark.cuda
def test_no_synchronisation(backend, device):
    if backend == "torch":
        pytest.skip("torch's own")
    (model, optimizer), _ = pair(device)
    optimizer.max_norm = 1.0
    step(model, optimizer)
    optimizer.zero_grad()
    backward(model)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.zeros((), device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_steps_on_the_cpu_in_a_state_dict(backend, device):
    (model, optimizer), _ = pair(device)
    step(model, optimizer)
    assert all(state["step"].is_cpu for state in optimizer.state_dict()["state"].values())
    (model, optimizer), _ = pair(device, fused=True)
    step(model, optimizer)
    assert all(state["step"].is_cuda for state in optimizer.state_dict()["state"].values())


@pytest.mark.multigpu
@pytest.mark.cuda
def test_parameters_on_two_gpus(backend, device):
    params = [nn.Parameter(torch.ones(5, device=f"cuda:{i}")) for i in range(2)]
    for param in params:
        param.grad = torch.full_like(param, 3.0)
    optim.Adam(params, lr=0.1, max_norm=1.0).step()
    assert torch.equal(params[0].cpu(), params[1].cpu())
