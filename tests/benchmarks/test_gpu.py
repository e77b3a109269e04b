"""make gpu's bookkeeping: results, time limits, and steps that are not repeated."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import gpu


def step(name: str, code: str, seconds: int = 60) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], seconds)


@pytest.mark.parametrize(("code", "expected"), [("", "passed"), ("exit(1)", "failed"), ("exit(3)", "out of time")])
def test_result_is_the_exit_status(code, expected, tmp_path):
    log = tmp_path / "log"
    assert gpu.run(step("s", f"print('said'); {code}"), log, 60)[0] == expected
    assert log.read_text() == "said\n"


def test_a_step_that_ignores_its_limit_is_stopped(tmp_path):
    start = time.monotonic()
    hanging = step("s", "import time\nprint('begun', flush=True)\nwhile True: time.sleep(1)")
    assert gpu.run(hanging, tmp_path / "log", 3) == ("out of time", None)
    assert time.monotonic() - start < 30
    assert (tmp_path / "log").read_text() == "begun\n"


def test_passed_steps_are_not_repeated_and_failed_ones_are(tmp_path, monkeypatch, capsys):
    marks = tmp_path / "marks"
    count = f"open({str(marks)!r}, 'a').write('x')"
    chosen = [step("good", count), step("bad", f"{count}; exit(1)")]
    monkeypatch.setattr(gpu, "steps", lambda results, rehearse: chosen)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--rehearse"]) == 1
    assert gpu.main(["--rehearse"]) == 1
    assert marks.read_text() == "xxx"
    record = json.loads((tmp_path / "build/rehearsal/gpu.json").read_text())
    assert {name: entry["result"] for name, entry in record["steps"].items()} == {"good": "passed", "bad": "failed"}
    assert gpu.main(["--rehearse", "--restart", "--budget", "0"]) == 1
    assert marks.read_text() == "xxx"
    assert "2 not started" in capsys.readouterr().out


def test_steps_begin_with_the_instructions(tmp_path):
    names = [s.name for s in gpu.steps(tmp_path, rehearse=False)]
    assert names[:3] == ["build", "conformance", "tune"]
    assert {"tests", *(f"sanitizer-{tool}" for tool in gpu.SANITIZERS), "accuracy", "bench-layer_norm"} <= set(names)
