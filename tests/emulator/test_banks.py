"""Bank conflicts, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests import emulated

pytestmark = pytest.mark.emulated

NAMES = ("accesses", "phases", "wavefronts", "conflicts")
SOURCE = "tests/emulator/banks.cu"


def place(text: str) -> str:
    lines = (emulated.ROOT / SOURCE).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if text in line)
    return f"{SOURCE}:{number}"


def count(kernels, name: str, *arguments, **options) -> dict:
    kernels.control.set_options(**{"bank_conflicts": True, **options})
    kernels.control.reset_counters()
    assert kernels.run(name, *arguments) is None
    return kernels.control.counters()


def totals(counters: dict, prefix: str) -> tuple[int, ...]:
    return tuple(counters[prefix + name] for name in NAMES)


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
@pytest.mark.parametrize(
    ("width", "threads", "stride", "phases", "wavefronts"),
    [
        (4, 32, 1, 1, 1),
        (4, 32, 2, 1, 2),
        (4, 32, 3, 1, 1),
        (4, 32, 4, 1, 4),
        (4, 32, 32, 1, 32),
        (4, 32, 33, 1, 1),
        (4, 16, 32, 1, 16),  # half a warp
        (4, 16, 2, 1, 1),
        (4, 7, 32, 1, 7),
        (4, 64, 32, 2, 32 + 32),  # two warps
        (4, 48, 32, 2, 32 + 16),
        (1, 32, 1, 1, 1),  # four lanes in a word
        (2, 32, 1, 1, 1),
        (2, 32, 2, 1, 1),
        (2, 32, 4, 1, 2),
        (8, 32, 1, 2, 2),
        (8, 32, 2, 2, 4),
        (8, 32, 16, 2, 32),
        (8, 32, 17, 2, 2),
        (8, 16, 1, 1, 1),
        (16, 32, 1, 4, 4),
        (16, 32, 2, 4, 8),
        (16, 32, 8, 4, 32),  # a column of a tile of 128-byte rows
        (16, 32, 9, 4, 4),  # padded by 16 bytes
        (16, 16, 8, 2, 16),
        (16, 4, 8, 1, 4),
    ],
)
def test_strides(race, width, threads, stride, phases, wavefronts, store):
    warps = -(-threads // 32)
    for schedule in race.control.schedules(1):
        out = np.zeros(1024, np.float32)
        prefix = "shared_store_" if store else "shared_load_"
        filled = totals(count(race, "bank_stride", out, width, threads, 0, 0, **schedule), "shared_store_")
        assert filled[3] == 0
        found = totals(count(race, "bank_stride", out, width, threads, stride, int(store), **schedule), prefix)
        expected = (warps, phases, wavefronts, wavefronts - phases)
        assert found == tuple(np.add(expected, filled) if store else expected), schedule


@pytest.mark.parametrize(("width", "phases"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)])
def test_lanes_at_one_word_do_not_conflict(race, width, phases):
    counters = count(race, "bank_stride", np.zeros(1024, np.float32), width, 32, 0, 0)
    assert totals(counters, "shared_load_") == (1, phases, phases, 0)


def test_divergent_lanes_are_accesses_of_their_own(race):
    counters = count(race, "bank_divergent", np.zeros(32, np.float32))
    assert totals(counters, "shared_load_") == (2, 2, 1 + 16, 15)
    assert counters["bank_conflict_places"] == [
        {"place": place("tile[lane * 32] + 1"), "kind": "load", "accesses": 1, "phases": 1, "wavefronts": 16}
        | {"conflicts": 15}
    ]


def test_lanes_that_leave_a_loop_early(race):
    out = np.zeros(32, np.float32)
    counters = count(race, "bank_turns", out)
    np.testing.assert_array_equal(out, np.arange(32) % 4 + 1)
    assert totals(counters, "shared_load_") == (4, 4, 4, 0)


# Per 8x8 tile of ldmatrix and stmatrix, and per quarter of a warp of cp.async.
@pytest.mark.parametrize(
    ("row_bytes", "swizzle", "ways"),
    [
        (64, False, 4),
        (128, False, 8),
        (128, True, 1),
        (144, False, 1),  # padded by 16 bytes
    ],
)
def test_tiles(kernels, row_bytes, swizzle, ways):
    """In both builds: these are seen without instrumentation."""
    data = np.zeros(128, np.uint32)
    counters = count(kernels, "bank_tile", data, data.copy(), row_bytes, int(swizzle))
    assert totals(counters, "shared_load_") == (1, 4, 4 * ways, 4 * ways - 4)
    # Two of cp.async, one of stmatrix.
    assert totals(counters, "shared_store_") == (3, 12, 12 * ways, 12 * ways - 12)
    worst = counters["bank_conflict_places"]
    if ways == 1:
        assert worst == []
    else:
        assert [(entry["place"], entry["kind"]) for entry in worst] == [
            (place("cp_async16("), "store"),
            (place("ldmatrix_x4("), "load"),
            (place("stmatrix_x4("), "store"),
        ]
        assert [entry["conflicts"] for entry in worst] == [8 * ways - 8, 4 * ways - 4, 4 * ways - 4]


def test_counts_add_up_and_are_cleared(race):
    out = np.zeros(1024, np.float32)
    once = totals(count(race, "bank_stride", out, 4, 32, 32, 0), "shared_load_")
    assert race.run("bank_stride", out, 4, 32, 32, 0) is None
    assert totals(race.control.counters(), "shared_load_") == tuple(2 * n for n in once)
    race.control.reset_counters()
    assert totals(race.control.counters(), "shared_load_") == (0, 0, 0, 0)
    assert race.control.counters()["bank_conflict_places"] == []


def test_nothing_is_counted_unless_asked(kernels):
    data = np.zeros(128, np.uint32)
    counters = count(kernels, "bank_tile", data, data.copy(), 128, 0, bank_conflicts=False)
    assert totals(counters, "shared_load_") == totals(counters, "shared_store_") == (0, 0, 0, 0)
    assert "bank_conflicts" in kernels.control.options() and not kernels.control.options()["bank_conflicts"]


def test_blocks_on_several_workers_are_all_counted(plain):
    data = np.zeros(128, np.uint32)
    counters = count(plain, "bank_tile", data, data.copy(), 128, 0, workers=2)
    assert totals(counters, "shared_load_") == (1, 4, 32, 28)
