"""``pytest benchmarks``: the same problems as ``python -m benchmarks``, for those who keep pytest-benchmark's JSON."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from benchmarks.__main__ import ops
from benchmarks.measure import Candidate, Problem, backend_candidate
from bigkern.tools.evaluation import default_device, dtype_name, runnable


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(default_device())


def trials_on(device: str) -> list[tuple[Problem, str, Candidate]]:
    """Each problem in each direction, for the backends that run here and the op's first peer, which is torch's own."""
    running, _ = runnable(device)
    found = []
    for op in ops():
        module = importlib.import_module(f"benchmarks.{op}")
        dtypes = module.DTYPES[device] if device == "cuda" else (torch.float32,)
        candidates = [*map(backend_candidate, running), next(iter(module.peers().values()))()]
        for problem in module.problems(module.FUNCTIONS, list(module.SHAPES[device]), list(dtypes)):
            found += itertools.product([problem], problem.bytes, candidates)
    return found


def pytest_generate_tests(metafunc):
    if {"problem", "direction", "candidate"} <= set(metafunc.fixturenames):
        trials = trials_on(default_device())
        metafunc.parametrize("problem, direction, candidate", trials, ids=[name(*trial) for trial in trials])


def name(problem: Problem, direction: str, candidate: Candidate) -> str:
    what = f"{problem.case.function}-{problem.shape}-{dtype_name(problem.dtype)}"
    return f"{what}-{direction}-{candidate.name.replace(' ', '-')}"
