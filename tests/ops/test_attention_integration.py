"""Attention inside PyTorch: opcheck, higher-order gradients, compile, export, autocast, checkpoint, graphs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.ops import attention, attention_varlen
from bigkern.ops.attention import _torch
from tests import numerics

PHILOX = torch.tensor([3, 5])


def tensors(dtype=torch.float32, device="cpu", grad=True, heads=(2, 2), lengths=(6, 9), dim=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, n, dim, generator=generator).to(device, dtype).requires_grad_(grad)
        for h, n in zip((heads[0], *[heads[1]] * 2), (lengths[0], *[lengths[1]] * 2), strict=True)
    ]


def everything(q, k, v, bias):
    """All features at once, and both results."""
    return attention(
        q,
        k,
        v,
        bias,
        0.3,
        enable_gqa=True,
        window=(5, 2),
        softcap=4.0,
        alibi_slopes=torch.tensor([0.5, 0.25], device=q.device),
        return_lse=True,
        philox=PHILOX.to(q.device),
    )


def plain(q, k, v):
    return attention(q, k, v, is_causal=True)


def plain_reference(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_bias(device="cpu", dtype=torch.float32, grad=True):
    q, k, v = tensors(dtype, device, grad, heads=(2, 1))
    bias = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_(grad)
    return [q, k, v, bias]


# Raw ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_raw_ops(backend, device, dtype, features):
    """opcheck; and every result beside the torch backend's statement of the mathematics."""
    q, k, v, bias = with_bias(device, dtype, grad=False)
    options = [None, None, None, None, 6, 9, -1, 0, False, 0.0, 0.5, 0.0, None, False]
    with_slopes = features and backend != "triton"
    if features:
        slopes = torch.tensor([0.5, 0.25], device=device)
        options = [bias.unsqueeze(0), slopes, None, None, 6, 9, 4, 2, True, 4.0, 0.5, 0.3, PHILOX.to(device), False]
    expected = _torch.forward(q, k, v, *options)
    grads = [torch.randn(1, 2, 6, 8, device=device).to(dtype), torch.randn(1, 2, 6, device=device)]
    expected_grads = _torch.backward(*grads, q, k, v, *expected, *options, features, with_slopes, False)
    if backend == "torch":
        assert all(x.isfinite().all() for x in (*expected, *expected_grads))
        return
    raw = getattr(torch.ops, f"bigkern_{backend}")
    found = raw.attention_forward.default(q, k, v, *options)
    backward = (*grads, q, k, v, *found, *options, features, with_slopes, False)
    found_grads = raw.attention_backward.default(*backward)
    for mine, its in zip(found + found_grads, expected + expected_grads, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))
    torch.library.opcheck(raw.attention_forward.default, (q, k, v, *options))
    torch.library.opcheck(raw.attention_backward.default, backward)


# Gradients of gradients, forward mode, functorch


def test_gradcheck_and_gradgradcheck():
    """In float64, which the torch backend serves; the other backends' second order is compared with torch's below."""
    with bigkern.use_backend("torch"):
        inputs = [x.detach()[..., :4, :] for x in with_bias(dtype=torch.float64)]
        inputs[3] = inputs[3][..., :4]
        inputs = [x.contiguous().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(everything, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(everything, inputs)
        packed = [x[0].transpose(0, 1).detach().requires_grad_() for x in tensors(torch.float64, lengths=(5, 5), dim=3)]
        cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        assert torch.autograd.gradcheck(lambda *t: attention_varlen(*t, cu, cu, 3, 3, is_causal=True), packed)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7, "window": (2, 1)}], ids=str)
def test_gradgradcheck_of_torchs_fused_operator(options):
    """Without an extra, and without a gradient of the mask, the torch backend is torch's operator for CPUs."""
    with bigkern.use_backend("torch"):
        q, k, v = tensors(torch.float64, heads=(2, 1), lengths=(3, 4), dim=3)
        mask = torch.randn(1, 2, 3, 4, dtype=torch.float64)
        for given in (None, mask, mask > -0.5):
            if options.get("is_causal") and given is not None:
                continue

            def function(q, k, v, mask=given):
                return attention(q, k, v, mask, enable_gqa=True, **options)

            if "window" not in options:  # there its shape is given back by a view
                assert "FlashAttentionForCpu" in function(q, k, v).grad_fn.name()
            assert torch.autograd.gradgradcheck(function, (q, k, v))
        some = q.detach()
        assert torch.autograd.gradgradcheck(lambda k, v: attention(some, k, v, enable_gqa=True, **options), (k, v))
        if not options.get("is_causal"):
            bias = mask.clone().requires_grad_()
            assert torch.autograd.gradgradcheck(lambda *t: attention(*t, enable_gqa=True, **options), (q, k, v, bias))


def test_the_second_derivative_keeps_nothing_alive():
    """What autograd has freed is gone, although a hook could still use it; a second backward pass is refused."""
    with bigkern.use_backend("torch"):
        leaf = tensors()[0]
        query = leaf * 2
        reference = weakref.ref(query)
        output = attention(query, leaf, leaf)
        del query
        gc.collect()
        assert reference() is not None
        (grad,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)[0].any()
        del grad
        output.sum().backward()
        gc.collect()
        assert reference() is None


