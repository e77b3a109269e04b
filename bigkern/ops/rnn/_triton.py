"""Recurrent layers in Triton: not written; the reason is what the backend answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bigkern.ops import _triton_support


def unsupported(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mode: str, projected: bool
) -> str | None:
    """Why these arguments cannot be served: always a reason."""
    reason = _triton_support.unsupported_tensors(input=input)
    return reason or "there is no Triton kernel of the recurrent layers"
