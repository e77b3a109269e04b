"""Convolution inside PyTorch: opcheck, higher-order gradients, compile, export, autocast, checkpoint, DDP, graphs."""

from __future__ import annotations

import copy
import os
import socket
import time
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.ops import _triton_support, conv1d, conv2d
from bigkern.ops.conv import _torch
from bigkern.ops.conv._schema import ACTIVATIONS
from tests import numerics
from tests.conftest import pick
from tests.ops.convolutions import Convolution

PLAIN = Convolution("plain", 2, 3, 4, (5, 6), (3, 3), padding=1)
POOLED = Convolution(
    "pooled", 2, 2, 3, (7, 6), (3, 2), stride=(1, 2), padding=1, groups=2, activation="gelu", max_pool=2
)
ONE_DIMENSION = Convolution("one dimension", 2, 3, 4, (9,), (3,), activation="silu", max_pool=(3, 2, 1))
FORMS = [PLAIN, POOLED, ONE_DIMENSION]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@pytest.fixture(autouse=True)
def full_float32():
    """Products of float32 are float32, on torch's side too: the default of torch.backends.cudnn is TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# Raw ops


RAW_CASES = pick(
    [
        (activation, max_pool, dtype, channels_last)
        for activation in ACTIVATIONS
        for max_pool in ((), (2, 2, 2, 2, 0, 0), (3, 2, 2, 1, 1, 0))
        for dtype in (torch.float32, torch.bfloat16)
        for channels_last in (False, True)
    ],
    [
        ("relu", (2, 2, 2, 2, 0, 0), torch.bfloat16, True),
        ("silu", (3, 2, 2, 1, 1, 0), torch.float32, False),
    ],
)


@pytest.mark.parametrize(("activation", "max_pool", "dtype", "channels_last"), RAW_CASES)
def test_raw_ops(backend, device, activation, max_pool, dtype, channels_last):
    """opcheck of each op, and its result beside torch's operators."""
    x, w, b = (t.detach() for t in PLAIN.inputs(dtype, device))
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    pool = (max_pool[:2], max_pool[2:4], max_pool[4:]) if max_pool else None
    conv = torch.conv2d(x, w, b, *geometry).requires_grad_()
    expected = _torch.compose(2, x, w, b, *geometry, activation, pool)
    if backend == "torch":
        assert torch.equal(expected, replace(PLAIN, activation=activation, max_pool=pool).reference(x, w, b))
        return
    index = ACTIVATIONS.index(activation)
    raw = getattr(torch.ops, f"bigkern_{backend}")
    arguments = (x, w, b, *geometry, index, max_pool, False, channels_last, True)
    output, preactivation, argmax = raw.conv_forward.default(*arguments)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert (preactivation.shape == output.shape) == (activation not in (None, "relu")) and preactivation.dtype == dtype
    assert (argmax.shape == output.shape) == bool(max_pool) and argmax.dtype == torch.uint8
    torch.library.opcheck(raw.conv_forward.default, arguments)
    if not max_pool:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        residual = numerics.cotangent(output).contiguous(memory_format=memory_format)
        added, _, _ = raw.conv_forward.default(*arguments, residual)
        torch.testing.assert_close(added, _torch.compose(2, x, w, b, *geometry, activation, None, residual))
        torch.library.opcheck(raw.conv_forward.default, (*arguments, residual))

    grad_output = numerics.cotangent(output)
    grad_conv = numerics.cotangent(conv).contiguous(memory_format=torch.channels_last)
    if activation or max_pool:
        arguments = (grad_output, output, preactivation, argmax, conv.shape[2:], index, max_pool)
        found = raw.conv_backward_epilogue.default(*arguments)
        identity = torch.eye(4, dtype=dtype, device=device).view(4, 4, 1, 1)
        after = _torch.compose(2, conv, identity, None, 1, 0, 1, 1, activation, pool)
        torch.testing.assert_close(found, torch.autograd.grad(after, conv, grad_output)[0])
        torch.library.opcheck(raw.conv_backward_epilogue.default, arguments)

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    grads = torch.autograd.grad(torch.conv2d(*leaves, *geometry), leaves, grad_conv)
    arguments = (grad_conv, w, x.shape[2:], *geometry, False, channels_last)
    tolerances = {"rtol": 2e-2 if dtype.itemsize == 2 else 1e-4, "atol": 1e-2 if dtype.itemsize == 2 else 1e-4}
    torch.testing.assert_close(raw.conv_backward_input.default(*arguments), grads[0], **tolerances)
    torch.library.opcheck(raw.conv_backward_input.default, arguments)
    for need_bias in (True, False):
        arguments = (grad_conv, x, w.shape[2:], *geometry, False, channels_last, need_bias)
        found = raw.conv_backward_weight.default(*arguments)
        for mine, its in zip(found, (grads[1], grads[2] if need_bias else grads[2][:0]), strict=True):
            torch.testing.assert_close(mine, its, **tolerances)
    torch.library.opcheck(raw.conv_backward_weight.default, arguments)


