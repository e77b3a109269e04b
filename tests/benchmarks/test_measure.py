"""Measuring itself: the gate before any timing, percentiles, interleaving, and a results file that survives."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter

import pytest
import torch

import bigkern
from benchmarks import measure
from benchmarks.layer_norm import problems
from benchmarks.measure import (
    Candidate,
    Contestant,
    Refused,
    Results,
    Row,
    Sample,
    Stopwatch,
    eager_candidate,
    gate,
    interleave,
    measure_problem,
    percentile,
    speedup,
    write_atomically,
)
from bigkern.tools.evaluation import make_reference

CPU = torch.device("cpu")
CEILINGS = {"copy_gb_s": 10.0, "matmul_tflop_s": 1.0, "matmul_dtype": "fp32"}


def problem(function: str = "layer_norm", dtype: torch.dtype = torch.float32):
    return problems((function,), [(6, 40)], [dtype])[0]


def spoiled(name: str, factor: float, calls: Counter | None = None, ours: bool = False) -> Candidate:
    """torch's own result times ``factor``, counting its calls."""

    def prepare(case):
        def call(inputs):
            if calls is not None:
                calls[name] += 1
            return {output: value * factor for output, value in case.reference(inputs).items()}

        return call

    return Candidate(name, prepare, ours=ours)


def judged(candidate: Candidate, dtype: torch.dtype = torch.float32):
    p = problem(dtype=dtype)
    return gate(candidate, candidate.prepare(p.case), p, make_reference(p.case, dtype, CPU, seed=0))


def test_the_gate_passes_what_is_right_with_its_error_ratio():
    verdict = judged(eager_candidate())
    assert verdict.status == "ok" and verdict.error_ratio <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_stops_a_wrong_result(dtype):
    verdict = judged(spoiled("wrong", 1.1), dtype)
    assert verdict.status == "wrong" and verdict.reason.startswith("output: error")


def test_the_gate_stops_a_wrong_gradient():
    def prepare(case):
        def call(inputs):
            # The value is torch's; a tenth of the gradient is cut off.
            return {name: 0.9 * y + 0.1 * y.detach() for name, y in case.reference(inputs).items()}

        return call

    assert judged(Candidate("half a gradient", prepare)).reason.startswith("grad_")


def test_ours_are_judged_more_strictly_than_peers():
    slightly = 1 + 4e-7
    assert judged(spoiled("peer", slightly)).status == "ok"
    assert judged(spoiled("kernel", slightly, ours=True)).status == "wrong"


def test_what_a_candidate_raises_is_its_own_row():
    def failing(case):
        return lambda inputs: {}["output"]

    def refusing(case):
        raise Refused("not this shape")

    candidates = [Candidate("failing", failing), Candidate("refusing", refusing), eager_candidate()]
    rows = next(measure_problem(problem(), ["forward"], candidates, CPU, CEILINGS, 0.0))
    assert [row.status for row in rows] == ["failed", "refused", "ok"]
    assert "KeyError" in rows[0].reason and rows[1].reason == "not this shape"
    assert rows[2].median_s > 0 and rows[0].median_s is None


def test_a_wrong_candidate_is_never_timed():
    calls = Counter()
    candidates = [spoiled("wrong", 1.5, calls), spoiled("right", 1.0, calls)]
    groups = list(measure_problem(problem(), ("forward", "backward"), candidates, CPU, CEILINGS, 0.0))
    assert calls["wrong"] == 1 and calls["right"] > 10
    for wrong, right in groups:
        assert (wrong.status, wrong.median_s, wrong.speedup) == ("wrong", None, {})
        assert right.status == "ok" and right.speedup == {}


def test_rows_follow_from_the_counted_work():
    candidates = [eager_candidate(), Candidate("again", lambda case: case.reference)]
    for direction, rows in zip(
        ("forward", "backward"),
        measure_problem(problem(), ("forward", "backward"), candidates, CPU, CEILINGS, 0.0),
        strict=True,
    ):
        for row in rows:
            assert row.bytes == problem().bytes[direction]
            assert row.gb_s == pytest.approx(row.bytes / row.median_s / 1e9)
            assert row.ceiling_fraction == pytest.approx(row.bytes / 10e9 / row.median_s)
            assert row.p20_s <= row.median_s <= row.p80_s
            assert not row.cold  # 6 x 40 floats stay in any cache, and the row says so
        assert set(rows[0].speedup) == {"again"}


def test_backends_are_candidates_of_their_own():
    candidate = measure.backend_candidate("torch")
    with candidate.context():
        assert bigkern.backend.requested() == "torch"
    assert judged(candidate).status == "ok" and candidate.ours


