"""Triton has two worlds, chosen when it is first imported: interpreted (TRITON_INTERPRET=1) and compiled.

Each file here belongs to one of them by its marker, and pytest reports its tests as deselected in the other.
"""

from __future__ import annotations

from bigkern.ops import _triton_support


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: runs Triton kernels in the interpreter (TRITON_INTERPRET=1)")


def pytest_collection_modifyitems(config, items):
    wrong = "compiled" if _triton_support.INTERPRETED else "interpreted"
    left_out = [item for item in items if "triton" in item.path.parts and item.get_closest_marker(wrong)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