def test_gradient_of_alibi_slopes(backend, device):
    slopes = torch.tensor([0.5, 0.25], device=device, requires_grad=True)
    inputs = tensors(device=device)
    if backend == "triton":
        with pytest.raises(bigkern.BackendError, match=r"alibi_slopes requires a gradient(.|\n)*What works"):
            attention(*inputs, alibi_slopes=slopes)
        with torch.no_grad():
            attention(*inputs, alibi_slopes=slopes)
        return
    if backend == "cuda":
        found = []
        for name in ("cuda", "torch"):
            with bigkern.use_backend(name):
                (grad,) = torch.autograd.grad(
                    attention(*inputs, alibi_slopes=slopes).square().sum(), slopes, create_graph=True
                )
                found.append((grad, *torch.autograd.grad(grad.sum(), slopes)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        return
    inputs, slopes = [x.double().detach().requires_grad_() for x in inputs], slopes.double().detach().requires_grad_()
    for options in ({}, {"softcap": 3.0, "return_lse": True}):
        assert torch.autograd.gradcheck(
            lambda s, options=options: attention(*inputs, alibi_slopes=s, **options), slopes
        )


def second_order(function, inputs):
    """Gradients of a function of the gradients, as in a gradient penalty."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    cotangents = [numerics.cotangent(y, i).requires_grad_() for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
    penalty = sum(grad.square().sum() * (i + 1) for i, grad in enumerate(grads))
    return torch.autograd.grad(penalty, [*inputs, *cotangents], allow_unused=True)


def test_double_backward_is_torchs(backend, device):
    for function, inputs in ((everything, with_bias(device)), (plain, tensors(device=device))):
        mine = second_order(function, inputs)
        with bigkern.use_backend("torch"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            its = second_order(function, inputs)
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [everything, plain])
def test_forward_mode(backend, device, function):
    inputs = with_bias(device, grad=False) if function is everything else tensors(device=device, grad=False)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    mine = torch.func.jvp(function, tuple(inputs), tangents)[1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        its = torch.func.jvp(everything if function is everything else plain_reference, tuple(inputs), tangents)[1]
    mine, its = ([x] if isinstance(x, torch.Tensor) else x for x in (mine, its))
    for a, b in zip(mine, its, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


def test_functorch(backend, device):
    inputs = tensors(device=device, grad=False)
    batch = [torch.stack([x, 2 * x]) for x in inputs]

    def math(q, k, v):
        scores = (q @ k.transpose(-2, -1)) * 8**-0.5
        hidden = torch.ones(6, 9, dtype=torch.bool, device=q.device).triu(1)
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v

    def capped(q, k, v):
        return attention(q, k, v, is_causal=True, return_lse=True)[0]

    def scalar(function):
        return lambda *t: function(*t).square().sum()

    for transform, values in (
        (lambda f: torch.func.vmap(f), batch),
        (lambda f: torch.func.grad(scalar(f), (0, 1, 2)), inputs),
        (lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 1, 2))), batch),
    ):
        mine, its = transform(capped)(*values), transform(math)(*values)
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


# torch.compile and torch.export


def test_compile_fullgraph(backend, device):
    inputs = with_bias(device)

    def both(q, k, v, bias):
        output, lse = everything(q, k, v, bias)
        return output + plain(q, k.expand(1, 2, 9, 8), v.expand(1, 2, 9, 8)), lse

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(numerics.run(compiled, inputs), numerics.run(both, inputs), strict=True):
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compile_varlen(backend, device):
    x = [torch.randn(10, 2, 8, device=device, requires_grad=True) for _ in range(3)]
    cu = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)

    def function(q, k, v):
        return attention_varlen(q, k, v, cu, cu, 6, 6, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(numerics.run(compiled, x), numerics.run(function, x), strict=True):
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_export(backend, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return plain(q, k, v)

    inputs = tuple(tensors(device=device, grad=False))
    torch._dynamo.reset()
    exported = torch.export.export(Module(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), plain(*inputs))


# Autocast, checkpointing, graphs


def test_autocast(backend, device):
    inputs = tensors(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        output = attention(*inputs, return_lse=True)[0]
        assert output.dtype == attention(*inputs).dtype == torch.bfloat16
        assert F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
        mixed = attention(inputs[0].bfloat16(), *inputs[1:], torch.zeros(6, 9, device=device))
        assert mixed.dtype == torch.bfloat16
    grads = torch.autograd.grad(output.float().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_redraws_the_mask(backend, device, use_reentrant):
    def gradients(through):
        inputs = tensors(device=device)
        torch.manual_seed(0)
        output = through(lambda *t: attention(*t, dropout_p=0.5), inputs)
        output.square().sum().backward()
        return [output, *(x.grad for x in inputs)]

    expected = gradients(lambda f, inputs: f(*inputs))
    found = gradients(lambda f, inputs: checkpoint(f, *inputs, use_reentrant=use_reentrant))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_output_lies_as_the_heads_are_joined(backend, device):
    """(batch, seqlen, heads, dim) in memory: joining the heads copies nothing."""
    if backend == "torch":
        pytest.skip("as torch's operator leaves it")
    output = attention(*tensors(device=device, grad=False))
    joined = output.transpose(1, 2).reshape(1, 6, 16)
    assert joined.data_ptr() == output.data_ptr()


@pytest.mark.cuda
def test_cuda_graph(backend, device):
    if backend == "torch":
        pytest.skip("torch's own operator")
    inputs = tensors(torch.bfloat16, device, grad=False, lengths=(64, 200), dim=64)
    expected = attention(*inputs, is_causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention(*inputs, is_causal=True)
    inputs[0].mul_(1)
    graph.replay()
    torch.testing.assert_close(output, expected)
