"""Convolutions as data, so that tests visit many of them on any backend: named ones, and generated ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import conv1d, conv2d

NAMES = ("input", "weight", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

# Of windows of one pixel: torch's own operator (2.13, CPU) crashes on some that are padded, in channels_last.
NO_PADDING = {1: (0,), 2: (0, 0)}

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "odd offset", "expanded")


@dataclass(frozen=True)
class Convolution:
    """One call; channels and filters are those of a group, and the window is the weight's."""

    name: str
    images: int
    channels: int
    filters: int
    size: tuple[int, ...]
    window: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    activation: str | None = None
    max_pool: Any = None

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        filters = self.filters * self.groups
        return (
            (self.images, self.channels * self.groups, *self.size),
            (filters, self.channels, *self.window),
            (filters,),
        )

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        layout: str = "contiguous",
        weight_layout: str = "contiguous",
        scale: float = 1.0,
        mean: float = 0.0,
        seed: int = 0,
        grad: bool = True,
    ) -> list[Tensor]:
        """Normal values; the weight so small that the output is about as large as the input.  All or none require
        gradients."""
        generator = torch.Generator().manual_seed(seed)
        data, weight, bias = (torch.randn(shape, generator=generator) for shape in self.shapes)
        data, weight = scale * (mean + data), weight / weight[0].numel() ** 0.5
        found = [
            laid_out(data.to(device, dtype), layout),
            laid_out(weight.to(device, dtype), weight_layout),
            (scale * bias).to(device, dtype),
        ]
        return [tensor.requires_grad_(grad) for tensor in found]

    def kernel(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        convolve = conv1d if self.rank == 1 else conv2d
        return convolve(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups,
            activation=self.activation, max_pool=self.max_pool, residual=residual,
        )  # fmt: skip

    def reference(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        convolve, pool = (F.conv1d, F.max_pool1d) if self.rank == 1 else (F.conv2d, F.max_pool2d)
        output = convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        output = ACTIVATIONS[self.activation](output)
        if self.max_pool is None:
            return output
        return pool(output, *((self.max_pool,) if isinstance(self.max_pool, int) else self.max_pool))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded") in another layout of memory."""
    last = values.dim() - 1
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.movedim(1, last).contiguous().movedim(last, 1)
    if layout == "sliced":
        return torch.cat([values, values], last)[..., : values.shape[last]]
    if layout == "permuted":
        return values.transpose(0, last).contiguous().transpose(0, last)
    if layout == "odd offset":
        storage = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return storage[1:].view(values.shape).copy_(values)
    assert layout == "expanded"
    return values[:1].expand(values.shape)


# Every way through the kernels once: few and many channels, taps in both directions, strides and dilations with and
# without common factors, groups of each size, the two ways to pool, one dimension.
NAMED = [
    Convolution("3x3", 2, 32, 16, (6, 7), (3, 3), padding=1),
    Convolution("1x1", 1, 40, 24, (5, 4), (1, 1), activation="relu"),
    Convolution("stem", 1, 3, 16, (15, 14), (7, 7), stride=2, padding=3, activation="relu", max_pool=(3, 2, 1)),
    Convolution("grey", 2, 1, 8, (8, 8), (3, 3), activation="relu", max_pool=2),
    Convolution("stride 2", 2, 8, 16, (7, 8), (3, 3), stride=2, padding=1),
    Convolution("stride beyond the window", 1, 4, 8, (9, 11), (2, 1), stride=(3, 4), activation="gelu"),
    Convolution("dilated", 1, 16, 8, (9, 8), (3, 2), padding=(2, 1), dilation=(2, 3)),
    Convolution("stride and dilation", 1, 8, 8, (9, 10), (3, 3), stride=(2, 4), padding=2, dilation=(2, 2)),
    Convolution("grouped", 2, 8, 16, (5, 5), (3, 3), padding=1, groups=2, activation="silu"),
    Convolution("depthwise", 2, 1, 1, (6, 7), (3, 3), padding=1, groups=24, activation="silu", max_pool=2),
    Convolution("depthwise, two filters, stride 2", 1, 1, 2, (7, 7), (3, 3), stride=2, padding=1, groups=9),
    Convolution("odd channels", 1, 33, 17, (4, 5), (3, 3), padding=1, activation="gelu_tanh"),
    Convolution("overlapping windows", 1, 8, 8, (8, 9), (3, 3), activation="gelu", max_pool=((3, 2), (1, 2), (1, 0))),
    Convolution("gaps between windows", 1, 8, 8, (9, 9), (3, 3), padding=1, activation="silu", max_pool=(2, 3, 0)),
    Convolution("padding as large as the window", 1, 8, 8, (3, 2), (2, 2), padding=2, activation="relu"),
    Convolution("one dimension", 2, 24, 16, (20,), (3,), padding=1, activation="relu"),
    Convolution("one dimension, pooled", 2, 5, 6, (23,), (4,), stride=2, dilation=2, activation="relu", max_pool=3),
    Convolution("same", 2, 6, 5, (6, 7), (2, 4), padding="same"),
]  # fmt: skip


def generated(count: int, seed: int = 0) -> list[tuple[Convolution, torch.dtype, str, str]]:
    """``count`` convolutions with a dtype and the layouts of input and weight, the same ones for one seed.

    Dtypes and activations take turns, so that a short list has them all; the rest is drawn.
    """
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        number = len(found)
        rank = rng.choice((1, 2, 2, 2))

        def each(*choices: int, rank=rank) -> tuple[int, ...]:
            return tuple(rng.choice(choices) for _ in range(rank))

        groups = rng.choice((1, 1, 1, 2, 3, 8))
        channels, filters = rng.choice(((1, 1), (1, 2), (3, 8), (4, 4), (8, 16), (16, 7), (17, 33), (32, 8), (40, 24)))
        if channels * groups > 40:
            groups = 1
        window, dilation = each(1, 2, 3, 3, 5), each(1, 1, 2, 3)
        stride, padding = each(1, 1, 2, 3), each(0, 1, 1, 2, 3)
        if max(window) == 1:
            padding = NO_PADDING[rank]
        reach = [d * (taps - 1) + 1 for d, taps in zip(dilation, window, strict=True)]
        size = tuple(max(1, extent - 2 * pad) + rng.randrange(6) for extent, pad in zip(reach, padding, strict=True))
        conv = [
            (extent + 2 * pad - length) // step + 1
            for extent, pad, length, step in zip(size, padding, reach, stride, strict=True)
        ]
        pools = [None, None]
        if min(conv) >= 2:
            pools += [2, (2, 1, 0), (2, 2, 1), (2, 3, 0)]
        if min(conv) >= 3:
            pools += [(3, 2, 1), (each(1, 2, 3), each(1, 2, 3), 0)]
        found.append(
            (
                Convolution(
                    f"generated {number}", rng.choice((1, 2, 3)), channels, filters, size, window, stride, padding,
                    dilation, groups, tuple(ACTIVATIONS)[number % 5], rng.choice(pools),
                ),
                DTYPES[number % 3],
                rng.choice((*LAYOUTS, "contiguous", "channels_last", "channels_last")),
                rng.choice(LAYOUTS[:4]),
            )
        )  # fmt: skip
    return found
