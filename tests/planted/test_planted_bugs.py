"""Every planted bug is caught, and the kernels without one are not: proof that the harness can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulated
from tests.planted.bugs import BUGS, SCHEDULES, Bug

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.emulated

# Kernels that are another's source, compiled with these flags.
VARIANTS = {"attention_hopper_backward_wide": ("attention_hopper_backward", ["-DBK_TILE_COLS=192"])}


def show(index: int, row: str) -> None:
    """tests/run.py prints the table from these files, whichever process a test ran in."""
    print(row)
    if folder := os.environ.get("BIGKERN_TEST_REPORT"):
        (Path(folder) / f"planted-{index:03d}.txt").write_text(row + "\n")


def trial(kernel: str, build: str, name: str, replace: dict[str, tuple[str, str]] | None = None) -> tuple[str, str]:
    """Builds the harness with the replacement, runs it: the schedule that caught something, and what; or ("", "")."""
    source, flags = VARIANTS.get(kernel, (kernel, ()))
    library = emulated.build_library([f"tests/planted/{source}.cu"], build, name, flags, replace)
    command = [sys.executable, "-m", "tests.planted.trial", str(library), build, kernel, *SCHEDULES]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | emulated.environment(build), capture_output=True, text=True, timeout=600
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if results and results[-1]["caught"]:
        return results[-1]["schedule"], results[-1]["caught"]
    if done.returncode < 0:  # no message comes from a process that reads outside its address space
        return SCHEDULES[len(results)], f"killed by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        report = next((line for line in done.stderr.splitlines() if "ERROR: AddressSanitizer" in line), None)
        assert report, f"the trial itself failed:\n{done.stderr[-2000:]}"
        return SCHEDULES[len(results)], report.split("ERROR: ")[1]
    assert len(results) == len(SCHEDULES)
    return "", ""


@pytest.mark.parametrize("build", ["plain", "asan", "race"])
@pytest.mark.parametrize(
    "kernel",
    [
        "tile_gemm",
        "layer_norm",
        "layer_norm_cluster",
        "adam",
        "conv",
        "conv_hopper",
        "conv_hopper_weight",
        "conv_stem",
        "rnn",
        "attention",
        "attention_hopper",
        "attention_hopper_backward",
        "attention_hopper_backward_wide",
        "attention_decode",
    ],
)
def test_sound_kernels_pass(kernel, build):
    assert trial(kernel, build, f"sound_{kernel}") == ("", "")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_planted_bug_is_caught(bug: Bug):
    index = BUGS.index(bug)
    schedule, caught = trial(bug.kernel, bug.build, f"planted_{index}", {bug.file: (bug.old, bug.new)})
    seen = caught.splitlines()[0][:90] if caught else "MISSED"
    show(index, f"{bug.kernel:10s}  {bug.name:52s}  {bug.build:5s}  {schedule:10s}  {seen}")
    assert caught


def test_list_is_long_enough_and_each_replacement_is_unique():
    assert len(BUGS) >= 12
    for bug in BUGS:
        assert (ROOT / bug.file).read_text().count(bug.old) == 1, bug.name
