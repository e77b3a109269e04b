"""The self-check finds, names and quarantines what is broken, and nothing else."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import bigkern
from bigkern import backend
from bigkern.tools import selfcheck
from bigkern.tools.evaluation import runnable
from tests.tools import planted

FP32 = (torch.float32,)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    selfcheck.add_arguments(parser)
    return parser.parse_args(argv)


def test_the_torch_backend_passes_every_case_in_every_dtype():
    report = selfcheck.selfcheck(["torch"], device="cpu")
    assert report.passed and not report.quarantined
    assert {check.dtype for check in report.checks} == {"fp32", "bf16", "fp16"}
    assert {check.outcome for check in report.checks} == {"pass"}


def test_a_right_backend_passes(plant, few_cases):
    plant(planted.right())
    report = selfcheck.selfcheck(["triton"], device="cpu", dtypes=FP32)
    assert report.passed and report.checks and not backend.quarantined()


@pytest.mark.parametrize(
    ("implementation", "complaint"),
    [
        (planted.wrong_forward, "output: error"),
        (planted.wrong_weight_gradient, "grad_weight: error"),
        (planted.unwritten, "output: error inf"),
        (planted.crashing, "RuntimeError: launch failed"),
    ],
)
def test_a_failing_backend_is_named_and_quarantined(plant, few_cases, implementation, complaint):
    plant(implementation())
    report = selfcheck.selfcheck(["triton", "torch"], device="cpu", dtypes=FP32)
    assert not report.passed
    assert {check.backend for check in report.failures} == {"triton"}
    assert complaint in report.failures[0].detail
    assert report.quarantined == [("triton", "layer_norm")]
    with (
        bigkern.use_backend("triton"),
        pytest.raises(bigkern.BackendError, match=r"quarantined: self-check failed"),
    ):
        bigkern.ops.rms_norm(torch.randn(2, 8), (8,))


def test_a_backend_that_serves_nothing_has_not_run(plant, few_cases):
    plant(planted.refusing())
    report = selfcheck.selfcheck(["triton"], device="cpu", dtypes=FP32, ops=["layer_norm"])
    assert "needs a newer GPU" in report.not_run["triton"]
    assert not backend.quarantined()


def test_exit_status_and_json(plant, few_cases, capsys, tmp_path):
    plant(planted.wrong_forward())
    path = tmp_path / "selfcheck.json"
    assert selfcheck.main(parse("--backend", "triton", "--device", "cpu", "--json", str(path))) == 1
    printed = capsys.readouterr().out
    assert "FAIL triton layer_norm" in printed and "Quarantined for this process: triton" in printed
    written = json.loads(path.read_text())
    assert written["passed"] is False and written["quarantined"] == [["triton", "layer_norm"]]

    assert selfcheck.main(parse("--backend", "torch", "--device", "cpu", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_backend_asked_for_by_name_has_to_run(plant, few_cases, capsys):
    plant(planted.refusing())
    assert selfcheck.main(parse("--backend", "triton", "--device", "cpu")) == 1
    assert "Not run: triton" in capsys.readouterr().out


def test_absent_backends_are_listed_with_their_reasons(few_cases, capsys):
    assert selfcheck.main(parse("--device", "cpu", "--op", "layer_norm")) == 0
    printed = capsys.readouterr().out
    running, not_run = runnable("cpu")
    assert running == ["torch"] and set(not_run) == {"cuda", "triton"}
    for name, reason in not_run.items():
        assert reason and f"Not run: {name}: {reason}" in printed


def test_the_emulated_kernels_pass(emulator):
    """Every case on the CUDA sources themselves: what `bigkern selfcheck` will do on a GPU."""
    report = selfcheck.selfcheck(["cuda"], device="cpu")
    assert report.passed and not report.not_run, (report.failures, report.not_run)
    refused = {check.case: check.detail for check in report.checks if check.outcome != "pass"}
    assert not refused
