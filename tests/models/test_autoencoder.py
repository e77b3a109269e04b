from __future__ import annotations

import pytest
import torch

from bigkern.models import Autoencoder, ConvAutoencoder

both = pytest.mark.parametrize("make", [Autoencoder, ConvAutoencoder])


@both
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 5), (2, 11, 9)], ids=str)
def test_image_to_code_to_image(make, shape):
    model = make(shape, 7)
    images = torch.rand(3, *shape)
    code = model.encode(images)
    assert code.shape == (3, 7)
    drawn = model.decode(code)
    assert drawn.shape == images.shape and torch.equal(drawn, model(images))
    assert drawn.min() > 0 and drawn.max() < 1


@both
def test_what_is_refused(make):
    with pytest.raises(ValueError, match=r"expected \(channels, height, width\), got \(8, 8\)"):
        make((8, 8))
    with pytest.raises(ValueError, match="code: expected at least 1 number, got 0"):
        make((1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"images: expected \(N, 1, 8, 8\), got \(2, 1, 8, 9\)"):
        make((1, 8, 8))(torch.rand(2, 1, 8, 9))


def test_too_small_an_image_for_two_poolings():
    with pytest.raises(ValueError, match=r"too small to be pooled twice; give 4x4 or more"):
        ConvAutoencoder((1, 3, 8))
