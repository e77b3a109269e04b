"""docs/swap.md: its code runs, and its tables are what ``accelerate`` prints."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers", minversion="5.0")

from tests.acceleration import documents


def test_the_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", documents.PAGE.read_text(), flags=re.S)
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(documents.PAGE), "exec"), namespace)
    assert "bigkern.nn.LayerNorm" in capsys.readouterr().out


def test_the_tables_are_todays():
    text = documents.PAGE.read_text()
    assert sorted(re.findall(r"<!-- report: (.+?) -->", text)) == sorted(documents.MODELS)
    assert documents.rendered(text) == text, "python -m tests.acceleration.documents --write"
