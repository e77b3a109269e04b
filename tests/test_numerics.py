"""The error rule can fail."""

from __future__ import annotations

import pytest
import torch

from tests import numerics


def reference(x, w):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w)


def inputs(dtype):
    torch.manual_seed(0)
    return [torch.randn(8, 64).to(dtype).requires_grad_(), torch.randn(64).to(dtype).requires_grad_()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_keeps_its_own_rule(dtype):
    numerics.check(reference, reference, inputs(dtype))


def one_element_off(x, w):
    y = reference(x, w)
    largest = y.detach().abs() == y.detach().abs().max()
    return torch.where(largest, y * 1.03, y)


def wrong_gradient_only(x, w):
    return reference(x, w) + (w - w.detach()) * 0.1


def unwritten(x, w):
    y = reference(x, w)
    out = torch.empty_like(y)
    out[:-1] = y[:-1]
    return out


def running_sums_in_the_inputs_dtype(x, w):
    squares = torch.zeros_like(x[:, 0])
    for column in range(x.shape[1]):
        squares = squares + x[:, column].square()
    return x * torch.rsqrt(squares / x.shape[1] + torch.finfo(torch.float32).eps)[:, None] * w


@pytest.mark.parametrize("bad", [one_element_off, wrong_gradient_only, unwritten])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_caught(bad, dtype):
    with pytest.raises(AssertionError):
        numerics.check(bad, reference, inputs(dtype))


def test_running_sums_in_low_precision_are_caught():
    x, w = torch.randn(8, 512).bfloat16(), torch.ones(512).bfloat16()
    with pytest.raises(AssertionError):
        numerics.check(
            running_sums_in_the_inputs_dtype, lambda x, w: torch.nn.functional.rms_norm(x, x.shape[-1:], w), [x, w]
        )


def errs(factor):
    """The reference with rounding errors of ``factor`` units in the last place added, at random."""

    def function(x, w):
        y = reference(x, w)
        return y * (1 + factor * torch.finfo(y.dtype).eps * (2 * torch.rand_like(y) - 1))

    return function


def test_an_unlucky_draw_is_drawn_again_and_a_bad_kernel_still_fails():
    calls = []

    def unlucky_once(x, w):
        calls.append(x)
        return errs(3.5 if len(calls) == 1 else 0)(x, w)

    unlucky = [x.detach() for x in inputs(torch.float32)]
    assert not numerics._within(numerics._draw(errs(3.5), reference, unlucky, [], 0)[0])
    numerics.check(unlucky_once, reference, unlucky)
    assert len(calls) == numerics.DRAWS
    with pytest.raises(AssertionError, match="output 0, 8 draws"):
        numerics.check(errs(3.5), reference, unlucky)


def wrong_once():
    """Three hundredths of the largest element, in the first draw alone."""
    calls = []

    def function(x, w):
        calls.append(x)
        return one_element_off(x, w) if len(calls) == 1 else reference(x, w)

    return function


def test_more_draws_do_not_hide_what_is_wrong_in_one():
    with pytest.raises(AssertionError):
        numerics.check(wrong_once(), reference, [x.detach() for x in inputs(torch.float32)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_redrawn_tensor_keeps_its_layout_and_its_special_values(dtype):
    base = torch.randn(4, 6, 5).to(dtype)
    base[0, 0, 0], base[1, 2, 3], base[2, 3, 4] = 0, torch.inf, torch.nan
    for x in (base, base[1:, ::2].transpose(0, 2), base[0, 0].expand(3, 5)):
        again = numerics.redrawn(x.requires_grad_(), 1)
        assert (again.stride(), again.storage_offset(), again.dtype) == (x.stride(), x.storage_offset(), dtype)
        assert again.requires_grad and again.data_ptr() != x.data_ptr()
        torch.testing.assert_close(again, x, rtol=0.08, atol=0, equal_nan=True)
        values, same, others = (y.detach().nan_to_num() for y in (again, numerics.redrawn(x, 1), x))
        assert torch.equal(values, same) and not torch.equal(values, others)
    whole = torch.arange(3)
    assert numerics.redrawn(whole, 1) is whole and numerics.redrawn(None, 1) is None


def test_nan_must_be_where_the_truth_has_it():
    truth = torch.tensor([1.0, float("nan"), float("inf")])
    assert numerics.errors(truth, truth) == (0, 0)
    for wrong in (
        [float("nan"), float("nan"), float("inf")],
        [1.0, 0.0, float("inf")],
        [1.0, float("nan"), -float("inf")],
    ):
        assert numerics.errors(torch.tensor(wrong), truth) == (float("inf"), float("inf"))
