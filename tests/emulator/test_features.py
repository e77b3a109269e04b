"""Each feature of the emulated device, used rightly, under every schedule and in both builds."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.emulated


def each_schedule(kernels, seeds: int = 2):
    """Runs the loop's body under every schedule, with asynchronous work done at issue, at the wait and at random."""
    for schedule in kernels.control.schedules(seeds):
        for async_mode in ("drawn", "issue", "wait"):
            kernels.control.set_options(**schedule, async_mode=async_mode)
            yield schedule


def test_indices(kernels):
    out = np.full(12 * 24, -1, np.int32)
    assert kernels.run("indices", out) is None
    blocks, threads = np.divmod(np.arange(12 * 24), 24)
    np.testing.assert_array_equal(out, blocks * 10000 + threads)


def test_shared_memory_and_block_barrier(kernels):
    x = np.arange(5 * 96, dtype=np.float32)
    for _ in each_schedule(kernels):
        out = np.full_like(x, np.nan)
        assert kernels.run("reverse", x, out, 5, 96) is None
        np.testing.assert_array_equal(out, x.reshape(5, 96)[:, ::-1].ravel())


def test_warp_collectives(kernels):
    t = np.arange(64)
    lane, warp = t % 32, t // 32
    expected = np.stack(
        [
            warp * 32 + 5,
            t ^ 3,
            np.where(lane % 16 + 4 < 16, t + 4, t),
            np.where(lane % 8 >= 2, t - 2, t),
            np.full(64, np.uint32(sum(1 << i for i in range(0, 32, 3))).astype(np.int32)),
            warp == 1,
            warp == 1,
            warp * 1024 + 496,
            np.uint32(0xFF) << (lane // 8 * 8).astype(np.uint32),
            warp * 32 + np.where(lane < 16, 1, 17),
            np.maximum.reduceat(t ^ 21, [0, 32])[warp],
            np.full(64, -1),
        ],
        axis=1,
    ).astype(np.int64)
    for _ in each_schedule(kernels):
        out = np.full((64, 12), -1, np.int32)
        assert kernels.run("warp", out) is None
        np.testing.assert_array_equal(out.astype(np.int64) & 0xFFFFFFFF, expected & 0xFFFFFFFF)


def test_atomics(kernels):
    for _ in each_schedule(kernels):
        ints = np.zeros(5, np.int32)
        floats, doubles = np.zeros(1, np.float32), np.zeros(1, np.float64)
        unsigneds = np.zeros(2, np.uint32)
        assert kernels.run("atomics", ints, floats, doubles, unsigneds) is None
        np.testing.assert_array_equal(ints, [191 * 192 // 2, 191, -191, 77, 2 * 192])
        assert floats[0] == 96 and doubles[0] == 48
        np.testing.assert_array_equal(unsigneds, [0xFFFFFFFF, 192 % 7])


def test_named_barriers(kernels):
    expected = np.concatenate([step * 1000 + np.arange(64)[::-1] for step in range(3)])
    for _ in each_schedule(kernels):
        out = np.full(192, -1, np.int32)
        assert kernels.run("named_barrier", out) is None
        np.testing.assert_array_equal(out, expected)


def test_grid_barrier(kernels):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((6, 32)).astype(np.float32)
    expected = start
    for _ in range(4):
        expected = expected + np.roll(np.roll(expected, -1, axis=0), -1, axis=1)
    for _ in each_schedule(kernels, 1):
        values, other, counter = start.copy(), np.full_like(start, np.nan), np.zeros(1, np.uint32)
        assert kernels.run("ring", values, other, counter, 6, 4) is None
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("kernel", ["last_block", "all_fence"])
def test_last_block_reduction(kernels, kernel):
    x = np.arange(7 * 128, dtype=np.float32)
    for _ in each_schedule(kernels):
        out, counter = np.zeros(1, np.float32), np.zeros(1, np.uint32)
        if kernel == "last_block":
            partial = np.full(7, np.nan, np.float32)
            assert kernels.run(kernel, x, partial, out, counter, 7) is None
            assert out[0] == x.sum()
        else:
            partial = np.full(7 * 64, np.nan, np.float32)
            assert kernels.run(kernel, partial, out, counter, 7) is None
            assert out[0] == 7 * 63 * 64 / 2


def test_acquire_and_release(kernels):
    for _ in each_schedule(kernels):
        values, flags = np.zeros(8, np.int32), np.zeros(8, np.uint32)
        assert kernels.run("chain", values, flags, 8) is None
        np.testing.assert_array_equal(values, np.cumsum(np.arange(1, 9)))


@pytest.mark.parametrize("missing", [0, 5])
def test_async_copies(kernels, missing):
    threads, steps = 32, 5
    x = np.arange(threads * steps * 4, dtype=np.float32)
    filled = x.copy()
    filled[len(x) - 4 * missing :] = 0
    for _ in each_schedule(kernels):
        out = np.full_like(x, np.nan)
        assert kernels.run("copy_async", x, out, threads, steps, missing) is None
        np.testing.assert_array_equal(out, filled.reshape(steps, -1)[:, ::-1].ravel())


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_multiplication_of_16_bit_fragments(kernels, dtype):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    if dtype == "f16":
        stored = [m.astype(np.float16) for m in (a, b)]
        rounded = [m.astype(np.float64) for m in stored]
    else:
        stored = [(m.view(np.uint32) >> 16).astype(np.uint16) for m in (a, b)]
        rounded = [(m.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for m in stored]
    out = np.full((16, 8), np.nan, np.float32)
    assert kernels.run(f"multiply_{dtype}", *stored, out) is None
    np.testing.assert_allclose(out, rounded[0] @ rounded[1], rtol=0, atol=1e-5)


def test_multiplication_in_tf32(kernels):
    """The hardware drops the low 13 bits of what it is given; to_tf32 rounds them first."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    for rounds in (False, True):
        carry = np.uint32(0x1000 if rounds else 0)
        left, right = (((m.view(np.uint32) + carry) & np.uint32(0xFFFFE000)).view(np.float32) for m in (a, b))
        out = d.copy()
        assert kernels.run("multiply_tf32", a, b, out, rounds) is None
        np.testing.assert_allclose(out, d + left.astype(np.float64) @ right, rtol=0, atol=1e-5)
        assert not np.allclose(out, d + a.astype(np.float64) @ b, rtol=0, atol=1e-5)


def test_tile_moves(kernels):
    x = np.arange(256, dtype=np.uint16)
    out, transposed = np.zeros_like(x), np.zeros_like(x)
    assert kernels.run("tiles", x, out, transposed) is None
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(transposed.reshape(4, 8, 8), x.reshape(4, 8, 8).transpose(0, 2, 1))


def test_shared_memory_starts_as_nan(plain):
    out = np.zeros(24, np.float32)
    assert plain.run("shared_fill", out, 20) is None
    assert np.isnan(out).all()


def test_intrinsics(plain):
    x = np.array([0.7, 1.3, np.nan, -2.0, 5.0], np.float32)
    out, bits = np.zeros(6, np.float32), np.zeros(7, np.uint32)
    assert plain.run("intrinsics", x, out, bits) is None
    np.testing.assert_allclose(out[:2], [0.7**-0.5, np.exp(np.float32(1.3))], rtol=1e-6)
    np.testing.assert_array_equal(out[2:4], [1.5, -2.0])
    assert np.isnan(out[4]) and out[5] == 3.0
    expected = [0xDEADBEEF * 0x12345678 >> 32, 0x48000000, 15, 0x05040102, 0x00000038, 7, 0x3F800000]
    np.testing.assert_array_equal(bits, np.array(expected, np.uint32))


def test_row_norm(kernels):
    """The kernel whose time is the emulator's benchmark."""
    x = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32) + 2
    y = np.full_like(x, np.nan)
    assert kernels.run("row_norm", x, y, *x.shape) is None
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_same_schedule_same_bits(plain):
    """A failing seed must fail again: the order of the atomics repeats."""

    def total(order, seed):
        plain.control.set_options(order=order, seed=seed, workers=1)
        ints, unsigneds = np.zeros(5, np.int32), np.zeros(2, np.uint32)
        floats = np.full(1, 1e7, np.float32)
        assert plain.run("atomics", ints, floats, np.zeros(1), unsigneds) is None
        return floats[0], ints[3]

    for order in ("random", "priority"):
        assert total(order, 5) == total(order, 5)


def test_traffic_is_counted_exactly(race):
    threads = 64
    x = np.ones(5 * threads, np.float32)
    small = np.zeros(threads, np.uint16)
    out, small_out = np.zeros_like(x), np.zeros_like(small)
    race.control.reset_counters()
    assert race.run("traffic", x, out, small, small_out, threads) is None
    counters = race.control.counters()
    assert counters["launches"] == 1
    assert counters["global_load_bytes"] == threads * (16 + 4 + 2)
    assert counters["global_store_bytes"] == threads * (16 + 4 + 2)
    assert counters["global_accesses_16"] == threads * 2
    assert counters["global_accesses"] == threads * 6
    assert counters["shared_load_bytes"] == counters["shared_store_bytes"] == 0


def test_row_norm_traffic(race):
    x = np.ones((8, 1024), np.float32)
    race.control.reset_counters()
    assert race.run("row_norm", x, np.empty_like(x), *x.shape) is None
    counters = race.control.counters()
    assert counters["global_load_bytes"] == 2 * x.nbytes
    assert counters["global_store_bytes"] == x.nbytes
    assert counters["global_accesses"] == counters["global_accesses_16"]
