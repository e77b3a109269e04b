from __future__ import annotations

import pytest

from bigkern import backend
from tests.tools import planted


@pytest.fixture
def plant(monkeypatch):
    """``plant(implementation)`` stands it in for Triton's layer norm until the test ends; quarantines end with it."""
    monkeypatch.setattr(backend, "_quarantined", {})

    def put(implementation):
        monkeypatch.setitem(planted.layer_norm._IMPLEMENTATIONS, "triton", implementation)

    return put
