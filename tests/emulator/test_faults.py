"""Faulty kernels: the emulator must end the launch with a message that names the fault, the line and the thread."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.emulated

SOURCE = Path(__file__).with_name("faults.cu").read_text().splitlines()


def line_of(kernel: str, text: str) -> str:
    """file:line of the first occurrence of a text in a kernel of faults.cu."""
    start = next(i for i, line in enumerate(SOURCE) if f" {kernel}(float*" in line)
    found = next(i for i in range(start, len(SOURCE)) if text in SOURCE[i])
    return f"tests/emulator/faults.cu:{found + 1}"


# kernel, what the message says under one schedule or another, text on the line it names
MISUSES = [
    ("diverged_barriers", "__syncthreads meets __syncthreads of other threads", "__syncthreads"),
    ("barrier_after_exit", "exit", "__syncthreads"),
    ("shuffle_names_absent_lanes", "__shfl_xor_sync", "__shfl_xor_sync"),
    ("shuffle_meets_vote", "meets", "__shfl_xor_sync"),
    ("masks_overlap", "its mask overlaps that of __shfl_xor_sync", "__shfl_xor_sync(0x0001ffff"),
    ("awaited_lane_leaves", "__shfl_xor_sync", "__shfl_xor_sync(0x0001ffff"),
    ("caller_not_in_mask", "the calling lane is not in its mask", "__shfl_sync"),
    ("source_not_in_mask", "reads lane 20, which is not in the mask", "__shfl_sync"),
    ("named_barrier_counts_differ", "named barrier 1: counts|deadlock", "named_barrier(1"),
    ("named_barrier_left_half", "named barrier 3 half complete", "named_barrier_arrive(3"),
    ("deadlock", "deadlock: no thread can run", "named_barrier(1"),
    ("livelock", "livelock: threads poll and nothing changes", "ld_acquire"),
    ("misaligned_vector", "misaligned store: an address that is 4 bytes past alignment to 16", "float4*"),
    ("misaligned_copy", "cp_async16: shared address not aligned to 16 bytes", "cp_async16"),
    ("copy_to_global", "not an address in the block's shared memory", "cp_async16"),
]


@pytest.mark.parametrize(("kernel", "words", "place"), MISUSES, ids=[m[0] for m in MISUSES])
def test_misuse_is_named(kernels, kernel, words, place):
    for schedule in kernels.control.schedules(2):
        kernels.control.set_options(**schedule)
        message, _ = kernels.fault(kernel)
        assert message and re.search(words, message)
        assert line_of(kernel, place) in message
        assert "block (0,0,0)" in message


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("exit_with_copies", "exits with cp.async copies it never waited for"),
        ("too_much_shared", "the kernel takes 260 bytes, the launch gave 256"),
        ("traps", "__trap()"),
    ],
)
def test_misuse_without_a_line(plain, kernel, words):
    message, _ = plain.fault(kernel)
    assert message and words in message


def test_deadlock_report_lists_all_who_wait(plain):
    message, _ = plain.fault("deadlock")
    assert len(re.findall(r"32 thread\(s\)", message)) == 2
    assert line_of("deadlock", "named_barrier(2") in message


def test_thread_is_named(plain):
    message, _ = plain.fault("misaligned_vector")
    assert message.endswith("[block (0,0,0) thread (0,0,0)]")


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "words"),
    [
        (0, 32, 0, "empty"),
        (1, 1025, 0, "1025 threads"),
        (1, 0, 0, "empty"),
        (1, 32, 300 << 10, "307200 bytes of dynamic shared memory"),
    ],
)
def test_bad_launches_are_refused(plain, blocks, threads, shared_bytes, words):
    assert words in plain.run("bad_config", blocks, threads, shared_bytes)


def test_cooperative_launch_must_fit(plain):
    plain.control.set_options(multiprocessors=2, blocks_per_multiprocessor=2)
    flags = np.zeros(8, np.uint32)
    message = plain.run("chain", np.zeros(8, np.int32), flags, 5)
    assert "only 4 fit the device" in message
    assert plain.run("chain", np.zeros(8, np.int32), flags, 4) is None


def test_a_failed_launch_leaves_nothing_behind(kernels):
    x = np.arange(96, dtype=np.float32)
    for name in ("deadlock", "diverged_barriers", "livelock"):
        assert kernels.fault(name)[0]
        out = np.full_like(x, np.nan)
        assert kernels.run("reverse", x, out, 1, 96) is None
        np.testing.assert_array_equal(out, x[::-1])


def test_last_error(plain):
    plain.control.clear_last_error()
    assert plain.control.last_error() == ""
    message, _ = plain.fault("traps")
    assert plain.control.last_error() == message


def test_options_are_checked(plain):
    for bad in ({"order": "sideways"}, {"async_mode": "never"}, {"resident": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            plain.control.set_options(**bad)
    with pytest.raises(TypeError, match="colour"):
        plain.control.set_options(colour=1)
    plain.control.set_options(**plain.control.options())


# Faults that only the order of events can show: which schedules must see a wrong value in the plain build. The barrier
# missing before reuse passes under the order a simple emulator would use, which is why there are others.
@pytest.mark.parametrize(
    ("kernel", "expected", "orders"),
    [
        ("read_after_write", np.arange(64)[::-1], {"forward", "reverse", "random", "priority"}),
        ("write_after_read", np.arange(64)[::-1] + 1, {"forward", "reverse", "random", "priority"}),
        ("missing_copy_wait", np.arange(0, 256, 4), {"forward", "reverse"}),
    ],
)
def test_schedules_show_wrong_values(plain, kernel, expected, orders):
    wrong = set()
    for schedule in plain.control.schedules(6):
        plain.control.set_options(**schedule)
        message, out = plain.fault(kernel)
        assert message is None
        result = out[1024:1088] if kernel == "missing_copy_wait" else out[:64]
        if not np.array_equal(result, expected):
            wrong.add(schedule["order"])
    assert orders <= wrong
