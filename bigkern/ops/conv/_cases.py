"""Convolution's cases for ``bigkern selfcheck``, ``bigkern accuracy`` and the benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import conv1d, conv2d
from bigkern.ops._case import DTYPES, Case, Inputs, Outputs

_ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 are float32, where torch's default on CUDA is TF32: the errors of that hide any other."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def cases() -> list[Case]:
    """Every traversal of the kernels, each activation, pooling with and without overlap, both memory formats.

    Small enough that the emulated and interpreted kernels get through them in a minute.
    """
    return [
        make_case((2, 32, 9, 9), (64, 32, 3, 3), padding=1, channels_last=True),
        make_case((2, 32, 9, 9), (48, 32, 3, 3), padding=1),
        make_case((2, 64, 7, 7), (32, 64, 1, 1), channels_last=True, scale=1e3),
        make_case((2, 40, 8, 10), (24, 40, 3, 3), stride=2, padding=1, channels_last=True, scale=1e-3),
        make_case((1, 3, 20, 20), (16, 3, 7, 7), stride=2, padding=3, activation="relu", max_pool=(3, 2, 1)),
        make_case((2, 1, 12, 12), (32, 1, 3, 3), activation="relu", max_pool=2),
        make_case((2, 32, 9, 9), (32, 1, 3, 3), padding=1, groups=32, channels_last=True, activation="silu"),
        make_case((2, 32, 9, 9), (32, 8, 3, 3), padding=1, groups=4, activation="gelu"),
        make_case((2, 16, 11, 11), (16, 16, 3, 3), padding=2, dilation=2, activation="gelu_tanh", max_pool=2),
        make_case((2, 24, 50), (40, 24, 3), padding=1, activation="relu"),
        make_case((2, 32, 9, 9), (32, 32, 3, 3), padding=1, channels_last=True, activation="relu", residual=True),
    ]


def make_case(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    max_pool: Any = None,
    channels_last: bool = False,
    scale: float = 1.0,
    residual: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """A convolution of normal values of that scale, with the gradients of input, weight and bias, and of a residual of
    the input's shape where one is wanted."""
    rank = len(input_shape) - 2
    function = f"conv{rank}d"
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    traits = [f"{name} {value}" for name, value in geometry.items() if value != usual[name]]
    traits += [activation or "", f"max_pool {max_pool}" if max_pool else "", "channels_last" if channels_last else ""]
    traits += ["residual" if residual else ""]
    traits += [f"scale {scale:g}" if scale != 1 else ""]

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        inputs = {
            "input": (scale * normal(*input_shape)).to(dtype, memory_format=memory_format),
            "weight": (scale * normal(*weight_shape)).to(dtype, memory_format=memory_format),
            "bias": (scale * scale * normal(weight_shape[0])).to(dtype),
        }
        if residual:
            inputs["residual"] = (scale * scale * normal(*input_shape)).to(dtype, memory_format=memory_format)
        return inputs

    def call(inputs: Inputs) -> Outputs:
        convolve = conv1d if rank == 1 else conv2d
        with _full_float32():
            return {"output": convolve(**inputs, **geometry, activation=activation, max_pool=max_pool)}

    def reference(inputs: Inputs) -> Outputs:
        convolve, pool = (F.conv1d, F.max_pool1d) if rank == 1 else (F.conv2d, F.max_pool2d)
        with _full_float32():
            plain = {name: tensor for name, tensor in inputs.items() if name != "residual"}
            output = convolve(**plain, **geometry)
            output = _ACTIVATIONS[activation](output + inputs["residual"] if residual else output)
        if max_pool is not None:
            output = pool(output, *(max_pool if isinstance(max_pool, tuple) else (max_pool,)))
        return {"output": output}

    return Case(
        function=function,
        name=" ".join(
            [function, "x".join(map(str, input_shape)), "x".join(map(str, weight_shape)), *filter(None, traits)]
        ),
        make_inputs=make_inputs,
        call=call,
        reference=reference,
        gradients=("input", "weight", "bias", *(("residual",) if residual else ())),
        dtypes=dtypes,
    )
