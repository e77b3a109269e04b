"""Accelerated models under what people put around and into models: compile, DDP, FSDP2, pruning, quantization."""

from __future__ import annotations

import copy
import os
import socket
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bigkern
from tests.acceleration.architectures import inputs, make


class Mixed(nn.Module):
    """One layer of every kind, on (batch, length, 16)."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.GELU())
        self.norm = nn.RMSNorm(16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2))
        return self.out(self.gru(self.layer(x))[0])


def mixed(accelerated=True):
    torch.manual_seed(0)
    model = Mixed()
    model.convolution[1].eval()  # batch statistics would differ between one process and two
    if accelerated:
        bigkern.accelerate(model)
    return model


def batch():
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.emulated
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training, emulator, monkeypatch):
    """With kernels, so that a Sequential runs as one operation; without gradients its batch norm is folded."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(bigkern.backend, "_requested", "cuda")
    model = make("speech encoder").train(training)
    bigkern.accelerate(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs("speech encoder")
    with torch.set_grad_enabled(training):
        output, expected = compiled(*x), twin(*x)
    torch.testing.assert_close(output, expected)
    if training:
        output.square().sum().backward()
        expected.square().sum().backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_recurrent_model_compiles_that_torchs_does_not():
    """torch.compile leaves its graph at torch.nn.GRU (torch 2.13); an accelerated model has none of it."""
    model = mixed().eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(batch()), model(batch()))


def test_a_compiled_model_is_compiled_anew():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 8)
    expected = compiled(x)
    report = bigkern.accelerate(compiled)
    assert report.counts == {"LayerNorm": 1}
    torch.testing.assert_close(compiled(x), expected)
    report.restore()
    assert torch.equal(compiled(x), expected)


def test_exports():
    model = make("MobileNet").eval()
    bigkern.accelerate(model)
    with torch.no_grad():
        program = torch.export.export(model, inputs("MobileNet"))
        torch.testing.assert_close(program.module()(*inputs("MobileNet")), model(*inputs("MobileNet")))


def test_autocast():
    model, twin = mixed(), mixed(accelerated=False)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, expected = model(batch()), twin(batch())
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


def test_saliency():
    """Gradients of the input, once and along a path, as captum's Saliency and IntegratedGradients take them."""
    model = make("ResNet").eval()
    (x,) = inputs("ResNet")

    def saliency(at):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(model(at)[:, 3].sum(), at)[0]

    def integrated():
        return x.detach() * sum(saliency(x * step / 4) for step in range(1, 5)) / 4

    expected = saliency(x), integrated()
    bigkern.accelerate(model)
    for found, truth in zip((saliency(x), integrated()), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_pruning_an_accelerated_model():
    model, twin = mixed(), mixed(accelerated=False)
    for net in (model, twin):
        prune.l1_unstructured(net.convolution[0], "weight", 0.5)
        prune.ln_structured(net.gru, "weight_hh_l0", 0.25, n=2, dim=0)
        prune.l1_unstructured(net.layer.self_attn, "in_proj_weight", 0.3)
        prune.l1_unstructured(net.layer.norm1, "weight", 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's GRU about its flat weights
        torch.testing.assert_close(model(batch()), twin(batch()))
    assert (model.convolution[0].weight == 0).float().mean() == 0.5
    model(batch()).sum().backward()
    assert model.gru.weight_hh_l0_orig.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization():
    if "x86" not in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantized kernels")
    quantize = torch.ao.quantization.quantize_dynamic
    model = mixed().eval()
    expected = model(batch())
    quantized = quantize(model, {nn.Linear})
    assert "quantized" in type(quantized.out).__module__ and type(quantized.gru) is bigkern.nn.GRU
    torch.testing.assert_close(quantized(batch()), expected, rtol=0.05, atol=0.05)
    # The other way round: what is quantized already is not bigkern's affair.
    quantized = quantize(make("GRU tagger").eval(), {nn.Linear, nn.GRU})
    before = quantized(*inputs("GRU tagger"))
    report = bigkern.accelerate(quantized)
    assert report.counts == {"LayerNorm": 1}
    torch.testing.assert_close(quantized(*inputs("GRU tagger")), before)


def _train_in_parallel(rank, port, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = batch()[rank::2]
    model = nn.parallel.DistributedDataParallel(mixed())
    model(half).square().mean().backward()
    grads = {"ddp": [param.grad for param in model.parameters()]}

    model, mesh = mixed(), init_device_mesh("cpu", (2,))
    for part in (model.convolution[0], model.norm, model.layer, model.gru, model):
        fully_shard(part, mesh=mesh)
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=1e-2)
    model(half).square().mean().backward()
    grads["fsdp"] = [param.grad.full_tensor() for param in model.parameters()]
    optimizer.step()
    grads["stepped"] = [param.detach().full_tensor() for param in model.parameters()]
    # What is sharded can no longer be swapped, and says so.
    sharded = fully_shard(nn.LayerNorm(16), mesh=mesh)
    reasons = {row.note for row in bigkern.accelerate(sharded).kept}
    assert reasons == {"sharded by fully_shard: accelerate the model first, then shard it"}
    torch.save(grads, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # not by way of destructors; see tests/ops/test_layer_norm_integration.py


def test_ddp_and_fsdp(tmp_path):
    """Two processes with half the batch each end with the gradients of one with the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = torch.multiprocessing.spawn(_train_in_parallel, (port, str(tmp_path)), nprocs=2, join=False)
    deadline = time.monotonic() + 300
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the two processes hang"
    model = mixed(accelerated=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(batch()).square().mean().backward()
    grads = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    stepped = [param.detach() for param in model.parameters()]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind, expected in (("ddp", grads), ("fsdp", grads), ("stepped", stepped)):
            for mine, whole in zip(found[kind], expected, strict=True):
                # Adam's first step is the sign of the gradient, whatever its size.
                tolerance = dict(rtol=1e-3, atol=2e-4) if kind == "stepped" else dict(rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(mine, whole, **tolerance)
