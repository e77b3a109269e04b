from __future__ import annotations

import pytest
import torch

from bigkern import backend
from bigkern.tools import accuracy, evaluation, selfcheck
from tests.tools import planted


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: a second thread's waking takes longer than the work, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_cases(monkeypatch):
    """Leaves the tools one case a function: what is tested is what they make of a result, not every kernel path."""
    found = {
        op: list({case.function: case for case in reversed(cases)}.values())
        for op, cases in evaluation.discover().items()
    }
    for tool in (accuracy, selfcheck):
        monkeypatch.setattr(tool, "discover", lambda: found)


@pytest.fixture
def plant(monkeypatch):
    """``plant(implementation)`` stands it in for Triton's layer norm until the test ends; quarantines end with it."""
    monkeypatch.setattr(backend, "_quarantined", {})

    def put(implementation):
        monkeypatch.setitem(planted.layer_norm._IMPLEMENTATIONS, "triton", implementation)

    return put
