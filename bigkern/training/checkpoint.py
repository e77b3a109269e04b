"""Checkpoints: written whole or not at all, and read without running any code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bigkern.training.errors import InputError

FORMAT = 1
FILE = "checkpoint.pt"
_PARTS = {"format", "model", "data", "options", "trainer"}


def save(folder: Path, parts: dict[str, Any]) -> Path:
    """Writes ``folder``/checkpoint.pt. Death at any moment leaves the old file or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    temporary = path.with_suffix(".pt.tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **parts}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The new name is durable only once the folder that holds it is.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


def find(run: Path) -> Path:
    """The checkpoint file of a run: its folder, or the file itself."""
    path = run / FILE if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{run}: no checkpoint there (expected a folder with {FILE}, as bigkern train --out makes)")
    return path


def load(run: Path) -> dict[str, Any]:
    """The parts that ``save`` got. Tensors come to the CPU."""
    path = find(run)
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        # Foreign bytes make torch's reader fail in more ways than it documents (IndexError is one).
        raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(parts, dict) or not parts.keys() >= _PARTS:
        raise InputError(f"{path}: not a checkpoint of bigkern train")
    if parts["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {parts['format']}, this bigkern reads format {FORMAT}")
    return parts
