"""The errors and the rule by which selfcheck, accuracy and the benchmarks judge."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from bigkern.ops._case import Case
from bigkern.tools import evaluation
from bigkern.tools.evaluation import Errors, compare, discover, errors, limit, make_reference


def test_errors_are_relative_in_norm_and_in_largest_element():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = errors(torch.tensor([3.0, 4.5]), reference)
    assert found.norm == pytest.approx(0.5 / 5)
    assert found.max == pytest.approx(0.5 / 4)


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, 2.0, 3.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_errors_of_what_is_not_finite_or_has_another_shape(actual, reference, expected):
    found = errors(torch.tensor(actual), torch.tensor(reference, dtype=torch.float64))
    assert found == (expected, expected)


def test_limit_is_twice_torchs_error_and_one_rounding():
    assert limit(Errors(1e-3, 2e-3), torch.bfloat16, 64) == (2e-3 + 2**-9, 4e-3 + 2**-7)
    assert limit(Errors(0.0, 0.0), torch.float32, 1000) == (2**-25, 2**-23)


def test_limit_over_a_few_elements_is_four_roundings():
    assert limit(Errors(0.0, 0.0), torch.float32, 63) == (2**-21, 2**-21)


def test_layer_norms_cases_are_discovered_and_cover_the_contract():
    cases = discover()["layer_norm"]
    assert {case.function for case in cases} == {"layer_norm", "rms_norm", "add_layer_norm"}
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for trait in ("mean 1000", "scale 1000", "scale 0.001", "x40000", "no weight", "fp32 weight", "dropout 0.1"):
        assert any(trait in name for name in names), trait


def test_cases_draw_equal_inputs_for_equal_seeds():
    for case in discover()["layer_norm"]:
        first, again, other = (case.make_inputs(case.dtypes[0], "cpu", seed) for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first), case.name
        assert not torch.equal(first["input"], other["input"]), case.name
        assert set(case.gradients) <= set(first), case.name


def test_reference_gradients_are_those_of_finite_differences():
    """A reference that were wrong in itself would pass every kernel that shares its mistake."""
    for function in ("layer_norm", "rms_norm", "add_layer_norm"):
        from bigkern.ops.layer_norm._cases import make_case

        case = make_case(function, 3, 5, dropout_p=0.5 if function == "add_layer_norm" else 0.0)
        inputs = evaluation.to_float64(case.make_inputs(torch.float32, "cpu", 0))
        leaves = [inputs[name].requires_grad_() for name in case.gradients]

        def call(*tensors, case=case, inputs=inputs):
            return tuple(case.reference(inputs | dict(zip(case.gradients, tensors, strict=True))).values())

        assert torch.autograd.gradcheck(call, leaves)


def test_memory_is_poisoned_only_while_a_case_runs():
    with evaluation.uninitialised_memory_is_nan():
        assert torch.empty(64).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_missing_output_is_an_error():
    case = discover()["layer_norm"][0]
    lacking = Case(case.function, case.name, case.make_inputs, case.call, case.reference, case.gradients)
    reference = make_reference(lacking, torch.float32, "cpu", 0)
    reference.exact["grad_other"] = reference.exact["output"]
    with pytest.raises(RuntimeError, match="grad_other"):
        compare("layer_norm", lacking, torch.float32, "torch", reference)


@pytest.mark.parametrize(("bad_draws", "passes"), [(1, True), (evaluation.DRAWS, False)])
def test_one_draw_beyond_the_rule_is_judged_with_seven_more(bad_draws, passes):
    """Errors of up to three units in the last place, in the first draw or in every one."""
    case = discover()["layer_norm"][0]
    draws = []

    def call(inputs):
        draws.append(inputs)
        outputs = case.reference(inputs)
        if len(draws) > bad_draws:
            return outputs
        exact = case.reference(evaluation.to_float64(inputs))
        ulps = 3 * torch.finfo(torch.float32).eps * (2 * torch.rand(exact["output"].shape) - 1)
        return outputs | {"output": outputs["output"] + (exact["output"] * ulps).float()}

    unlucky = Case(case.function, case.name, case.make_inputs, call, case.reference, ())
    reference = make_reference(unlucky, torch.float32, "cpu", 0)
    row = next(
        row for row in compare("layer_norm", unlucky, torch.float32, "torch", reference) if row.quantity == "output"
    )
    assert len(draws) == evaluation.DRAWS and row.passed == passes
    assert row.kernel.norm > reference.torch_errors["output"].norm


def test_dtypes_are_read_by_either_name():
    assert evaluation.parse_dtype("bf16") is evaluation.parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(argparse.ArgumentTypeError, match="int8"):
        evaluation.parse_dtype("int8")
