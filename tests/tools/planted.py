"""Backends with a known behaviour, put in the place of Triton's, which CPU tensors reach by name."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

from bigkern.ops.layer_norm import _torch

layer_norm = importlib.import_module("bigkern.ops.layer_norm")


def right() -> SimpleNamespace:
    return SimpleNamespace(unsupported=lambda *args: None, forward=_torch.forward, backward=_torch.backward)


def wrong_forward() -> SimpleNamespace:
    """Two per cent off: several times what bf16 allows, so that no tolerance of any dtype hides it."""

    def forward(*args):
        output, *rest = _torch.forward(*args)
        return output * 1.02, *rest

    return SimpleNamespace(unsupported=lambda *args: None, forward=forward, backward=_torch.backward)


def wrong_weight_gradient() -> SimpleNamespace:
    """Right but for one gradient, which loses the first row's share of it."""

    def backward(grad_output, *rest):
        grads = list(_torch.backward(grad_output, *rest))
        without = grad_output.clone()
        without[0] = 0
        grads[2] = _torch.backward(without, *rest)[2]
        return tuple(grads)

    return SimpleNamespace(unsupported=lambda *args: None, forward=_torch.forward, backward=backward)


def unwritten() -> SimpleNamespace:
    """Leaves the last element of the output as the allocator gave it."""

    def forward(*args):
        output, *rest = _torch.forward(*args)
        result = output.new_empty(output.shape)
        result.view(-1)[:-1] = output.view(-1)[:-1]
        return result, *rest

    return SimpleNamespace(unsupported=lambda *args: None, forward=forward, backward=_torch.backward)


def crashing() -> SimpleNamespace:
    def forward(*args):
        raise RuntimeError("launch failed")

    return SimpleNamespace(unsupported=lambda *args: None, forward=forward, backward=forward)


def refusing() -> SimpleNamespace:
    return SimpleNamespace(unsupported=lambda *args: "needs a newer GPU", forward=None, backward=None)
