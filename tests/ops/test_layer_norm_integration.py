"""Layer norm inside PyTorch: opcheck, higher-order gradients, compile, export, autocast, checkpoint, DDP, graphs."""

from __future__ import annotations

import copy
import os
import socket
import time

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.ops import add_layer_norm, layer_norm, rms_norm
from bigkern.ops.layer_norm import _torch
from tests import numerics
from tests.conftest import pick
from tests.ops.forms import ADD_LAYER_NORM, EPS, FORMS, LAYER_NORM

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def outputs_of(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


def dropped(x, residual, w, b, philox):
    return add_layer_norm(x, residual, x.shape[-1:], w, b, EPS, 0.3, philox=philox)


# Raw ops


RAW_CASES = pick(
    [
        (rms, residual, affine, dropout_p, dtype)
        for rms in (False, True)
        for residual in (False, True)
        for affine in (False, True)
        for dropout_p in ((0.0, 0.3) if residual else (0.0,))
        for dtype in (torch.float32, torch.bfloat16)
    ],
    [(False, False, True, 0.0, torch.float32), (True, False, False, 0.0, torch.bfloat16),
     (False, True, True, 0.3, torch.bfloat16)],
)  # fmt: skip


@pytest.mark.parametrize(("rms", "residual", "affine", "dropout_p", "dtype"), RAW_CASES)
def test_raw_ops(backend, device, rms, residual, affine, dropout_p, dtype):
    """opcheck; and every result, the statistics too, beside the torch backend's statement of the mathematics."""
    torch.manual_seed(0)

    def data():
        return torch.randn(5, 24, device=device).to(dtype)

    weight = torch.randn(24, device=device).to(dtype) if affine else None
    bias = torch.randn(24, device=device).to(dtype) if affine and not rms else None
    philox = torch.tensor([3, 5], device=device) if dropout_p else None
    x, r = data(), data() if residual else None
    arguments = (x, r, weight, bias, EPS, rms, dropout_p, philox)
    expected = _torch.forward(*arguments)
    summed = expected[1] if residual else x
    grad_arguments = (
        *(data(), data() if residual else None, summed, *expected[2:], weight, rms, dropout_p, philox),
        *(affine, bias is not None),
    )
    expected_grads = _torch.backward(*grad_arguments)
    if backend == "torch":
        wanted = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        parameters = (weight,) if rms else (weight, bias)
        torch.testing.assert_close(expected[0], wanted(summed, (24,), *parameters, eps=EPS))
        return
    raw = getattr(torch.ops, f"bigkern_{backend}")
    found = raw.layer_norm_forward.default(*arguments)
    grads = raw.layer_norm_backward.default(*grad_arguments)
    for mine, its in zip(found + grads, expected + expected_grads, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype
        torch.testing.assert_close(mine, its)
    torch.library.opcheck(raw.layer_norm_forward.default, arguments)
    torch.library.opcheck(raw.layer_norm_backward.default, grad_arguments)


# Gradients of gradients


@forms
def test_gradcheck_and_gradgradcheck(form):
    """In float64, which the torch backend serves; the other backends' second order is compared with torch's below."""
    inputs = form.inputs(3, 5, dtype=torch.float64)
    with bigkern.use_backend("torch"):
        assert torch.autograd.gradcheck(form.kernel, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(form.kernel, inputs)


def test_gradcheck_with_dropout():
    inputs = [*ADD_LAYER_NORM.inputs(3, 5, dtype=torch.float64), torch.tensor([1, 2])]
    with bigkern.use_backend("torch"):
        assert torch.autograd.gradcheck(dropped, inputs)
        assert torch.autograd.gradgradcheck(dropped, inputs)


def second_order(function, inputs):
    """Gradients of a function of the gradients, as in a gradient penalty."""
    outputs = outputs_of(function(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    cotangents = [numerics.cotangent(y, i).requires_grad_() for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True)
    penalty = sum(grad.square().sum() * (i + 1) for i, grad in enumerate(grads))
    return torch.autograd.grad(penalty, [*wanted, *cotangents], allow_unused=True)


@forms
def test_double_backward_is_torchs(backend, device, form):
    inputs = form.inputs(4, 24, device=device)
    for mine, torchs in zip(second_order(form.kernel, inputs), second_order(form.reference, inputs), strict=True):
        if torchs is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_double_backward_with_dropout_is_torchs(backend, device):
    inputs = [*ADD_LAYER_NORM.inputs(4, 24, device=device), torch.tensor([5, 6], device=device)]
    mine = second_order(dropped, inputs)
    with bigkern.use_backend("torch"):
        torchs = second_order(dropped, inputs)
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_penalty_reaches_the_weights(backend, device):
    """The gradient of a gradient's norm is wrong, silently, where a backward is an opaque call."""
    x, w, b = LAYER_NORM.inputs(4, 24, device=device)

    def penalty_gradient(function):
        linear = torch.eye(24, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x @ linear, w, b).square().sum(), x, create_graph=True)
        (grad.norm() - 1).square().backward(inputs=[linear])
        return linear.grad

    torch.testing.assert_close(
        penalty_gradient(LAYER_NORM.kernel), penalty_gradient(LAYER_NORM.reference), rtol=1e-4, atol=1e-4
    )


# Forward mode and functorch


@forms
def test_forward_mode(backend, device, form):
    inputs = form.inputs(3, 8, device=device, grad=False)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    mine, torchs = (torch.func.jvp(f, tuple(inputs), tangents)[1] for f in (form.kernel, form.reference))
    for a, b in zip(outputs_of(mine), outputs_of(torchs), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        for a, b in zip(outputs_of(form.kernel(*dual)), outputs_of(torchs), strict=True):
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(a).tangent, b)


@forms
def test_functorch(backend, device, form):
    inputs = form.inputs(3, 8, device=device, grad=False)
    batch = [torch.stack([x, 2 * x]) for x in inputs]

    def scalar(function):
        return lambda *tensors: sum(y.square().sum() for y in outputs_of(function(*tensors)))

    arguments = tuple(range(len(inputs)))
    for transform, values in (
        (lambda f: torch.func.vmap(f), batch),
        (lambda f: torch.func.grad(scalar(f), arguments), inputs),
        (lambda f: torch.func.vmap(torch.func.grad(scalar(f), arguments)), batch),
        (lambda f: torch.func.hessian(scalar(f)), inputs),
    ):
        mine, torchs = transform(form.kernel)(*values), transform(form.reference)(*values)
        for a, b in zip(outputs_of(mine), outputs_of(torchs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# torch.compile and torch.export


def all_three(x, residual, w, b):
    output, summed = add_layer_norm(x, residual, x.shape[-1:], w, b)
    return layer_norm(output * summed, x.shape[-1:], w, b) + rms_norm(summed, x.shape[-1:], w)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, device, compiler):
    inputs = ADD_LAYER_NORM.inputs(6, 32, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(all_three, fullgraph=True, backend=compiler)
    for mine, eager in zip(numerics.run(compiled, inputs), numerics.run(all_three, inputs), strict=True):
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), all_three(*inputs), rtol=1e-5, atol=1e-5)


def test_compile_dynamic_shapes(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(all_three, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for shape in ((6, 32), (9, 48), (2, 3, 24)):
        inputs = ADD_LAYER_NORM.inputs(*shape, device=device)
        for mine, eager in zip(numerics.run(compiled, inputs), numerics.run(all_three, inputs), strict=True):
            for a, b in zip(mine, eager, strict=True):
                torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] < counts[2]  # compiled again for another number of dimensions only


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
    output, summed = torch.compile(ADD_LAYER_NORM.kernel, fullgraph=True, backend=aot)(
        *ADD_LAYER_NORM.inputs(6, 32, device=device)
    )
    (output * summed).sum().backward()
    for direction in ("forward", "backward"):
        kernel = f"bigkern_{backend}.layer_norm_{direction}"
        assert (kernel in graphs[direction]) == (backend != "torch")


def test_compile_dropout(backend, device):
    x, residual, w, b = ADD_LAYER_NORM.inputs(64, 64, device=device)
    philox = torch.tensor([1, 2], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    for a, b_ in zip(compiled(x, residual, w, b, philox), dropped(x, residual, w, b, philox), strict=True):
        torch.testing.assert_close(a, b_)

    def drawing(x, residual):
        return add_layer_norm(x, residual, (64,), dropout_p=0.3, return_philox=True)

    output, summed, philox = torch.compile(drawing, fullgraph=True, backend="aot_eager")(x, residual)
    assert torch.equal(summed, dropped(x, residual, None, None, philox)[1])
    torch.autograd.grad((output * summed).sum(), (x, residual))


class Block(torch.nn.Module):
    def __init__(self, cols: int):
        super().__init__()
        self.norm, self.add_norm = bigkern.nn.LayerNorm(cols), bigkern.nn.AddLayerNorm(cols)
        self.linear, self.rms = torch.nn.Linear(cols, cols), bigkern.nn.RMSNorm(cols)

    def forward(self, x):
        output, summed = self.add_norm(self.linear(self.norm(x)), x)
        return self.rms(output + summed)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(backend, device, strict):
    module = Block(16).to(device)
    rows = torch.export.Dim("rows", min=2, max=64)
    x = torch.randn(6, 16, device=device)
    program = torch.export.export(module, (x,), strict=strict, dynamic_shapes={"x": {0: rows}})
    for batch in (x, torch.randn(9, 16, device=device)):
        torch.testing.assert_close(program.module()(batch), module(batch))
    ops = program.graph_module.print_readable(print_output=False)
    assert (f"bigkern_{backend}.layer_norm_forward" in ops) == (backend != "torch")


# Autocast


@forms
@pytest.mark.parametrize("data", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(backend, device, form, data):
    """The dtypes of torch's own operators under autocast on that device, and gradients in the leaves' dtypes."""
    inputs = form.inputs(4, 32, dtype=data, device=device, parameter_dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        outputs, grads = numerics.run(form.kernel, inputs)
        expected, expected_grads = numerics.run(form.reference, inputs)
    assert [y.dtype for y in outputs[:1]] == [y.dtype for y in expected[:1]]
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    for mine, torchs in zip(outputs + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(mine.float(), torchs.float(), rtol=2e-2, atol=5e-2)


def test_autocast_adds_a_half_sublayer_to_a_float32_stream(backend, device):
    x, residual, w, b = ADD_LAYER_NORM.inputs(4, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        sublayer = x @ torch.eye(32, device=device)
        output, summed = ADD_LAYER_NORM.kernel(sublayer, residual, w, b)
    assert sublayer.dtype == torch.bfloat16 and output.dtype == summed.dtype == torch.float32
    torch.testing.assert_close(summed, residual + sublayer.float())
    (output * summed).sum().backward()
    assert x.grad.dtype == torch.float32


# Training machinery


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_redraws_the_same_mask(backend, device, use_reentrant):
    torch.manual_seed(0)
    x, residual, w, b = ADD_LAYER_NORM.inputs(16, 64, device=device)
    seen = []

    def block(x, residual):
        output, summed = add_layer_norm(x, residual, (64,), w, b, dropout_p=0.5)
        seen.append(summed.detach().clone())
        return output * summed

    loss = checkpoint(block, x, residual, use_reentrant=use_reentrant).sum()
    torch.rand(5, device=device)  # the generator moves on between forward and recomputation
    loss.backward()
    assert len(seen) == 2 and torch.equal(*seen)
    # The gradient belongs to that mask: nothing flows to what was dropped.
    assert torch.equal(x.grad != 0, seen[0] != residual)


def test_gradient_scaler_and_optimizer(backend, device):
    module = Block(16).to(device)
    twin = copy.deepcopy(module)
    for m in (module, twin):
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            m(torch.arange(32.0, device=device).view(2, 16).sin()).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def _train_in_parallel(rank: int, backend: str, device: str, port: int, folder: str) -> None:
    import torch.distributed as dist

    if backend == "cuda" and device == "cpu":
        from tests import emulated

        emulated.load("plain")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with bigkern.use_backend(backend):
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(Block(16).to(device))
        x = torch.randn(8, 16).to(device)
        model(x[rank::2]).square().mean().backward()
    torch.save([p.grad.cpu() for p in model.parameters()], os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    # Not by way of destructors: the model's reducer may be the last to hold the process group, which then joins its
    # thread while it holds the GIL that the thread waits for (seen to hang, torch 2.13).
    os._exit(0)


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
    model = Block(16).to(device)
    model(torch.randn(8, 16).to(device)).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for mine, whole in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(mine, whole.grad.cpu(), rtol=1e-4, atol=1e-6)


# On a GPU


@pytest.mark.cuda
def test_cuda_graph_capture_and_replay(backend, device):
    x, residual, w, b = ADD_LAYER_NORM.inputs(64, 256, device=device)

    def step():
        output, summed, philox = add_layer_norm(x, residual, (256,), w, b, dropout_p=0.5, return_philox=True)
        grads = torch.autograd.grad((output * summed).sum(), (x, residual, w, b))
        return [output, summed, philox, *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    masks = []
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in results]
        output, summed = add_layer_norm(x, residual, (256,), w, b, dropout_p=0.5, philox=replayed[2])
        eager = [output, summed, *torch.autograd.grad((output * summed).sum(), (x, residual, w, b))]
        for a, b_ in zip([*replayed[:2], *replayed[3:]], eager, strict=True):
            assert torch.equal(a, b_)
        masks.append(replayed[1] != residual)
    assert not torch.equal(*masks)


@pytest.mark.cuda
@forms
def test_other_stream(backend, device, form):
    """The kernels run on torch's current stream: what is queued there before them is done before them."""
    inputs = form.inputs(512, 1024, device=device, grad=False)
    expected = outputs_of(form.kernel(*inputs))
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, values in zip(late, inputs, strict=True):
            x.copy_(values)
        found = outputs_of(form.kernel(*late))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.multigpu
@pytest.mark.cuda
@forms
def test_tensors_on_the_gpu_that_is_not_current(backend, device, form):
    first, second = (form.inputs(64, 256, device=f"cuda:{i}") for i in range(2))
    with torch.cuda.device(0):
        expected, found = numerics.run(form.kernel, first), numerics.run(form.kernel, second)
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())


@pytest.mark.cuda
def test_mixed_devices_are_refused(backend, device):
    x = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="weight is on cpu and input on cuda"):
        layer_norm(x, (8,), torch.ones(8))


@pytest.mark.cuda
def test_no_synchronisation(backend, device):
    inputs = ADD_LAYER_NORM.inputs(64, 256, device=device)
    philox = torch.tensor([1, 2], device=device)
    outputs = dropped(*inputs, philox)
    cotangents = [torch.ones_like(y) for y in outputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(dropped(*inputs, philox), inputs, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
