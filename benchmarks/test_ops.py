"""Each op, shape and candidate under pytest-benchmark; the GPU is synchronised inside the timed call."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.measure import gate, make_contestant, make_rotation, synchronize
from bigkern.tools.evaluation import device_name, make_reference


def test_speed(benchmark, device, problem, direction, candidate):
    function = candidate.prepare(problem.case)
    verdict = gate(candidate, function, problem, make_reference(problem.case, problem.dtype, device, seed=0))
    if verdict.status == "refused":
        pytest.skip(verdict.reason)
    assert verdict.status == "ok", verdict.reason

    contestant = make_contestant(candidate, function, problem, direction, make_rotation(problem, device, seed=0))
    turns = itertools.cycle(contestant.closures)

    def call():
        next(turns)()
        synchronize(device)

    benchmark.group = " ".join(problem.key(direction))
    with candidate.context():
        benchmark.pedantic(call, rounds=20, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        device=device_name(device),
        bytes=problem.bytes[direction],
        flops=problem.flops[direction],
        gb_s=problem.bytes[direction] / seconds / 1e9,
        tflop_s=problem.flops[direction] / seconds / 1e12,
        error_ratio=verdict.error_ratio,
    )
