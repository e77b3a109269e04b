"""The race checker: what it must find whatever the schedule, and what it must not mistake for a race."""

from __future__ import annotations

import pytest

from tests.emulator.test_faults import line_of

pytestmark = pytest.mark.emulated

# kernel, the message's words, texts on the lines it may name
RACES = [
    ("read_after_write", "shared memory", ["tile[63 - threadIdx.x]", "tile[threadIdx.x] ="]),
    ("write_after_read", "race in shared memory", ["tile[63 - threadIdx.x]", "= x + 1"]),
    ("write_after_write", "race in shared memory", ["total = out"]),
    ("shuffle_as_fence", "shared memory", ["tile[threadIdx.x ^ 1]"]),
    ("uninitialised", "read of uninitialised shared memory", ["= tile[threadIdx.x]"]),
    ("copy_into_tile_being_read", "race in shared memory", ["cp_async16"]),
    ("missing_copy_wait", "is still writing", ["= tile[threadIdx.x * 4]"]),
    ("blocks_write_one_place", "race in global memory", ["out[threadIdx.x] ="]),
    ("neighbours_read", "race in global memory", ["out[1024", "= 1;"]),
    ("last_block_no_release", "race in global memory", []),
    ("last_block_no_acquire", "a fence after the read", []),
    ("last_block_no_barrier", "race in global memory", []),
    ("flag_no_acquire", "race in global memory", []),
]


@pytest.mark.parametrize(("kernel", "words", "places"), RACES, ids=[race[0] for race in RACES])
def test_races_are_found_under_every_schedule(race, kernel, words, places):
    for schedule in race.control.schedules(2):
        race.control.set_options(**schedule, async_mode="wait")
        message, _ = race.fault(kernel)
        assert message and words in message, schedule
        assert not places or any(line_of(kernel, place) in message for place in places)


@pytest.mark.parametrize("kernel", ["last_block", "flag", "volatile_flag", "neighbouring_bytes"])
def test_ordered_accesses_are_no_races(race, kernel):
    for schedule in race.control.schedules(4):
        race.control.set_options(**schedule)
        message, _ = race.fault(kernel)
        assert message is None


def test_both_sides_of_a_race_are_named(race):
    message, _ = race.fault("write_after_read")
    assert line_of("write_after_read", "tile[63 - threadIdx.x]") in message
    assert line_of("write_after_read", "= x + 1") in message
    assert message.count("thread (") == 2
