"""``pytest benchmarks``: the same problems as ``python -m benchmarks``, for those who keep pytest-benchmark's JSON."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.__main__ import ops
from benchmarks.measure import DIRECTIONS, Candidate, Problem, backend_candidate, eager_candidate
from bigkern.tools.evaluation import default_device, dtype_name, runnable


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(default_device())


def problems_on(device: str) -> list[Problem]:
    found = []
    for op in ops():
        module = importlib.import_module(f"benchmarks.{op}")
        dtypes = module.DTYPES[device] if device == "cuda" else (torch.float32,)
        found += module.problems(module.FUNCTIONS, list(module.SHAPES[device]), list(dtypes))
    return found


def candidates_on(device: str) -> list[Candidate]:
    names, _ = runnable(device)
    return [*(backend_candidate(name) for name in names), eager_candidate()]


def pytest_generate_tests(metafunc):
    if {"problem", "direction", "candidate"} <= set(metafunc.fixturenames):
        device = default_device()
        metafunc.parametrize("candidate", candidates_on(device), ids=lambda candidate: candidate.name.replace(" ", "-"))
        metafunc.parametrize("direction", DIRECTIONS)
        metafunc.parametrize(
            "problem",
            problems_on(device),
            ids=lambda problem: f"{problem.case.function}-{problem.shape}-{dtype_name(problem.dtype)}",
        )
