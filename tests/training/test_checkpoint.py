from __future__ import annotations

import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from bigkern.training import checkpoint
from bigkern.training.errors import InputError

PARTS = {"model": {}, "data": {}, "options": {}, "trainer": {"weights": torch.arange(3.0)}}


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path / "a" / "run", PARTS)
    assert path == tmp_path / "a" / "run" / "checkpoint.pt"
    for run in (path, path.parent):
        loaded = checkpoint.load(run)
        assert torch.equal(loaded["trainer"]["weights"], torch.arange(3.0))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_killed_between_writing_and_renaming_keeps_the_old(tmp_path):
    checkpoint.save(tmp_path, PARTS)
    script = f"""
import os, pathlib, signal, torch
from bigkern.training import checkpoint
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
parts = {{"model": {{}}, "data": {{}}, "options": {{}}, "trainer": {{"weights": torch.zeros(3)}}}}
checkpoint.save(pathlib.Path({str(tmp_path)!r}), parts)
"""
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.tmp"]
    assert torch.equal(checkpoint.load(tmp_path)["trainer"]["weights"], torch.arange(3.0))
    # what the dead process left does not stand in the way of the next
    checkpoint.save(tmp_path, {**PARTS, "trainer": {"weights": torch.ones(3)}})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert torch.equal(checkpoint.load(tmp_path)["trainer"]["weights"], torch.ones(3))


def test_a_failed_write_keeps_the_old(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, PARTS)
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {**PARTS, "trainer": {}})
    assert "weights" in checkpoint.load(tmp_path)["trainer"]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint.os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    checkpoint.save(tmp_path, PARTS)
    assert calls == ["fsync", "replace", "fsync"]


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("damage", ["text", "csv", "empty", "cut", "zip", "harmful", "foreign", "newer"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, damage):
    path = checkpoint.save(tmp_path, PARTS)
    if damage == "text":
        path.write_text("hello")
    elif damage == "csv":
        path.write_text("text,label\ngood,a\n")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif damage == "harmful":
        torch.save({**PARTS, "format": 1, "trainer": Harmful()}, path)
    elif damage == "foreign":
        torch.save({"state": 1}, path)
    else:
        torch.save({**PARTS, "format": 99}, path)
    with pytest.raises(InputError, match=r"checkpoint\.pt: ") as refused:
        checkpoint.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no checkpoint there"):
        checkpoint.load(tmp_path)
