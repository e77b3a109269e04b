"""Adam, SGD and the norm of gradients, each over a list of tensors in one launch: what :mod:`bigkern.optim` calls.

Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015 (arXiv:1412.6980); Reddi, Kale, Kumar, "On the
Convergence of Adam and Beyond", 2018 (AMSGrad, arXiv:1904.09237); Loshchilov, Hutter, "Decoupled Weight Decay
Regularization", 2019 (AdamW, arXiv:1711.05101).

The kernels read addresses from tables (_plan.py).  So these functions are the inside of the optimizers, where the
tensors have been looked at; :class:`bigkern.optim.Adam` is the public face.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bigkern import backend
from bigkern.ops.adam import _cuda, _torch, _triton

__all__ = ["TORCH", "implementation"]

TORCH = _torch


class _Kernels:
    """A kernel backend with the objections that all kernels share before its own."""

    def __init__(self, module: ModuleType):
        self.module = module

    def unsupported(
        self, tensor: Tensor, moment_dtype: torch.dtype | None, request: str, objection: str | None
    ) -> str | None:
        return objection or self.module.unsupported(tensor, moment_dtype, request)


class _Torch:
    module = _torch

    @staticmethod
    def unsupported(tensor: Tensor, moment_dtype: torch.dtype | None, request: str, objection: str | None) -> None:
        return None


_IMPLEMENTATIONS = {"cuda": _Kernels(_cuda), "triton": _Kernels(_triton), "torch": _Torch}


def implementation(
    request: str, tensor: Tensor, moment_dtype: torch.dtype | None, objection: str | None = None
) -> ModuleType:
    """The backend's module that shall serve a tensor.

    Args:
        request: ``adam_step``, ``sgd_step``, ``grad_norm`` or ``clip_grads``.
        tensor: a parameter, or a gradient where there are only gradients; not a DTensor but what it holds here.
        moment_dtype: of the optimizer's states; None for an op without.
        objection: why no kernel could serve it, whichever the backend; None if one may.

    Raises:
        bigkern.BackendError: the backend that was asked for cannot serve the tensor.
    """
    return backend.select("adam", _IMPLEMENTATIONS, tensor, moment_dtype, request, objection).module
