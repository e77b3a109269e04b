"""Decoding on Triton: not written yet, and it says so."""

from __future__ import annotations


def unsupported(*args) -> str | None:
    """The reason, whatever the arguments."""
    return "bigkern has no Triton kernel for decoding with a cache"
