"""The three public functions of layer norm as data, so that each test visits them all on any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import add_layer_norm, layer_norm, rms_norm

EPS = 1e-5


@dataclass(frozen=True)
class Form:
    """``kernel`` and ``reference`` (in torch's operators, any dtype) take tensors in the order of ``names``."""

    name: str
    names: tuple[str, ...]
    kernel: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]

    def inputs(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        parameter_dtype: torch.dtype | None = None,
        mean: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
        grad: bool = True,
    ) -> list[Tensor]:
        """Normal values of that mean and scale, normalised over the last dimension; all require gradients, or none."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for name in self.names:
            is_data = name in ("input", "residual")
            values = torch.randn(shape if is_data else shape[-1:], generator=generator)
            values = mean + scale * values if is_data else values
            dtype_here = dtype if is_data else parameter_dtype or dtype
            found.append(values.to(device, dtype_here).requires_grad_(grad))
        return found


def _layer_norm(x, w=None, b=None):
    return layer_norm(x, x.shape[-1:], w, b, EPS)


def _layer_norm_reference(x, w=None, b=None):
    if w is not None and w.dtype != x.dtype and not x.is_cpu:
        return F.layer_norm(x.to(w.dtype), x.shape[-1:], w, b, EPS).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def _rms_norm(x, w):
    return rms_norm(x, x.shape[-1:], w, EPS)


def _rms_norm_reference(x, w):
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def _add_layer_norm(x, residual, w, b):
    return add_layer_norm(x, residual, x.shape[-1:], w, b, EPS)


def _add_layer_norm_reference(x, residual, w, b):
    summed = residual + x
    return _layer_norm_reference(summed, w, b), summed


LAYER_NORM = Form("layer_norm", ("input", "weight", "bias"), _layer_norm, _layer_norm_reference)
PLAIN = Form("layer_norm without parameters", ("input",), _layer_norm, _layer_norm_reference)
RMS_NORM = Form("rms_norm", ("input", "weight"), _rms_norm, _rms_norm_reference)
ADD_LAYER_NORM = Form(
    "add_layer_norm", ("input", "residual", "weight", "bias"), _add_layer_norm, _add_layer_norm_reference
)
FORMS = (LAYER_NORM, PLAIN, RMS_NORM, ADD_LAYER_NORM)
