"""``python -m benchmarks``: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import __main__ as command
from benchmarks import measure, overhead
from benchmarks.measure import Candidate, Results
from tests.tools.planted import wrong_forward

QUICK = ["layer_norm", "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01", "--shape", "4x32"]


ENVIRONMENT = {"device": "CPU (a test's)", "torch": "2"}


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Ceilings that take no time to measure, and sources that nobody edits meanwhile."""
    ceilings = {"copy_gb_s": 10.0, "matmul_tflop_s": 1.0, "matmul_dtype": "fp32"}
    monkeypatch.setattr(command, "measure_ceilings", lambda *args: ceilings)
    monkeypatch.setattr(command, "environment", lambda device: ENVIRONMENT)


def run(folder, *more: str) -> int:
    return command.main([*QUICK, "--backends", "torch", "--peers", "torch", "--out", str(folder), *more])


def test_everything_is_written(tmp_path, capsys):
    assert run(tmp_path) == 0
    data = json.loads((tmp_path / "layer_norm.json").read_text())
    assert data["complete"] and data["schema"] == measure.SCHEMA
    assert data["environment"] == ENVIRONMENT
    keys = {(row["function"], row["direction"], row["candidate"]) for row in data["rows"]}
    assert len(keys) == len(data["rows"]) == 3 * 2 * 2
    assert all(row["status"] == "ok" for row in data["rows"])

    with (tmp_path / "layer_norm.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(data["rows"])
    assert float(table[0]["gb_s"]) == pytest.approx(data["rows"][0]["gb_s"])
    assert "| layer_norm | 4x32 | fp32 | forward | bigkern torch |" in (tmp_path / "layer_norm.md").read_text()
    for function in ("layer_norm", "rms_norm", "add_layer_norm"):
        picture = (tmp_path / f"layer_norm-{function}-fp32.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    printed = capsys.readouterr().out
    assert "the figures are a CPU's" in printed and "bigkern torch" in printed


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    measured = []
    genuine = command.measure_problem

    def counting(problem, directions, *rest):
        if len(measured) == 1:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append((problem.case.function, tuple(directions)))
        return genuine(problem, directions, *rest)

    monkeypatch.setattr(command, "measure_problem", counting)
    assert run(tmp_path) == 130
    saved = Results(tmp_path / "layer_norm.json", "layer_norm", ENVIRONMENT)
    assert {row.function for row in saved.rows} == {"layer_norm"} and not saved.data["complete"]

    assert run(tmp_path) == 0
    both = ("forward", "backward")
    assert measured == [("layer_norm", both), "interrupted", ("rms_norm", both), ("add_layer_norm", both)]
    assert run(tmp_path) == 0 and len(measured) == 4
    assert run(tmp_path, "--fresh", "--function", "rms_norm") == 0 and measured[-1] == ("rms_norm", both)


def test_a_spent_budget_says_so_and_can_be_continued(tmp_path, capsys):
    assert run(tmp_path, "--budget", "-1") == 3
    assert "3 of 3 problems were not started" in capsys.readouterr().out
    assert not json.loads((tmp_path / "layer_norm.json").read_text())["complete"]


def test_a_wrong_kernel_is_reported_and_not_timed(tmp_path, capsys, plant):
    plant(wrong_forward())
    arguments = [*QUICK, "--backends", "triton", "--peers", "torch", "--out", str(tmp_path), "--function", "layer_norm"]
    assert command.main(arguments) == 1
    assert "bigkern triton layer_norm 4x32 fp32: wrong: output" in capsys.readouterr().err
    rows = json.loads((tmp_path / "layer_norm.json").read_text())["rows"]
    assert {row["status"]: row["median_s"] for row in rows if row["candidate"] == "bigkern triton"} == {"wrong": None}


def test_a_peer_that_wins_is_shown_winning():
    from benchmarks.report import best_peer

    row = measure.Row("f", "1x1", "fp32", "forward", "bigkern cuda", True, "ok")
    row.speedup = {"torch": 2.0, "quack": 0.8, "bigkern triton": 0.5}
    assert best_peer(row) == "0.80x quack"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["layer_norm", "--shape", "4x"], "ROWSxCOLS"),
        (["layer_norm", "--shape", "0x4"], "ROWSxCOLS"),
        (["layer_norm", "--dtype", "int8"], "bf16, fp16 or fp32"),
        (["layer_norm", "--backends", "rocm"], "rocm"),
        (["layer_norm", "--no-such"], "--no-such"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and message in printed and printed.count("\n") == 1


def test_other_commands_are_dispatched(monkeypatch):
    seen = []
    monkeypatch.setattr(overhead, "main", lambda argv: seen.append(argv) or 0)
    assert command.main(["overhead", "--seconds", "1"]) == 0
    assert seen == [["--seconds", "1"]]
    assert {"adam", "conv", "layer_norm", "rnn", "attention"} <= set(command.ops())


def test_overhead_compares_both_modules(tmp_path):
    row = overhead.measure("LayerNorm", (4, 64), "forward+backward", measure.torch.device("cpu"), 0.02)
    assert row.tiny and row.ours_s > 0 and row.torch_s > 0
    assert row.difference_s == row.ours_s - row.torch_s
    assert row._replace(ours_s=5e-6, torch_s=1e-6).kept is False
    assert row._replace(ours_s=3e-6, torch_s=1e-6).kept is True
    assert row._replace(ours_s=1.06, torch_s=1.0, tiny=False).kept is False
    assert row._replace(ours_s=1.04, torch_s=1.0, tiny=False).kept is True


def test_candidates_of_every_kind_are_named():
    assert isinstance(measure.compile_candidate(), Candidate) and measure.compile_candidate().name == "torch.compile"
