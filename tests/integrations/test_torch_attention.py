"""bigkern in place of torch's flash attention: torch's contract, and the emulated kernels behind torch's own op."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention

from bigkern.integrations import torch_attention as integration
from tests.numerics import assert_close, cotangent

pytestmark = pytest.mark.skipif(
    not hasattr(torch_attention, "register_flash_attention_impl"), reason="this torch has no registry"
)

FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


@pytest.fixture
def on_cpu(emulator):
    """torch's flash op on CPU tensors runs the emulated kernels, its gradient too."""
    handle = integration.override("CPU")
    yield
    handle.remove()


@pytest.mark.parametrize(
    "implementation, op",
    [(integration.forward, FLASH), (integration.backward, FLASH_BACKWARD)],
    ids=["forward", "backward"],
)
def test_signatures_are_torchs(implementation, op):
    ours = list(inspect.signature(implementation).parameters.values())
    arguments = op._schema.arguments
    assert [(x.name, x.kind is x.KEYWORD_ONLY) for x in ours] == [(x.name, x.kwarg_only) for x in arguments]
    for parameter, argument in zip(ours, arguments, strict=True):
        if argument.has_default_value():
            assert parameter.default == argument.default_value


def test_only_the_user_activates_it():
    integration.register()
    assert "bigkern" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() != "bigkern"
    torch_attention.activate_flash_attention_impl("bigkern")
    try:
        assert torch_attention.current_flash_attention_impl() == "bigkern"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(FLASH.name(), "CUDA")
        # CPU tensors do not come here.
        x = torch.randn(1, 2, 3, 8)
        assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    finally:
        torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None


@pytest.mark.emulated
@pytest.mark.parametrize("causal, heads, layout", [(True, 2, "joined"), (False, 1, "contiguous")])
def test_torchs_op_runs_the_kernels(on_cpu, causal, heads, layout):
    """Grouped queries, strides of a projection, scale; results and gradients in the inputs' layouts."""
    torch.manual_seed(0)
    shape = (2, 5, 2, 16)

    def draw(count):
        x = torch.randn(*shape[:2], count, shape[3]).bfloat16().transpose(1, 2)
        return (x.contiguous() if layout == "contiguous" else x).requires_grad_()

    q, k, v = draw(2), draw(heads), draw(heads)

    def reference(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3, enable_gqa=True)

    def gradients(output):
        return torch.autograd.grad(output, (q, k, v), cotangent(output))

    output, lse, *_ = FLASH(q, k, v, 0.0, causal, scale=0.3)
    assert output.stride() == torch.empty_like(q).stride() and lse.shape == (2, 2, 5)
    grads = gradients(output)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference(q, k, v)
        expected_grads = gradients(expected)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        truth = reference(*exact)
        true_grads = torch.autograd.grad(truth, exact, cotangent(expected).double())
    assert_close("output", output, expected, truth)
    for name, x, *results in zip("qkv", (q, k, v), grads, expected_grads, true_grads, strict=True):
        assert results[0].stride() == torch.empty_like(x).stride()
        assert_close(f"gradient of {name}", *results)


@pytest.mark.emulated
def test_dropout_is_redrawn_by_the_backward(on_cpu):
    """The gradient is that of the mask which the forward drew: the sum of p_ij is linear in v."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, 16).bfloat16().unbind()
    v = torch.randn(1, 1, 8, 16).bfloat16().requires_grad_()
    output, *_ = FLASH(q, k, v, 0.5)
    cotangents = cotangent(output)
    (grad,) = torch.autograd.grad(output, v, cotangents)
    torch.testing.assert_close((grad * v).sum(), (output * cotangents).sum(), rtol=0.05, atol=0.3)
    torch.manual_seed(0)
    torch.randn(2, 1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    assert torch.equal(FLASH(q, k, v, 0.5)[0], output)
    assert not torch.equal(FLASH(q, k, v, 0.5)[0], output)


@pytest.mark.emulated
def test_what_it_cannot_serve_is_refused(on_cpu):
    x = torch.randn(1, 1, 4, 512).bfloat16()
    with pytest.raises(RuntimeError, match=r"head_dim is 512.*restore_flash_attention_impl"):
        FLASH(x, x, x)
    with pytest.raises(RuntimeError, match="return_debug_mask must be False"):
        FLASH(x, x, x, 0.0, False, True)


@pytest.mark.cuda
def test_scaled_dot_product_attention_on_cuda(device):
    integration.register()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch_attention.activate_flash_attention_impl("bigkern")
    try:
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            grads = torch.autograd.grad(output.float().sum(), (q, k, v))
    finally:
        torch_attention.restore_flash_attention_impl()
    torch.testing.assert_close(output, expected)
    for grad, truth in zip(grads, torch.autograd.grad(expected.float().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, truth, rtol=2e-2, atol=2e-2)
