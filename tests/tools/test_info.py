"""What `bigkern info` says must be so, and must never fail for want of a GPU, a toolkit or rich."""

from __future__ import annotations

import argparse
import json
import platform
import sys

import pytest
import torch

import bigkern
from bigkern.tools import info
from bigkern.tools.report import print_table


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    return parser.parse_args(argv)


def test_json_holds_versions_and_every_backend(capsys):
    assert info.main(parse("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["bigkern"] == bigkern.__version__
    assert set(found["backends"]) == {"cuda", "triton", "torch"}
    assert all(state["reason"] for state in found["backends"].values())
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_tables_name_every_backend_with_its_reason(capsys):
    assert info.main(parse()) == 0
    printed = capsys.readouterr().out
    for name in bigkern.backends():
        assert name in printed


def test_the_extension_is_described_from_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "_PACKAGE", tmp_path)
    assert info.collect()["extension"]["path"] is None
    (tmp_path / "_C.abi3.so").write_bytes(b"not an object")
    found = info.collect()["extension"]
    assert found["path"].endswith("_C.abi3.so") and not found["architectures"] and found["note"]

    listing = "ELF file    1: _C.1.sm_80.cubin\nELF file    2: _C.2.sm_90a.cubin\nPTX file    1: _C.1.sm_120.ptx\n"
    monkeypatch.setattr(info, "_toolkit_program", lambda name: name)
    monkeypatch.setattr(info, "_output", lambda *command: listing)
    assert info.collect()["extension"]["architectures"] == ["sm_120 (PTX)", "sm_80", "sm_90a"]


def test_nothing_fails_on_a_bare_machine(monkeypatch, capsys):
    monkeypatch.setattr(info, "_toolkit_program", lambda name: None)
    monkeypatch.setattr(info, "_distribution_version", lambda name: None)
    assert info.main(parse()) == 0
    assert "not found" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["rich", "rich.table"])
def test_tables_without_rich_hold_the_same_cells(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    print_table("Title", ("name", "us"), [("a", "1.5"), ("long name", "10")])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name        us",
        "---------  ---",
        "a          1.5",
        "long name   10",
    ]
