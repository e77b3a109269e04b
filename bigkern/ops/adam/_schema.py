"""The raw ops of the optimizers: one launch each over a list of tensors, one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/adam.cpp, ``bigkern_triton`` by _triton.py.
``tensors``, ``chunk_ends``, ``grads`` and ``hyper`` are the tables that _plan.py lays out.  A step writes to the memory
that they point at, which no schema can say: the ops are for :mod:`bigkern.optim` and not for tracing.  ``scratch`` is
the memory in which the blocks of a launch meet; two launches at once must not share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

_LIST = "Tensor tensors, Tensor chunk_ends, Tensor grads"
_STEP = (
    f"({_LIST}, Tensor hyper, Tensor(a!) scratch, Tensor? grad_scale, Tensor? found_inf, Tensor? total_norm,"
    " float max_norm, bool zero_grads, Tensor? philox) -> ()"
)
_GRAD_NORM = f"({_LIST}, Tensor(a!) scratch, float norm_type, Tensor? grad_scale) -> Tensor"
_CLIP_GRADS = f"({_LIST}, Tensor(a!) scratch, float norm_type, float max_norm) -> Tensor"


def _step_fake(*args) -> None:
    return None


def _norm_fake(tensors: Tensor, *args) -> Tensor:
    return tensors.new_empty((), dtype=torch.float32)


for _namespace in NAMESPACES:
    for _name, _signature, _fake in (
        ("adam_step", _STEP, _step_fake),
        ("sgd_step", _STEP, _step_fake),
        ("grad_norm", _GRAD_NORM, _norm_fake),
        ("clip_grads", _CLIP_GRADS, _norm_fake),
    ):
        torch.library.define(f"{_namespace}::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