def test_percentiles_of_known_data():
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert percentile(values, 0.5) == statistics.median(values) == 3.0
    assert percentile(values, 0.0) == 1.0 and percentile(values, 1.0) == 5.0
    assert percentile(values, 0.2) == pytest.approx(1.8)
    assert percentile(values, 0.8) == pytest.approx(4.2)
    assert percentile([7.0], 0.2) == 7.0


def test_speedup_is_paired_so_that_drift_cancels():
    """The machine slows down threefold half-way: unpaired medians of this would say anything."""
    drift = [1.0] * 5 + [3.0] * 6
    mine = [Sample(t, None) for t in drift]
    other = [Sample(2 * t, None) for t in drift]
    assert speedup(mine, other) == 2.0


def test_rounds_interleave_and_turn():
    order = []
    fake = Stopwatch(CPU, itertools.count().__next__)
    contestants = [
        Contestant(name, measure.contextlib.nullcontext, [lambda name=name: order.append(name)]) for name in "abc"
    ]
    interleave(contestants, fake, seconds=0.0)
    assert [len(contestant.samples) for contestant in contestants] == [5, 5, 5]
    assert "".join(order[-15:]) == "abcbcacababcbca"


def test_inputs_rotate():
    seen = []
    closures = [lambda i=i: seen.append(i) for i in range(3)]
    contestant = Contestant("x", measure.contextlib.nullcontext, closures, calls=2)
    for _ in range(3):
        contestant.take(Stopwatch(CPU))
    assert seen == [0, 1, 2, 0, 1, 2]


def row(candidate: str, shape: str = "6x40", **changes) -> Row:
    return Row("layer_norm", shape, "fp32", "forward", candidate, False, "ok", **changes)


def test_the_environment_names_the_machine_and_the_sources():
    found = measure.environment(CPU)
    assert found["device"].startswith("CPU") and found["type"] == "cpu" and found["torch"] == torch.__version__
    assert found["cache_bytes"] > 0 and len(found["source"]) == 12


def test_ceilings_are_what_a_copy_and_a_product_reach():
    found = measure.measure_ceilings(CPU, seconds=0.0)
    # Of any machine since 1995, and of none so far.
    assert 0.05 < found["copy_gb_s"] < 10_000 and 1e-5 < found["matmul_tflop_s"] < 1000


def test_results_continue_where_they_were_left(tmp_path):
    path, environment = tmp_path / "deep" / "op.json", {"device": "x"}
    first = Results(path, "op", environment)
    first.replace_rows([row("a"), row("b")])
    again = Results(path, "op", environment)
    key = ("layer_norm", "6x40", "fp32", "forward")
    assert again.has(key, [Candidate("a", None), Candidate("b", None)])
    assert not again.has(key, [Candidate("a", None), Candidate("c", None)])
    assert not again.has(("layer_norm", "7x40", "fp32", "forward"), [Candidate("a", None)])
    again.replace_rows([row("a", median_s=1.0), row("c")])
    assert [r.candidate for r in again.rows] == ["a", "c"]
    assert json.loads(path.read_text())["schema"] == measure.SCHEMA


def test_rows_of_other_sources_are_set_aside_not_mixed(tmp_path):
    path = tmp_path / "op.json"
    Results(path, "op", {"source": "old"}).replace_rows([row("a")])
    changed = Results(path, "op", {"source": "new"})
    assert changed.rows == [] and changed.set_aside.exists() and not path.exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "op.json"
    write_atomically(path, "old")
    monkeypatch.setattr(measure.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.cuda
def test_device_time_holds_no_host_time():
    """A call that the host takes 1 ms to enqueue and the device microseconds to run."""
    device = torch.device("cuda")
    x = torch.ones(1024, device=device)

    def slow_host():
        measure.time.sleep(1e-3)
        x.add_(1)

    contestant = Contestant("slow host", measure.contextlib.nullcontext, [slow_host])
    interleave([contestant], Stopwatch(device), seconds=0.1)
    assert statistics.median(sample.seconds for sample in contestant.samples) < 1e-4
    assert statistics.median(sample.host_seconds for sample in contestant.samples) > 9e-4


def test_peak_memory_is_what_one_call_adds(monkeypatch):
    allocated = {"now": 100, "most": 900}
    cuda = {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: allocated.update(most=allocated["now"]),
        "memory_allocated": lambda device: allocated["now"],
        "max_memory_allocated": lambda device: allocated["most"],
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    contestant = Contestant("c", measure.contextlib.nullcontext, [lambda: allocated.update(most=164)])
    assert measure.peak_bytes(contestant, torch.device("cuda")) == 64
    assert measure.peak_bytes(contestant, torch.device("cpu")) is None


@pytest.mark.cuda
def test_peak_memory_of_a_real_call():
    device = torch.device("cuda")
    contestant = Contestant("c", measure.contextlib.nullcontext, [lambda: torch.empty(1 << 22, device=device)])
    assert measure.peak_bytes(contestant, device) == 1 << 24
