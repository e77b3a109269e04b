from __future__ import annotations

import pytest
import torch
from torch import nn

from bigkern.models import CNN, LogSoftmaxCNN, SmallCNN


def widths(model, kind):
    return [
        module.out_channels if kind is nn.Conv2d else (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, kind)
    ]


def pools(model):
    return [module.max_pool for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_cnn_is_the_documents():
    model = CNN((1, 28, 28), 10)
    assert widths(model, nn.Conv2d) == [32, 64, 128]
    assert widths(model, nn.Linear) == [(128 * 3 * 3, 512), (512, 10)]
    assert pools(model) == [2, 2, None]


def test_small_cnn_is_the_documents():
    model = SmallCNN()
    assert widths(model, nn.Conv2d) == [32, 64]
    assert widths(model, nn.Linear) == [(64 * 5 * 5, 128), (128, 10)]
    assert pools(model) == [2, 2]


def test_log_softmax_cnn_is_the_documents():
    """The document prints 64 * 7 * 7 features, which two unpadded convolutions and one pooling of 28x28 do not give."""
    model = LogSoftmaxCNN()
    assert widths(model, nn.Conv2d) == [32, 64]
    assert widths(model, nn.Linear) == [(64 * 12 * 12, 128), (128, 10)]
    assert pools(model) == [None, 2]
    outputs = model(torch.rand(3, 1, 28, 28))
    torch.testing.assert_close(outputs.exp().sum(1), torch.ones(3))
    # Cross entropy takes another log-softmax, which leaves logarithms of probabilities as they are.
    targets = torch.tensor([1, 2, 3])
    torch.testing.assert_close(nn.functional.cross_entropy(outputs, targets), nn.functional.nll_loss(outputs, targets))


@pytest.mark.parametrize("shape, padding", [((1, 18, 18), 0), ((3, 31, 64), 0), ((1, 8, 8), 1), ((2, 4, 17), 1)])
def test_any_input_shape(shape, padding):
    assert CNN(shape, 4, padding=padding)(torch.rand(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize("shape, padding", [((1, 17, 30), 0), ((1, 8, 8), 0), ((1, 3, 9), 1)])
def test_too_small_an_image_is_refused_with_what_to_do(shape, padding):
    with pytest.raises(ValueError, match=r"too small for 3 convolutions with 2 poolings.*larger images"):
        CNN(shape, 4, padding=padding)


def test_too_small_an_image_for_one_pooling():
    with pytest.raises(ValueError, match=r"too small for 2 convolutions with 1 pooling and padding=0.*or padding=1"):
        LogSoftmaxCNN((1, 5, 5), 10)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected \(channels, height, width\), got \(28, 28\)"):
        CNN((28, 28), 10)
    with pytest.raises(ValueError, match=r"images: expected \(N, 1, 28, 28\), got \(2, 3, 28, 28\)"):
        SmallCNN()(torch.rand(2, 3, 28, 28))