# Gradients of gradients


@forms
def test_gradcheck_and_gradgradcheck(form):
    """In float64, which the torch backend serves; the other backends' second order is compared with torch's below."""
    inputs = form.inputs(torch.float64)
    with bigkern.use_backend("torch"):
        assert torch.autograd.gradcheck(form.kernel, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(form.kernel, inputs)


def second_order(function, inputs):
    """Gradients of a function of the gradients, as in a gradient penalty."""
    output = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    cotangent = numerics.cotangent(output).requires_grad_()
    grads = torch.autograd.grad(output, wanted, cotangent, create_graph=True)
    penalty = sum(grad.square().sum() * (i + 1) for i, grad in enumerate(grads))
    return torch.autograd.grad(penalty, [*wanted, cotangent], allow_unused=True)


@forms
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_double_backward_is_torchs(backend, device, form, needed):
    inputs = [x.requires_grad_(need) for x, need in zip(form.inputs(device=device, grad=False), needed, strict=True)]
    for mine, torchs in zip(second_order(form.kernel, inputs), second_order(form.reference, inputs), strict=True):
        if torchs is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_gradient_penalty_reaches_the_weights(backend, device):
    """The gradient of a gradient's norm is wrong, silently, where a backward is an opaque call."""
    x, w, b = POOLED.inputs(device=device)

    def penalty_gradient(function):
        (grad,) = torch.autograd.grad(function(x, w, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad((grad.norm() - 1).square(), w)[0]

    mine, torchs = penalty_gradient(POOLED.kernel), penalty_gradient(POOLED.reference)
    assert torchs.any()
    torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


# Forward mode and functorch


@forms
def test_forward_mode(backend, device, form):
    inputs = form.inputs(device=device, grad=False)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    mine, torchs = (torch.func.jvp(f, tuple(inputs), tangents)[1] for f in (form.kernel, form.reference))
    assert torchs.any()
    torch.testing.assert_close(mine, torchs)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(form.kernel(*dual)).tangent, torchs)


@forms
def test_functorch(backend, device, form):
    inputs = form.inputs(device=device, grad=False)
    batch = [torch.stack([x, 2 * x]) for x in inputs]

    def scalar(function):
        return lambda *tensors: function(*tensors).square().sum()

    arguments = (0, 1, 2)
    for transform, values in (
        (lambda f: torch.func.vmap(f), batch),
        (lambda f: torch.func.grad(scalar(f), arguments), inputs),
        (lambda f: torch.func.vmap(torch.func.grad(scalar(f), arguments)), batch),
        (lambda f: torch.func.hessian(scalar(f), 2), inputs),
    ):
        mine, torchs = transform(form.kernel)(*values), transform(form.reference)(*values)
        for a, b in zip(*(([y] if isinstance(y, torch.Tensor) else y) for y in (mine, torchs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# torch.compile and torch.export


def network(x, w, b):
    """Both functions, with and without what they fuse."""
    hidden = conv2d(x, w, b, padding="same", activation="relu", max_pool=2)
    rows = conv1d(hidden.flatten(2), w[:, :1, 1], b, groups=4, padding=1, activation="gelu")
    return conv2d(rows.unflatten(2, hidden.shape[2:]), w[:, :2], b, groups=2)


NETWORK = Convolution("network", 2, 4, 4, (10, 12), (3, 3))


def agree(mine, others, tolerance=1e-4):
    for a, b in zip(mine[0] + mine[1], others[0] + others[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, device, compiler):
    inputs = NETWORK.inputs(device=device, layout="channels_last")
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    agree(numerics.run(compiled, inputs), numerics.run(network, inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


def test_compile_heeds_tf32(backend, device):
    """The flag is read while tracing: another value is another graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(PLAIN.kernel, fullgraph=True, backend=counter)
    inputs = PLAIN.inputs(device=device, grad=False)
    for allowed in (False, True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            compiled(*inputs)
    assert counter.frame_count == (1 if backend == "torch" else 2)


def test_compile_dynamic_batch(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for images in (2, 3, 5):
        inputs = replace(NETWORK, images=images).inputs(device=device)
        torch._dynamo.mark_dynamic(inputs[0], 0)
        agree((([compiled(*inputs)]), []), (([network(*inputs)]), []))
    assert counter.frame_count == 1


def test_compiled_graphs_hold_the_kernels(backend, device):
    """Forward and backward: a graph that fell back on the composite would still be right, and slow."""
    graphs = {}

    def keep(name):
        def compiler(graph, example):
            graphs[name] = graph.print_readable(print_output=False)
            return graph

        return compiler

    torch._dynamo.reset()
    aot = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    output = torch.compile(POOLED.kernel, fullgraph=True, backend=aot)(*POOLED.inputs(device=device))
    output.sum().backward()
    kernels = {"forward": ["forward"], "backward": ["backward_epilogue", "backward_input", "backward_weight"]}
    for direction, names in kernels.items():
        for name in names:
            assert (f"bigkern_{backend}.conv_{name}" in graphs[direction]) == (backend != "torch")


class Block(torch.nn.Module):
    def __init__(self, channels: int = 4):
        super().__init__()
        self.stem = bigkern.nn.ConvBlock2d(3, channels, 3, padding=1, max_pool=2)
        self.conv = bigkern.nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.rows = bigkern.nn.Conv1d(channels, 2, 3)

    def forward(self, x):
        return self.rows(torch.relu(self.conv(self.stem(x))).flatten(2))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(backend, device, strict):
    module = Block().to(device)
    images = torch.export.Dim("images", min=2, max=64)
    x = torch.randn(6, 3, 6, 8, device=device)
    program = torch.export.export(module, (x,), strict=strict, dynamic_shapes={"x": {0: images}})
    for batch in (x, torch.randn(9, 3, 6, 8, device=device)):
        torch.testing.assert_close(program.module()(batch), module(batch))
    ops = program.graph_module.print_readable(print_output=False)
    assert (f"bigkern_{backend}.conv_forward" in ops) == (backend != "torch")


# Autocast


@forms
@pytest.mark.parametrize("data", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(backend, device, form, data):
    """bfloat16 whatever the tensors are, as torch's convolutions; gradients in the leaves' dtypes."""
    inputs = form.inputs(device=device)
    inputs[0] = inputs[0].detach().to(data).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        outputs, grads = numerics.run(form.kernel, inputs)
        expected, expected_grads = numerics.run(form.reference, inputs)
    assert outputs[0].dtype == expected[0].dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    for mine, torchs in zip(outputs + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(mine.float(), torchs.float(), rtol=3e-2, atol=1e-1)


# Training machinery


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend, device, use_reentrant):
    inputs = POOLED.inputs(device=device)
    kept = torch.autograd.grad(POOLED.kernel(*inputs).square().sum(), inputs)
    checkpoint(POOLED.kernel, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    for x, grad in zip(inputs, kept, strict=True):
        assert torch.equal(x.grad, grad)


def test_an_input_changed_before_the_backward_is_noticed(backend, device):
    inputs = PLAIN.inputs(device=device)
    data = inputs[0].detach().clone()
    output = PLAIN.kernel(data, *inputs[1:])
    data.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_training_is_reproducible(backend, device):
    module = Block().to(device)
    twin = copy.deepcopy(module)
    for m in (module, twin):
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            m(torch.arange(288.0, device=device).view(2, 3, 6, 8).sin()).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def _train_in_parallel(rank: int, backend: str, device: str, port: int, folder: str) -> None:
    import torch.distributed as dist

    if backend == "cuda" and device == "cpu":
        from tests import emulated

        emulated.load("plain")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with bigkern.use_backend(backend):
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(Block().to(device))
        x = torch.randn(4, 3, 6, 8).to(device)
        model(x[rank::2]).square().mean().backward()
    torch.save([p.grad.cpu() for p in model.parameters()], os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    # Not by way of destructors: the model's reducer may be the last to hold the process group, which then joins its
    # thread while it holds the GIL that the thread waits for (seen to hang, torch 2.13).
    os._exit(0)


def test_distributed_data_parallel(backend, device, tmp_path):
    """Two processes with half the batch each end with the gradients of one with the whole."""
    if _triton_support.INTERPRETED and not pick([True], [False])[0]:
        pytest.skip("interpreted it takes long: in make test-all")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (backend, device.type, port, str(tmp_path))
    processes = torch.multiprocessing.spawn(_train_in_parallel, arguments, nprocs=2, join=False)
    deadline = time.monotonic() + 300
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the two processes hang"
    torch.manual_seed(0)
    model = Block().to(device)
    model(torch.randn(4, 3, 6, 8).to(device)).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for mine, whole in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(mine, whole.grad.cpu(), rtol=1e-4, atol=1e-6)


# On a GPU


LARGE = Convolution("large", 16, 32, 64, (32, 32), (3, 3), padding=1, activation="relu", max_pool=2)


@pytest.mark.cuda
def test_cuda_graph_capture_and_replay(backend, device):
    inputs = LARGE.inputs(torch.bfloat16, device, layout="channels_last")

    def step():
        output = LARGE.kernel(*inputs)
        return [output, *torch.autograd.grad(output.float().sum(), inputs)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip([t.clone() for t in results], step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.cuda
def test_other_stream(backend, device):
    """The kernels run on torch's current stream: what is queued there before them is done before them."""
    inputs = LARGE.inputs(torch.bfloat16, device, grad=False)
    expected = LARGE.kernel(*inputs)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, values in zip(late, inputs, strict=True):
            x.copy_(values)
        found = LARGE.kernel(*late)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.multigpu
@pytest.mark.cuda
@forms
def test_tensors_on_the_gpu_that_is_not_current(backend, device, form):
    first, second = (form.inputs(device=f"cuda:{i}") for i in range(2))
    with torch.cuda.device(0):
        expected, found = numerics.run(form.kernel, first), numerics.run(form.kernel, second)
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())


@pytest.mark.cuda
def test_mixed_devices_are_refused(backend, device):
    x, w, b = PLAIN.inputs(device=device, grad=False)
    with pytest.raises(ValueError, match="weight is on cpu and input on cuda"):
        conv2d(x, w.cpu(), b)


@pytest.mark.cuda
def test_no_synchronisation(backend, device):
    inputs = LARGE.inputs(torch.bfloat16, device)
    cotangent = torch.ones_like(LARGE.kernel(*inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(LARGE.kernel(*inputs), inputs, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_heeded(backend, device, allowed):
    """The error of float32 products is 2^-24, of TF32 about 2^-11."""
    form = Convolution("wide", 2, 256, 64, (8, 8), (3, 3))
    inputs = form.inputs(device=device, grad=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        found = form.kernel(*inputs).double()
    truth = form.reference(*(x.double() for x in inputs))
    error = ((found - truth).norm() / truth.norm()).item()
    assert (1e-5 < error < 1e-3) if allowed else error < 1e-6
