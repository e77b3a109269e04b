"""The error for what a user gave and cannot be used."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """A file, an option or a data set cannot be used. The message is one line that says which, why and what to do."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs {error.name.partition('.')[0]}: pip install {extra}") from error
