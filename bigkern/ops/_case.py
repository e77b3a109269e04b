"""What a tool must know about an op in order to run it.  Each op lists its cases in ``bigkern/ops/<op>/_cases.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Argument name -> tensor or plain value; output name -> tensor.
Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One way of calling a public function, as data.

    ``make_inputs(dtype, device, seed)`` draws the arguments; equal seeds give equal values.
    ``call(inputs)`` is the public function, on whichever backend is in use.
    ``reference(inputs)`` is the same mathematics in torch's own operators and in the dtype of its inputs: given the
    inputs in float64 it is the reference, given them as they are it is torch's own result in that dtype.
    ``gradients`` names the inputs to differentiate.
    """

    function: str
    name: str
    make_inputs: Callable[[torch.dtype, torch.device | str, int], Inputs]
    call: Callable[[Inputs], Outputs]
    reference: Callable[[Inputs], Outputs]
    gradients: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = DTYPES
