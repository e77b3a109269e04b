"""The decoding kernel of Hopper GPUs, called as a raw op: every instance, which calls it serves, clusters, bytes by TMA.

On the CPU the emulated GPU says that it is one (compute capability 90); other GPUs skip these tests.
"""

from __future__ import annotations

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.attention_decode import _cuda
from tests.conftest import pick
from tests.kernels.test_attention_decode import BF16, F16, F32, FEATURES, arguments, check, copied

WARPS = {64: 4, 128: 4, 256: 2}  # kDecodeHopper64 ... of csrc/kernels/attention_decode.cuh
KEYS = 16  # of a warp's tile


@pytest.fixture(autouse=True)
def emulator_or_none(device, request):
    """A small Hopper GPU, 2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        yield None
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(compute_capability=90, multiprocessors=2, blocks_per_multiprocessor=2)
    yield emulator
    emulator.set_options(**options)


def counted(emulator, given) -> dict[str, int]:
    """What the kernels did for these arguments, whose results are right."""
    if emulator:
        emulator.reset_counters()
    check(given)
    return emulator.counters() if emulator else {}


@pytest.mark.parametrize("dtype", pick([BF16, F16], [BF16]), ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_every_instance(dtype, dims, splits, device, emulator_or_none):
    """Two tiles of queries, the second one ragged; rings that go round; new rows that begin within a tile."""
    given = arguments(dims, dtype, device, (430, 7), 450, queries=11, new=11, splits=splits, **FEATURES)
    counters = counted(emulator_or_none, given)
    if emulator_or_none:
        assert counters["tma_load_bytes"] > 0 and counters["launches"] == 1
