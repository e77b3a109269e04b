"""The kernel of networks' first convolutions: what it serves, every path of it; against torch in float64.

The cases are of tests/kernels/test_conv.py's kind and go through the same checks, of outputs and of every gradient.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bigkern.ops import _extension
from tests.conftest import pick
from tests.kernels.test_conv import BF16, F16, F32, Conv, cases, check, forward, operands, randn


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU of one multiprocessor when emulated: blocks go from box to box."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield None
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=1)
    yield emulator
    emulator.set_options(**options)


POOL = (3, 3, 2, 2, 1, 1)
# The names say what a case is there for.
PATHS = {
    "ResNet": Conv(1, 3, (48, 40), 64, (7, 7), (2, 2), (3, 3), activation=1, pool=POOL),
    "boxes after boxes": Conv(2, 3, (40, 64), 40, (3, 3), (2, 2), (1, 1), activation=1),
    "odd step: a second copy of the lines": Conv(
        1, 3, (17, 32), 64, (3, 3), padding=(1, 1), activation=1, pool=(2, 2, 2, 2, 0, 0)
    ),
    "one channel, unaligned lines": Conv(2, 1, (28, 28), 32, (3, 3), activation=1, pool=(2, 2, 2, 2, 0, 0)),
    "two channels": Conv(1, 2, (18, 20), 33, (5, 5), padding=(2, 2), activation=2),
    "four channels": Conv(1, 4, (20, 24), 16, (3, 3), (2, 2), (0, 1)),
    "filters of three tiles": Conv(1, 3, (12, 16), 130, (3, 3), padding=(1, 1), activation=1),
    "odd filters": Conv(1, 3, (16, 15), 21, (2, 5), (1, 2), (1, 2), activation=3, pool=(2, 3, 1, 2, 1, 1)),
    "patches": Conv(1, 3, (32, 48), 96, (4, 4), (4, 4)),
    "stride 3": Conv(1, 3, (30, 41), 24, (7, 6), (3, 3), (3, 4), activation=4, pool=POOL),
    "1x1": Conv(1, 4, (16, 16), 8, (1, 1), bias=False),
    "one dimension": Conv(2, 3, (1, 200), 8, (1, 5), padding=(0, 2), activation=1, pool=(1, 2, 1, 2, 0, 0)),
}


@pytest.mark.parametrize("name, dtype, channels_last", cases(PATHS, [BF16, F16]), ids=str)
def test_paths(name, dtype, channels_last, device, kernels):
    check(PATHS[name], dtype, device, channels_last)
