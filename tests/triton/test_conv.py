"""Convolution's Triton kernels, interpreted: launch paths that the public op reaches only with large tensors.

tests/ops runs the public op over the same kernels; what is here changes how they are launched.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import bigkern
from bigkern.ops import _triton_support, conv2d
from bigkern.ops.conv import _triton
from tests import numerics
from tests.ops.convolutions import NAMED, NAMES, Convolution

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("interpreter")]

FORMS = {form.name: form for form in NAMED}
SMALL = Convolution("small", 2, 5, 6, (4, 5), (2, 3), stride=2, padding=1)
DEPTHWISE = Convolution("depthwise", 2, 1, 1, (4, 5), (2, 3), padding=1, groups=3)
GROUPED = Convolution("grouped", 1, 2, 3, (4, 5), (2, 3), groups=2)


@pytest.fixture(autouse=True)
def on_triton():
    with bigkern.use_backend("triton"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def check(form, **arguments):
    numerics.check(form.kernel, form.reference, form.inputs(**arguments), names=NAMES)


@pytest.mark.parametrize(
    "form", [replace(SMALL, activation="relu", max_pool=(2, 1, 0)), DEPTHWISE], ids=lambda form: form.name
)
def test_pixels_numbered_in_64_bits(monkeypatch, form):
    """As where there are more than 2^31 of them."""
    monkeypatch.setattr(_triton, "_is_long", lambda count, block: True)
    check(form, layout="channels_last")


@pytest.mark.parametrize("form", [SMALL, replace(GROUPED, channels=20)], ids=lambda form: form.name)
def test_taps_and_channels_summed_as_one_or_apart(monkeypatch, form):
    """Each traversal on channels that the other would take."""
    for least in (1, 1000):
        monkeypatch.setattr(_triton, "_MIN_TAP_CHANNELS", least)
        check(form, dtype=torch.bfloat16)


@pytest.mark.parametrize("form", [DEPTHWISE, GROUPED], ids=lambda form: form.name)
def test_groups_with_and_without_tensor_cores(monkeypatch, form):
    for most in (0, 16):
        monkeypatch.setattr(_triton, "_MAX_CHANNELWISE", most)
        check(form)


def test_every_kernel_is_reached(monkeypatch):
    from bigkern.ops.conv import _triton_kernels

    launched = []
    for name, kernel in list(vars(_triton_kernels).items()):
        if not name.endswith("_kernel"):
            continue

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(_triton_kernels, name, Spy())
    for form in (FORMS["overlapping windows"], FORMS["grey"]):
        output = form.kernel(*form.inputs())
        output.sum().backward()
    expected = {name for name in vars(_triton_kernels) if name.endswith("_kernel")}
    assert set(launched) == expected and launched.count("conv_pool_kernel") == 1


def test_pixels_split_over_programs_give_the_same_weight_gradient(monkeypatch):
    """More multiprocessors, more splits, another order of the sum: nearly the same; the same ones, the same bits."""
    form = Convolution("pixels", 2, 4, 4, (20, 21), (1, 2))
    inputs = form.inputs()
    found = []
    for multiprocessors in (1, 1, 8):
        monkeypatch.setattr(_triton_support, "_INTERPRETED_MULTIPROCESSORS", multiprocessors)
        found.append(numerics.run(form.kernel, inputs)[1][1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-4)


def objection(x, w, b=None, stride=(1, 1), max_pool=()):
    return _triton.unsupported(x, w, b, stride, (0, 0), (1, 1), 1, None, max_pool)


def test_unsupported(monkeypatch):
    x, w = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3)
    assert objection(x, w, w[:, 0, 0, 0]) is None
    assert "float64" in objection(x.double(), w.double())
    assert "weight is on meta" in objection(x, w.to("meta"))
    assert "stride is (300, 300)" in objection(x, w, stride=(300, 300))
    assert "16 x 16 places" in objection(x, w, max_pool=(16, 16, 1, 1, 0, 0))
    assert objection(x, w, max_pool=(15, 17, 1, 1, 0, 0)) is None
    monkeypatch.setattr(_triton_support, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in objection(x, w)


def test_what_is_refused_names_the_reason():
    x, w = torch.zeros(1, 1, 300, 300), torch.zeros(1, 1, 1, 1)
    with pytest.raises(bigkern.BackendError, match=r"stride is \(300, 300\)(.|\n)*torch: could serve them"):
        conv2d(x, w, stride=300)
