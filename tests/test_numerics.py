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


def test_nan_must_be_where_the_truth_has_it():
    truth = torch.tensor([1.0, float("nan"), float("inf")])
    assert numerics.errors(truth, truth) == (0, 0)
    for wrong in (
        [float("nan"), float("nan"), float("inf")],
        [1.0, 0.0, float("inf")],
        [1.0, float("nan"), -float("inf")],
    ):
        assert numerics.errors(torch.tensor(wrong), truth) == (float("inf"), float("inf"))
