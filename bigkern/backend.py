"""The three backends: what each can do on this machine, which one is chosen, and why another was not.

* ``cuda``: the compiled kernels (``bigkern/_C.abi3.so``), for CUDA tensors;
* ``triton``: the Triton kernels, for CUDA tensors;
* ``torch``: PyTorch's own operators, anywhere.

Unless one is asked for, an op takes the first backend, in this order, that has no objection to its arguments; tensors
that are not on a GPU go to ``torch``.  A backend that was asked for by name is never replaced by another: where it
cannot serve the arguments, :class:`BackendError` lists every backend's reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "torch")


class BackendError(RuntimeError):
    """No backend that may be used can serve the arguments; the message lists every backend's reason."""


class Availability(NamedTuple):
    """Whether a backend can run on this machine, and in words why or why not."""

    available: bool
    reason: str


# Plain module globals: torch.compile guards on them and recompiles when they change.  One choice for the whole process.
_requested: str | None = os.environ.get("BIGKERN_BACKEND") or None
_quarantined: dict[tuple[str, str], str] = {}
_warned: set[str] = set()
_explaining = False
_probes: dict[str, Callable[[], Availability]] = {
    "torch": lambda: Availability(True, "PyTorch's own operators, anywhere")
}


class use_backend:
    """Choose every op's backend: ``"cuda"``, ``"triton"``, ``"torch"``, or ``None`` for the automatic choice.

    As a plain call it holds until the next one; as a context manager it puts the former choice back at the end.  The
    choice belongs to the process, not to a thread.  It is made when an op's forward runs; its backward follows it.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str | None):
        global _requested
        if name is not None:
            _check_name(name, "use_backend")
        self._former = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info) -> None:
        global _requested
        _requested = self._former


def requested() -> str | None:
    """The backend that was asked for by :class:`use_backend` or ``BIGKERN_BACKEND``, or None for the automatic choice.

    Raises:
        ValueError: ``BIGKERN_BACKEND`` held an unknown name.
    """
    if _requested is not None:
        _check_name(_requested, "BIGKERN_BACKEND")
    return _requested


def backends() -> dict[str, Availability]:
    """Each backend's name with whether it can run here, and why or why not.  It may initialise CUDA."""
    return {name: _probes[name]() for name in NAMES}


def register_probe(name: str, probe: Callable[[], Availability]) -> None:
    """Say how :func:`backends` finds out about backend ``name``; ``probe`` runs when it is asked, not at import."""
    _probes[name] = probe


def uses_torch(tensor: torch.Tensor) -> bool:
    """Whether the choice is torch before any backend is asked: because it was named, or for want of a GPU tensor."""
    return _requested == "torch" or (_requested is None and not tensor.is_cuda)


def select(op: str, implementations: dict[str, ModuleType], *args) -> ModuleType:
    """The module among ``implementations`` (backend name to module) that shall serve ``op`` with ``args``.

    Each module's ``unsupported(*args)`` gives the reason why it cannot, or None.  ``args[0]`` is a tensor; its device
    decides what the automatic choice looks at.

    Raises:
        BackendError: the backend that was asked for cannot serve the arguments.
        ValueError: ``BIGKERN_BACKEND`` held an unknown name.
    """
    if _explaining:
        raise _explained(op, implementations, args)
    name = requested()
    if name is None and not args[0].is_cuda:
        return implementations["torch"]
    if name is not None:
        if _objection(name, op, implementations, args) is None:
            return implementations[name]
        reasons = {other: _objection(other, op, implementations, args) for other in NAMES}
        raise BackendError(_refusal(name, op, reasons))
    reasons = {}
    for name in NAMES:
        reason = _objection(name, op, implementations, args)
        if reason is None:
            if name == "torch":
                _warn_once(f"bigkern.{op} runs on the torch backend: {_list(reasons)}")
            return implementations[name]
        reasons[name] = reason
    raise BackendError(f"{op}: no backend can serve these arguments:\n{_lines(reasons)}")


def explain(call: Callable[[], object]) -> tuple[str | None, dict[str, str]]:
    """(name, reasons): what :func:`select` would take for the op that ``call`` calls, and why no better backend.

    The name is None, with the reasons, where :func:`select` would raise.  Nothing is warned of, and nothing runs but
    what an op gives to torch's operators without asking.
    """
    global _explaining
    _explaining = True
    try:
        call()
    except _Explained as explained:
        return explained.name, explained.reasons
    finally:
        _explaining = False
    return "torch", {}  # which the op took without asking


class _Explained(Exception):
    def __init__(self, name: str | None, reasons: dict[str, str]):
        self.name, self.reasons = name, reasons


def _explained(op: str, implementations: dict[str, ModuleType], args: tuple) -> _Explained:
    name = requested()
    if name is None and not args[0].is_cuda:
        return _Explained("torch", {})
    reasons = {}
    for candidate in NAMES if name is None else (name,):
        reason = _objection(candidate, op, implementations, args)
        if reason is None:
            return _Explained(candidate, reasons)
        reasons[candidate] = reason
    return _Explained(None, reasons)


def quarantine(name: str, op: str, reason: str) -> None:
    """Keep backend ``name`` from serving ``op`` for the rest of the process, as when its self-check failed."""
    _check_name(name, "quarantine")
    if name == "torch":
        raise ValueError("quarantine: the torch backend is the reference and the last resort; it cannot be quarantined")
    _quarantined[name, op] = reason


def quarantined() -> dict[tuple[str, str], str]:
    """What is quarantined: (backend, op) with the reason."""
    return dict(_quarantined)


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(NAMES)}")


def _objection(name: str, op: str, implementations: dict[str, ModuleType], args: tuple) -> str | None:
    if (name, op) in _quarantined:
        return f"quarantined: {_quarantined[name, op]}"
    if name not in implementations:
        return f"has no {op}"
    return implementations[name].unsupported(*args)


def _refusal(name: str, op: str, reasons: dict[str, str | None]) -> str:
    able = [other for other, reason in reasons.items() if reason is None]
    advice = "; ".join([f'use_backend("{other}")' for other in able] + ["use_backend(None) for the automatic choice"])
    return (
        f"{op}: the backend {name!r} was asked for and cannot serve these arguments:\n{_lines(reasons)}\n"
        f"What works: {advice}"
    )


def _list(reasons: dict[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _lines(reasons: dict[str, str | None]) -> str:
    return "\n".join(f"  {name}: {reason or 'could serve them'}" for name, reason in reasons.items())


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"{message}. This is said once.", stacklevel=4)


# Run while torch.compile traces, which cannot trace a warning.  torch.compiler.assume_constant_result would set this
# too, and import all of torch._dynamo for it.
_warn_once._dynamo_marked_constant = True
