"""Where a model's layers come from: bigkern.nn, torch.nn, or both; and what a model is made of.

A model takes a namespace of layers and asks it by torch.nn's names: ``layers.Conv2d(1, 32, 3)``. ``BIGKERN`` gives
bigkern's layer where bigkern has one and torch.nn's otherwise; ``TORCH`` gives torch.nn's alone. Both have the same
parameters under the same names, so weights move between them with ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import bigkern.nn


class AddLayerNorm(nn.LayerNorm):
    """bigkern.nn.AddLayerNorm in torch's operators, for models built without bigkern.

    (input, residual), both (..., \\*normalized_shape) -> (norm(summed), summed), summed = residual + dropout(input).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p = dropout_p

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        summed = residual + functional.dropout(input, self.dropout_p, self.training)
        return super().forward(summed), summed


class ConvBlock2d(nn.Conv2d):
    """bigkern.nn.ConvBlock2d in torch's operators, for models built without bigkern.

    ``max_pool`` is None or the size and stride of the pooling; the activation is ReLU.
    """

    def __init__(self, *args: Any, max_pool: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_pool = max_pool

    def forward(self, input: Tensor) -> Tensor:
        output = functional.relu(super().forward(input))
        return output if self.max_pool is None else functional.max_pool2d(output, self.max_pool)


class Layers:
    """torch.nn's names; each comes from the first of ``sources`` that has it."""

    def __init__(self, name: str, *sources: Any) -> None:
        self._name = name
        self._sources = sources

    def __getattr__(self, layer: str) -> type[nn.Module]:
        for source in self._sources:
            if hasattr(source, layer):
                return getattr(source, layer)
        raise AttributeError(f"{self} has no layer {layer!r}")

    def __repr__(self) -> str:
        return f"layers {self._name!r}"


BIGKERN = Layers("bigkern", bigkern.nn, nn)
TORCH = Layers("torch", nn, SimpleNamespace(AddLayerNorm=AddLayerNorm, ConvBlock2d=ConvBlock2d))

# Modules that hold other modules, not layers, and a table to add: nobody writes a kernel for them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, bigkern.nn.PositionalEncoding)


def _origin(module: nn.Module) -> str | None:
    """'bigkern' or 'torch': the package whose layer this is; None for a model or a container."""
    if isinstance(module, _CONTAINERS):
        return None
    for base in type(module).__mro__:
        if base.__module__.startswith("bigkern.nn"):
            return "bigkern"
        if base.__module__.startswith("torch.nn.") and base is not nn.Module:
            return "torch"
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(kind, origin, module) of each layer; what a layer is made of inside is the layer's own affair."""
    origin = _origin(model)
    if origin is not None:
        yield type(model).__name__, origin, model
        return
    for child in model.children():
        yield from _layers(child)


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Each kind of layer in ``model``, in order of appearance, and the package it comes from.

    >>> layer_kinds(TransformerClassifier(vocabulary=100, classes=2))
    {'Embedding': 'torch', 'Dropout': 'torch', 'MultiheadAttention': 'bigkern', 'AddLayerNorm': 'bigkern', ...}
    """
    return {kind: origin for kind, origin, _ in _layers(model)}


class LayerRun(NamedTuple):
    """Who served one kind of layer: its package, and for bigkern's the backends seen running (for torch's, torch)."""

    package: str
    backends: tuple[str, ...]

    def __str__(self) -> str:
        return "torch.nn" if self.package == "torch" else f"bigkern ({' + '.join(self.backends)})"


class _KernelsSeen(TorchDispatchMode):
    """Notes which of bigkern's raw kernels (``bigkern_cuda::...``) torch's dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.backends: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace = func.namespace
        if self.inside and namespace.startswith("bigkern_"):
            self.backends.setdefault(self.inside[-1], set()).add(namespace.removeprefix("bigkern_"))
        return func(*args, **(kwargs or {}))


def layer_runs(model: nn.Module, *inputs: Tensor) -> dict[str, LayerRun]:
    """Runs ``model(*inputs)`` once, without gradients, and says who served each kind of layer in it.

    The backends are those whose kernels torch's dispatcher was seen running inside the layer's forward, so the answer
    is of this machine and these inputs. A bigkern layer that ran no kernel of its own ran on torch's operators.
    """
    seen = _KernelsSeen()
    kinds = layer_kinds(model)
    handles = []

    def leave(*_: Any) -> None:
        seen.inside.pop()

    for kind, _, module in _layers(model):
        handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: seen.inside.append(kind)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad(), seen:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: LayerRun(origin, tuple(sorted(seen.backends.get(kind, {"torch"})))) for kind, origin in kinds.items()}
