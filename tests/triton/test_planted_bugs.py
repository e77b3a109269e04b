"""Every planted bug in the Triton kernels is caught: proof that their tests can fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bigkern
from bigkern.ops.attention import _triton
from tests import numerics
from tests.ops.attention_cases import Case
from tests.planted.bugs import TRITON_BUGS
from tests.triton.test_attention import small_tiles

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("interpreter")]

# Two tiles of keys, the last one ragged, two of queries; a window that ends in both, a group of heads, dropout, lse.
CASE = Case(
    dtype=torch.bfloat16, lengths=(18, 20), heads=(2, 1), head_dim=8, window=(20, 5), dropout_p=0.3, lse=True
)  # fmt: skip


def check():
    with bigkern.use_backend("triton"):
        numerics.check(CASE.kernel, CASE.reference, CASE.inputs("cpu"))


def test_sound_kernels_pass(monkeypatch):
    small_tiles(monkeypatch)
    check()


@pytest.mark.parametrize("bug", TRITON_BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    small_tiles(monkeypatch)
    source = (ROOT / bug.file).read_text()
    assert source.count(bug.old) == 1
    file = tmp_path / "planted.py"
    file.write_text(source.replace(bug.old, bug.new))
    spec = importlib.util.spec_from_file_location(f"planted_{TRITON_BUGS.index(bug)}", file)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(_triton, "_loaded_kernels", kernels)
    with pytest.raises(AssertionError, match="error"):
        check()
