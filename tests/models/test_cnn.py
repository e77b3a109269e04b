from __future__ import annotations

import pytest
import torch
from torch import nn

from bigkern.models import CNN, SmallCNN


def widths(model, kind):
    return [
        module.out_channels if kind is nn.Conv2d else (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, kind)
    ]


def test_cnn_is_the_documents():
    model = CNN((1, 28, 28), 10)
    assert widths(model, nn.Conv2d) == [32, 64, 128]
    assert widths(model, nn.Linear) == [(128 * 3 * 3, 512), (512, 10)]
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == 2


def test_small_cnn_is_the_documents():
    model = SmallCNN()
    assert widths(model, nn.Conv2d) == [32, 64]
    assert widths(model, nn.Linear) == [(64 * 5 * 5, 128), (128, 10)]


@pytest.mark.parametrize("shape, padding", [((1, 18, 18), 0), ((3, 31, 64), 0), ((1, 8, 8), 1), ((2, 4, 17), 1)])
def test_any_input_shape(shape, padding):
    assert CNN(shape, 4, padding=padding)(torch.rand(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize("shape, padding", [((1, 17, 30), 0), ((1, 8, 8), 0), ((1, 3, 9), 1)])
def test_too_small_an_image_is_refused_with_what_to_do(shape, padding):
    with pytest.raises(ValueError, match=r"too small for 3 convolutions with 2 poolings.*larger images"):
        CNN(shape, 4, padding=padding)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected \(channels, height, width\), got \(28, 28\)"):
        CNN((28, 28), 10)
    with pytest.raises(ValueError, match=r"images: expected \(N, 1, 28, 28\), got \(2, 3, 28, 28\)"):
        SmallCNN()(torch.rand(2, 3, 28, 28))
