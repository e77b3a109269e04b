"""The decoding kernel of Hopper GPUs, called as a raw op: every instance, what it serves, clusters, bytes by TMA.

On the CPU the emulated GPU says that it is one (compute capability 90); other GPUs skip these tests.
"""

from __future__ import annotations

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.attention_decode import _cuda
from tests.conftest import pick
from tests.kernels.test_attention_decode import BF16, F16, F32, FEATURES, arguments, check, copied


class Hopper:
    """The GPU under test, and what it did, where that can be asked."""

    def __init__(self, emulator):
        self.emulator = emulator

    def check(self, given, *, launches=None, by_tma=True):
        """The results are right, and come from so many kernels, by TMA or not."""
        if not self.emulator:
            return check(given)
        self.emulator.reset_counters()
        check(given)
        counters = self.emulator.counters()
        assert (counters["tma_load_bytes"] > 0) == by_tma
        assert launches is None or counters["launches"] == launches


@pytest.fixture(autouse=True)
def hopper(device, request):
    """2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        yield Hopper(None)
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(compute_capability=90, multiprocessors=2, blocks_per_multiprocessor=2)
    yield Hopper(emulator)
    emulator.set_options(**options)


@pytest.mark.parametrize("dtype", pick([BF16, F16], [BF16]), ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_every_instance(dtype, dims, splits, device, hopper):
    """Two tiles of queries, the second one ragged; rings that go round; new rows that begin within a tile."""
    given = arguments(dims, dtype, device, (430, 7), 450, queries=11, new=11, splits=splits, **FEATURES)
    hopper.check(given, launches=1)


@pytest.mark.parametrize("splits, launches", [(8, 1), (9, 2), (11, 2), (24, 2)])
def test_parts_and_clusters(splits, launches, device, hopper):
    """One cluster, three clusters of three, blocks alone, three clusters of eight; most parts have no keys."""
    hopper.check(arguments((64, 40), BF16, device, (700, 0, 64), 710, splits=splits), launches=launches)


def test_parts_that_are_chosen(device, hopper):
    """Eight in a cluster where that occupies the GPU; one where the rows are few."""
    for capacity in (2048, 100):
        given = arguments((64, 64), BF16, device, (capacity - 1,), capacity, (1, 1))
        hopper.check(given, launches=1)


@pytest.mark.parametrize("length", pick(range(400, 530), [15, 16, 383, 384, 385, 447, 448, 463]))
@pytest.mark.parametrize("new", [0, 1])
def test_ends_of_tiles_and_rings(length, new, device, hopper):
    """Rings go round after 384 keys of a part.  What the rows behind the last one hold does not matter."""
    given = arguments((64, 64), F16, device, (length,), 530, (1, 1), new=new, splits=1)
    poisoned = copied(given)
    for name in ("key_cache", "value_cache"):
        poisoned[name][:, :, length:] = torch.nan
    hopper.check(given, by_tma=length >= 16)
    assert all(map(torch.equal, _cuda.forward(**poisoned), _cuda.forward(**given)))


@pytest.mark.parametrize("left", pick(range(1, 70), [1, 16, 17, 64]))
def test_a_window_starts_anywhere(left, device, hopper):
    given = arguments((64, 40), BF16, device, (150,), heads=(2, 1), queries=3, new=3, window_left=left, splits=2)
    hopper.check(given, by_tma=left >= 16)


def layouts():
    """Caches as they lie in memory, and whether a tensor map describes them."""

    def permuted(x):  # (batch, rows, heads, dim)
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def padded(x):
        wide = x.new_zeros((*x.shape[:3], x.shape[3] + 8))
        wide[..., : x.shape[3]] = x
        return wide[..., : x.shape[3]]

    def odd(x):  # rows that do not begin at multiples of 16 bytes
        wide = x.new_zeros((*x.shape[:3], x.shape[3] + 1))
        wide[..., : x.shape[3]] = x
        return wide[..., : x.shape[3]]

    def shifted(x):
        flat = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
        return flat.copy_(x)

    return {"permuted": (permuted, True), "padded": (padded, True), "odd": (odd, False), "shifted": (shifted, False)}


@pytest.mark.parametrize("layout", layouts())
def test_which_layouts_it_serves(layout, device, hopper):
    change, by_tma = layouts()[layout]
    given = arguments((72, 40), BF16, device, (150, 60), new=2, queries=2, splits=2)
    for name in ("key_cache", "value_cache"):
        given[name] = change(given[name])
    hopper.check(given, by_tma=by_tma)


def test_columns_that_no_vector_holds(device, hopper):
    """Rows 40 elements apart, of 33 and 35: TMA fills the panel with zeros, the last tile is copied by elements."""
    given = arguments((33, 35), BF16, device, (150, 60), new=2, queries=2, splits=1)
    for name in ("key_cache", "value_cache"):
        wide = given[name].new_full((*given[name].shape[:3], 40), torch.nan)
        wide[..., : given[name].shape[3]] = given[name]
        given[name] = wide[..., : given[name].shape[3]]
    hopper.check(given)


def test_float32_is_copied(device, hopper):
    hopper.check(arguments((64, 64), F32, device, splits=2), launches=2, by_tma=False)


def test_equal_inputs_give_equal_bits(device, hopper):
    """Under any schedule of the threads: a cluster adds in the order of its ranks."""
    first = None
    for schedule in hopper.emulator.schedules(seeds=1) if hopper.emulator else [{}] * 4:
        if hopper.emulator:
            hopper.emulator.set_options(**schedule)
        given = arguments((64, 64), BF16, device, (700, 90), 710, splits=6)
        results = (*_cuda.forward(**given), given["key_cache"], given["value_cache"])
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("dims, length, splits", [((64, 64), 420, 1), ((128, 104), 250, 2)], ids=str)
def test_small(dims, length, splits, device, hopper):
    """For the race checker and AddressSanitizer: a ring that goes round, a cluster, the append beside."""
    given = arguments(dims, BF16, device, (length, 3), length + 10, (2, 1), queries=2, new=2, splits=splits)
    hopper.check(given, launches=1)


@pytest.mark.sanitized
@pytest.mark.emulated
def test_counted_bytes(hopper, pytestconfig):
    """The race build counts every byte: the rows in use are read once, whole tiles of them by TMA."""
    if pytestconfig.getoption("--emulated-build") != "race":
        pytest.skip("only the race build counts bytes exactly")
    given = arguments((128, 128), BF16, "cpu", (250, 130), 300, (8, 1), queries=2, new=2, splits=2)
    hopper.emulator.reset_counters()
    output, lse = _cuda.forward(**given)
    counted = hopper.emulator.counters()
    row, new = 2 * 128, 4
    whole = 250 // 16 * 16 + 130 // 16 * 16
    assert counted["tma_load_bytes"] == 2 * whole * row
    copied_rows = 252 + 132 - whole
    loaded = counted["global_load_bytes"] - counted["tma_load_bytes"]
    # Each of the two parts reads the queries, and each thread its sequence's length; new rows are read twice.
    assert loaded <= 2 * (copied_rows + new) * row + 2 * output.nbytes + 4 * 128 * given["cache_seqlens"].itemsize
    assert counted["global_store_bytes"] <= (2 * new * row + output.nbytes + lse.nbytes) * 1.05


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_without_bank_conflicts(dim, hopper):
    """Tiles as TMA leaves them; in the race build every access, those of the cluster's sums too."""
    given = arguments((dim, dim), BF16, "cpu", (200,), 210, heads=(4, 1), splits=2)
    hopper.emulator.set_options(bank_conflicts=True)
    hopper.emulator.reset_counters()
    _cuda.forward(**given)
    counted = hopper.emulator.counters()
    hopper.emulator.set_options(bank_conflicts=False)
    assert counted["shared_load_wavefronts"] > 0
    assert counted["bank_conflict_places"] == []
