"""The accuracy report: right figures, right ratios, nothing left out in silence."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from bigkern.tools import accuracy
from bigkern.tools.evaluation import Comparison, Errors
from tests.tools import planted


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    return parser.parse_args(argv)


def comparison(kernel: float, own: float) -> Comparison:
    pair = Errors(kernel, 2 * kernel), Errors(own, own)
    return Comparison("op", "f", "case", "output", torch.float32, "cuda", *pair, torch.float32, 100)


def test_ratio_and_verdict():
    assert comparison(3e-7, 1e-7).ratios == pytest.approx((3.0, 6.0))
    assert not comparison(3e-7, 1e-7).passed
    assert comparison(1e-7, 1e-7).passed
    assert comparison(0.0, 0.0).ratios == (1.0, 1.0)
    assert comparison(1e-9, 0.0).ratios == (math.inf, math.inf)


def test_medians_are_over_all_comparisons():
    rows = [comparison(ratio * 1e-7, 1e-7) for ratio in (0.5, 1.0, 4.0)]
    assert math.isclose(accuracy.medians(rows)["norm"], 1.0)
    assert math.isclose(accuracy.medians(rows)["max"], 2.0)


def test_every_output_and_gradient_is_compared():
    rows, refusals = accuracy.accuracy(["torch"], device="cpu", dtypes=[torch.bfloat16])
    assert not refusals and all(row.passed for row in rows)
    quantities = {(row.function, row.quantity) for row in rows}
    assert {("rms_norm", "output"), ("rms_norm", "grad_input"), ("rms_norm", "grad_weight")} <= quantities
    assert {("add_layer_norm", name) for name in ("output", "summed", "grad_residual", "grad_bias")} <= quantities
    # bf16 keeps 8 bits: an error far from 2^-9 would mean that something other than rounding was measured.
    plain = [row for row in rows if row.case == "layer_norm 33x64" and row.quantity == "output"]
    assert len(plain) == 1 and 2**-11 < plain[0].torch.norm < 2**-7


def test_report_and_exit_status(plant, few_cases, capsys, tmp_path):
    path = tmp_path / "accuracy.json"
    arguments = ["--device", "cpu", "--dtype", "fp32", "--json", str(path)]
    assert accuracy.main(parse("--backend", "torch", *arguments)) == 0
    assert "torch: median error" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["median_ratio"]["torch"]["norm"] > 0 and written["rows"]

    plant(planted.wrong_forward())
    assert accuracy.main(parse("--backend", "triton", *arguments)) == 1
    assert "FAIL" in capsys.readouterr().out


def test_what_a_backend_refuses_is_reported(plant, few_cases, capsys):
    plant(planted.refusing())
    assert accuracy.main(parse("--backend", "triton", "--device", "cpu", "--dtype", "fp32")) == 1
    assert "needs a newer GPU" in capsys.readouterr().out
