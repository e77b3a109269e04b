"""Autoencoders of images, convolutional and dense: one of the documents' core algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers


class _Autoencoder(nn.Module):
    """``encode`` squeezes an image into ``code`` numbers, ``decode`` draws it again from them."""

    def __init__(self, input_shape: Sequence[int], code: int) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {self.input_shape}")
        if code < 1:
            raise ValueError(f"code: expected at least 1 number, got {code}")

    def encode(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) -> (N, code)."""
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"images: expected (N, {', '.join(map(str, self.input_shape))}), got {tuple(images.shape)}"
            )
        return self.encoder(images)

    def decode(self, code: Tensor) -> Tensor:
        """(N, code) -> (N, channels, height, width), each pixel in (0, 1)."""
        return torch.sigmoid(self.decoder(code)).unflatten(1, self.input_shape)

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) in [0, 1] -> the same, drawn again."""
        return self.decode(self.encode(images))


class Autoencoder(_Autoencoder):
    """Dense: ``hidden`` numbers with ReLU on the way to the code and on the way back."""

    def __init__(
        self, input_shape: Sequence[int], code: int = 16, *, hidden: int = 128, layers: Layers = BIGKERN
    ) -> None:
        super().__init__(input_shape, code)
        pixels = math.prod(self.input_shape)
        self.encoder = nn.Sequential(
            layers.Flatten(), layers.Linear(pixels, hidden), layers.ReLU(), layers.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(layers.Linear(code, hidden), layers.ReLU(), layers.Linear(hidden, pixels))


class ConvAutoencoder(_Autoencoder):
    """Convolutional: to the code by two convolutions of 3x3 with ReLU, 16 and 32 channels, each pooled by 2x2; back by
    two convolutions over images enlarged twofold, the last followed by one that draws.

    Images of 4x4 and up; where the size is no multiple of 4, the way back ends in the image's own size.
    """

    def __init__(self, input_shape: Sequence[int], code: int = 16, *, layers: Layers = BIGKERN) -> None:
        super().__init__(input_shape, code)
        channels, height, width = self.input_shape
        if min(height, width) < 4:
            raise ValueError(f"input_shape: {self.input_shape} is too small to be pooled twice; give 4x4 or more")
        small = (32, height // 4, width // 4)
        self.encoder = nn.Sequential(
            layers.ConvBlock2d(channels, 16, 3, padding=1, max_pool=2),
            layers.ConvBlock2d(16, 32, 3, padding=1, max_pool=2),
            layers.Flatten(),
            layers.Linear(math.prod(small), code),
        )
        self.decoder = nn.Sequential(
            layers.Linear(code, math.prod(small)),
            layers.ReLU(),
            layers.Unflatten(1, small),
            layers.Upsample(size=(height // 2, width // 2)),
            layers.ConvBlock2d(32, 16, 3, padding=1),
            layers.Upsample(size=(height, width)),
            layers.ConvBlock2d(16, 16, 3, padding=1),
            layers.Conv2d(16, channels, 3, padding=1),
            layers.Flatten(),
        )
