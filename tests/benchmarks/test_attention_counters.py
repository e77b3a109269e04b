"""The table of benchmarks/attention_counters.py: what it holds, and what the kernels may ask for."""

from __future__ import annotations

import pytest

from benchmarks import attention_counters
from benchmarks.attention_counters import CASES, HOPPER_CASES, Case
from tests.conftest import pick

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("case", pick(CASES, [CASES[-2], CASES[-1]]), ids=lambda case: f"{case.name} {case.head_dim}")
def test_committed_table_is_what_the_program_writes(case):
    assert attention_counters.row(case) in attention_counters.TABLE.read_text().splitlines()


@pytest.mark.parametrize("case", HOPPER_CASES, ids=lambda case: f"{case.name} {case.head_dim}")
def test_committed_table_of_the_hopper_kernel(case, emulator):
    assert attention_counters.hopper_row(case) in attention_counters.TABLE.read_text().splitlines()


def test_heads_that_share_tiles_load_less(emulator):
    """Eight heads of 72 queries fill 4.5 tiles of 128 rows, and 8 of their own."""
    shared, apart = (Case("", 128, 8, kv_heads, 72) for kv_heads in (1, 8))
    tile = 2 * 512 * 128 * 2 + 128 * 128 * 2
    assert attention_counters.hopper_loads(shared) == 5 * tile
    assert attention_counters.hopper_loads(apart) == 8 * tile


def test_hidden_tiles_are_not_multiplied():
    """A window of 16 keys over 256 cuts 5 of 8 tiles of 128 x 64, the forward's, and 7 of 16 of 64 x 64."""
    full = Case("full", 64, queries=256, keys=256)
    cut = full._replace(window=(16, 0))
    for backward, share in ((False, 5 / 8), (True, 7 / 16)):
        whole, part = (attention_counters.count(case, backward) for case in (full, cut))
        assert whole.products * 2 * 16 * 8 * 16 == full.useful_flops(backward)
        assert part.products == share * whole.products


def test_one_tile_of_queries_moves_the_floor():
    case = Case("one tile", 64, queries=64, keys=64)
    found = attention_counters.count(case, False)
    assert found.loads + found.stores <= 1.02 * case.floor_bytes(False)
    assert found.atomics == 0 and found.conflicts == 0
