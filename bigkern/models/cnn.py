"""The documents' three convolutional image classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers

_KERNEL = 3


class _ImageClassifier(nn.Module):
    """Convolutions of 3x3 with ReLU, those marked in ``pooled`` with max pooling of 2x2, then two dense layers.

    The number of features that reach the dense layers follows from ``input_shape``.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        channels: Sequence[int],
        pooled: Sequence[bool],
        hidden: int,
        padding: int,
        layers: Layers,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {self.input_shape}")
        inner, *size = self.input_shape
        blocks: list[nn.Module] = []
        for outer, pools in zip(channels, pooled, strict=True):
            blocks.append(layers.ConvBlock2d(inner, outer, _KERNEL, padding=padding, max_pool=2 if pools else None))
            size = [extent + 2 * padding - (_KERNEL - 1) for extent in size]
            if pools:
                size = [extent // 2 for extent in size]
            if min(size) < 1:
                raise ValueError(
                    f"input_shape: {self.input_shape} is too small for {len(channels)} convolutions with {sum(pooled)} "
                    f"pooling{'s' * (sum(pooled) > 1)} and padding={padding}; give larger images"
                    f"{', or padding=1' * (padding == 0)}"
                )
            inner = outer
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            layers.Flatten(),
            layers.Linear(inner * size[0] * size[1], hidden),
            layers.ReLU(),
            layers.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) -> (N, classes) logits; the document's softmax belongs to the loss."""
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"images: expected (N, {', '.join(map(str, self.input_shape))}), got {tuple(images.shape)}"
            )
        return self.classifier(self.features(images))


class CNN(_ImageClassifier):
    """The documents' CNN A: convolutions 32, 64, 128 with two poolings, dense 512, dense ``classes``.

    Any ``input_shape`` (channels, height, width). As printed the convolutions are not padded, which takes images of
    18x18 and up; ``padding=1`` keeps their size and takes images of 4x4 and up.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, *, padding: int = 0, layers: Layers = BIGKERN) -> None:
        super().__init__(input_shape, classes, (32, 64, 128), (True, True, False), 512, padding, layers)


class SmallCNN(_ImageClassifier):
    """The documents' CNN B: on 28x28x1, convolutions 32 and 64, each pooled, dense 128, dense 10."""

    def __init__(
        self, input_shape: Sequence[int] = (1, 28, 28), classes: int = 10, *, layers: Layers = BIGKERN
    ) -> None:
        super().__init__(input_shape, classes, (32, 64), (True, True), 128, 0, layers)


class LogSoftmaxCNN(_ImageClassifier):
    """The documents' CNN C: convolutions 32 and 64, pooled once after both, dense 128, dense ``classes``, log-softmax.

    As printed the convolutions are not padded, which takes images of 6x6 and up. The document trains it by SGD with
    momentum 0.9 and cross entropy, which takes the logarithm of a softmax of its own: of log-probabilities that gives
    them back as they are, so cross entropy is right here too.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        *,
        padding: int = 0,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__(input_shape, classes, (32, 64), (False, True), 128, padding, layers)

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) -> (N, classes) logarithms of probabilities."""
        return torch.log_softmax(super().forward(images), -1)
