"""The documents' two convolutional image classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers

_KERNEL = 3


class _ImageClassifier(nn.Module):
    """Convolutions of 3x3 with ReLU, max pooling of 2x2 after all but the last ``unpooled`` of them, two dense layers.

    The number of features that reach the dense layers follows from ``input_shape``.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        channels: Sequence[int],
        unpooled: int,
        hidden: int,
        padding: int,
        layers: Layers,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {self.input_shape}")
        pooled = len(channels) - unpooled
        inner, *size = self.input_shape
        features: list[nn.Module] = []
        for index, outer in enumerate(channels):
            features += [layers.Conv2d(inner, outer, _KERNEL, padding=padding), layers.ReLU()]
            size = [extent + 2 * padding - (_KERNEL - 1) for extent in size]
            if index < pooled:
                features.append(layers.MaxPool2d(2))
                size = [extent // 2 for extent in size]
            if min(size) < 1:
                raise ValueError(
                    f"input_shape: {self.input_shape} is too small for {len(channels)} convolutions with {pooled} "
                    f"poolings and padding={padding}; give larger images, or padding=1"
                )
            inner = outer
        self.features = nn.Sequential(*features)
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
        super().__init__(input_shape, classes, (32, 64, 128), 1, 512, padding, layers)


class SmallCNN(_ImageClassifier):
    """The documents' CNN B: on 28x28x1, convolutions 32 and 64, each pooled, dense 128, dense 10."""

    def __init__(
        self, input_shape: Sequence[int] = (1, 28, 28), classes: int = 10, *, layers: Layers = BIGKERN
    ) -> None:
        super().__init__(input_shape, classes, (32, 64), 0, 128, 0, layers)
