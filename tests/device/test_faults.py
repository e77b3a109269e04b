"""Kernels that break one rule of the asynchronous units or of clusters each: the emulator must catch every one.

It must do so under every schedule. What catches it is the emulator's own error, a wrong result, or, in the race build,
a report. The same kernels without the fault must run clean, so that no rule is stricter than the hardware's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import emulated
from tests.device import layouts
from tests.device.libraries import KernelError, emulated_kernels
from tests.device.test_conformance import from_bf16, take, to_bf16

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.emulated

SCHEDULES = [dict(order=order, async_mode="drawn", seed=1) for order in ("forward", "reverse")]
SCHEDULES += [dict(order=order, async_mode="drawn", seed=seed) for order in ("random", "priority") for seed in range(5)]

# The fault, and the message that must name it; None where the result is wrong instead.
FAULTS = {
    "load_no_wait": None,
    "load_no_empty_wait": None,
    "load_no_barrier_fence": "no fence_barrier_init",
    "load_not_initialised": "not initialised",
    "load_barrier_overwritten": "overwritten",
    "load_too_many_arrivals": "more arrivals",
    "load_too_many_bytes": "deadlock|expects 16 more bytes",
    "load_misaligned": "align",
    "store_no_wait": "may still read shared memory",
    "store_no_commit": "not committed",
    "store_source_reused": None,
    "product_no_fence": "without a wgmma_fence",
    "product_no_wait": "in flight",
    "product_wait_for_newer": None,
    "product_warp_missing": "different numbers of wgmma|differ between the warps",
    "product_descriptors_differ": "differ between the warps",
    "product_past_the_end": "past the end of shared memory",
    "registers_none_left": "set_max_registers_inc",
    "registers_raise_downwards": "from 168 to 40",
    "registers_warp_missing": "different numbers of setmaxnreg",
    "cluster_no_start": "may not have started",
    "cluster_no_read_barrier": None,
    "cluster_no_reuse_barrier": None,
    "cluster_no_exit_barrier": "leaves the cluster while block|has left the cluster",
    "cluster_exit_unwaited": "exits between cluster_arrive and cluster_wait",
    "cluster_arrives_twice": "has not waited since it last arrived",
    "cluster_block_missing": "the cluster's barrier|the cluster have exited|the cluster while|left the cluster",
    "cluster_wrong_block": "rank 2 in a cluster of 2",
    "cluster_deadlock": r"deadlock.*\n.*block \(0,0,0\).*cluster_wait.*\n.*block \(1,0,0\).*mbarrier_wait",
    "signal_no_wait": None,
    "signal_no_tail": "leaves the cluster while block|has left the cluster",
    "send_no_wait": None,
    "send_no_barrier_fence": "no fence_barrier_init",
    "send_too_many_bytes": "deadlock|expects 4 more bytes",
}
# Seen by the race checker only: the emulator's memory has no second proxy and no narrower scope, so the values come
# out right.
RACE_ONLY = {
    "store_no_proxy_fence": "proxy",
    "product_no_proxy_fence": "proxy",
    "signal_block_wait": "of block .* with nothing that orders them",
}
SOUND = ["load", "store", "product", "registers", "cluster", "signal", "send"]


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel is given and what it must write."""
    rng = np.random.default_rng(7)
    kernel = name.split("_")[0]
    if kernel == "load":
        data = rng.integers(0, 255, 4096, dtype=np.uint8)
        return data, data
    if kernel == "store":
        data = rng.integers(0, 255, 2048, dtype=np.uint8)
        return data, data
    if kernel in ("cluster", "signal", "send"):
        data = rng.integers(0, 1 << 30, (4 if kernel == "signal" else 2, 1 if kernel == "signal" else 2, 32), np.int32)
        if kernel == "send":
            return data[0], np.ascontiguousarray(data[0][::-1, ::-1])
        return data, np.ascontiguousarray(data[:, ::-1, ::-1])
    if kernel == "registers":
        return np.zeros(1, np.uint8), np.arange(384, dtype=np.int32)
    a, b = (to_bf16(rng.standard_normal((64, 64)).astype(np.float32)) for _ in range(2))
    given = np.concatenate([layouts.operand(matrix, "k", 128)[0] for matrix in (a, b)])
    products = [from_bf16(a[:, k : k + 16]) @ from_bf16(b[:, k : k + 16]).T for k in (0, 16)]
    return given, np.stack([take(product, layouts.wgmma_d(64)) for product in products])


def outcome(name: str, build: str, schedule: dict) -> str:
    """ "ok", "wrong result", or the error."""
    kernels = emulated_kernels("faults.cu", build)
    kernels.control.set_options(**schedule, compute_capability=90)
    given, expected = inputs(name)
    try:
        result = kernels.run(
            name, given, np.full(expected.nbytes, 0xFF, np.uint8).view(expected.dtype).reshape(expected.shape)
        )
    except KernelError as error:
        return str(error)
    exact = expected.dtype != np.float32
    good = np.array_equal(result, expected) if exact else np.allclose(result, expected, rtol=1e-5, atol=1e-4)
    return "ok" if good else "wrong result"


def name_of(schedule: dict) -> str:
    return f"{schedule['order']}-{schedule['seed']}"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("name", SOUND)
def test_right_kernels_run_clean(name, schedule):
    assert outcome(name, "plain", schedule) == "ok"


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(name):
    outcomes = {name_of(schedule): outcome(name, "plain", schedule) for schedule in SCHEDULES}
    if FAULTS[name] is None:
        # A missing wait shows when the copy or product comes late, which the fixed orders always try.
        assert "ok" not in (outcomes["forward-1"], outcomes["reverse-1"]), outcomes
        assert sum(result == "ok" for result in outcomes.values()) <= len(outcomes) // 2, outcomes
    else:
        assert all(re.search(FAULTS[name], result) for result in outcomes.values()), outcomes


def test_race_checker():
    """Proxy fences and every missing wait are reported whatever the schedule; nothing is reported without a fault."""
    command = [sys.executable, "-m", "tests.device.test_faults"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **emulated.environment("race")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for name, results in outcomes.items():
        if name in SOUND:
            assert set(results.values()) == {"ok"}, (name, results)
        else:
            assert "ok" not in results.values(), (name, results)
            if name in RACE_ONLY:
                assert all(re.search(RACE_ONLY[name], text) for text in results.values()), (name, results)


def main() -> None:
    """Every kernel under the race checker; a build of its own needs a process of its own."""
    names = [*SOUND, *FAULTS, *RACE_ONLY]
    schedules = [SCHEDULES[i] for i in (0, 1, 2, 3, 7, 8)]
    print(json.dumps({name: {name_of(s): outcome(name, "race", s) for s in schedules} for name in names}))


if __name__ == "__main__":
    main()
