from __future__ import annotations

from tests.tools.conftest import one_thread, plant

__all__ = ["one_thread", "plant"]
