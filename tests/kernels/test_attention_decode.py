"""The decoding kernels, called as raw ops: every instance and code path, parts, schedules, counted bytes.

On the CPU these are the emulated kernels, on a GPU the compiled ones.  The public op has tests of its own.
"""

from __future__ import annotations

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.attention_decode import _cuda, _torch
from tests import numerics
from tests.conftest import pick
from tests.numerics import uninitialised_memory_is_nan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("query", "key_cache", "value_cache", "key", "value", "cache_seqlens", "cache_starts", "alibi_slopes")
OPTIONS = dict(window_left=-1, window_right=0, softcap=0.0, scale=0.2, splits=0)


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU small enough that a few blocks keep it busy: 2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=2, blocks_per_multiprocessor=2)
    yield
    emulator.set_options(**options)


def arguments(dims, dtype, device, lengths=(150, 0), capacity=170, heads=(4, 2), queries=1, new=1, **options):
    """The raw op's arguments by name; rows of the caches that hold nothing are 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch = len(lengths)
    given = dict.fromkeys(NAMES) | OPTIONS
    given |= {"query": normal(batch, heads[0], queries, dims[0])}
    for name, dim in zip(("key", "value"), dims, strict=True):
        given[f"{name}_cache"] = normal(batch, heads[1], capacity, dim)
        for b, length in enumerate(lengths):
            given[f"{name}_cache"][b, :, length:] = 0
        given[name] = normal(batch, heads[1], new, dim) if new else None
    given |= {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)} | options
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def copied(given, dtype=None):
    """Arguments of their own, floating-point tensors in ``dtype``."""
    found = dict(given)
    for name, x in given.items():
        if isinstance(x, torch.Tensor):
            found[name] = x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()
    return found


def check(given):
    """Output and lse by the error rule of tests/numerics.py, caches to the bit."""
    assert _cuda.unsupported(*given.values()) is None
    its, truth = copied(given), copied(given, torch.float64)
    expected = _torch.forward(**its), _torch.forward(**truth)
    with uninitialised_memory_is_nan():
        found = _cuda.forward(**given)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(given[name], its[name])
    numerics.assert_close("output", found[0], expected[0][0], expected[1][0])
    seen = expected[1][1] > -torch.inf
    assert torch.equal(seen, found[1] > -torch.inf)
    numerics.assert_close("lse", found[1][seen], expected[0][1][seen], expected[1][1][seen])


FEATURES = dict(softcap=3.0, alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 1.0]), window_left=90)


@pytest.mark.parametrize("dtype", pick([F32, BF16, F16], [F32, BF16]), ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("splits", [0, 1])
def test_every_instance(dtype, dims, splits, device):
    """Two tiles of queries, the second one ragged; many tiles of keys to each warp."""
    check(arguments(dims, dtype, device, queries=11, new=11, splits=splits, **FEATURES))


@pytest.mark.parametrize("length", pick(range(130), [0, 15, 16, 63, 64, 65, 127, 128]))
@pytest.mark.parametrize("splits", [1, 2])
def test_ends_of_tiles_and_parts(length, splits, device):
    """A part is a multiple of 64 keys here, a warp's tile 16."""
    check(arguments((64, 64), BF16, device, (length,), 140, (1, 1), splits=splits))


@pytest.mark.parametrize("left", pick(range(1, 70), [1, 15, 16, 17, 64]))
def test_a_window_starts_anywhere(left, device):
    check(arguments((64, 40), BF16, device, (150,), heads=(2, 1), queries=3, new=3, window_left=left, splits=2))


def test_rows_that_cannot_move_in_vectors(device):
    for dims in ((33, 65), (7, 8), (8, 7)):
        check(arguments(dims, F32, device, new=3, splits=2))


def test_more_new_rows_than_parts(device):
    check(arguments((64, 64), BF16, device, new=13, queries=13, splits=3))


def test_lengths_out_of_range_stay_within_the_cache(device):
    """What a caller's checks would refuse, where they can look: rows beyond the capacity are dropped."""
    given = arguments((64, 64), F32, device, (0, 0, 0), queries=2, new=2, heads=(2, 2))
    given["cache_seqlens"] = torch.tensor([169, 2**31 - 1, -5], dtype=torch.int32, device=device)
    given["cache_starts"] = torch.tensor([-3, 5, 2**40], device=device)
    before = copied(given)
    _cuda.forward(**given)
    for name in ("key", "value"):
        cache, old, new = given[f"{name}_cache"], before[f"{name}_cache"], given[name]
        assert torch.equal(cache[0, :, 169], new[0, :, 0]) and torch.equal(cache[0, :, :169], old[0, :, :169])
        assert torch.equal(cache[1], old[1])
        assert torch.equal(cache[2, :, :2], new[2]) and torch.equal(cache[2, :, 2:], old[2, :, 2:])


def test_equal_inputs_give_equal_bits(device, request):
    """Under any schedule of the threads."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    first = None
    for schedule in emulator.schedules(seeds=1) if emulator else [{}] * 4:
        if emulator:
            emulator.set_options(**schedule)
        given = arguments((64, 64), BF16, device, splits=3)
        results = (*_cuda.forward(**given), given["key_cache"], given["value_cache"])
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("dims, dtype", [((20, 24), F32), ((128, 100), BF16), ((256, 256), F32)], ids=str)
def test_small(dims, dtype, device):
    """Small enough for the race checker and AddressSanitizer: several tiles a warp, two parts, the append beside."""
    check(arguments(dims, dtype, device, (120, 3), 130, (2, 1), queries=2, new=2, splits=2))


@pytest.mark.sanitized
def test_small_features(device):
    check(arguments((33, 16), F16, device, (140,), 150, (4, 1), queries=5, new=3, splits=1, **FEATURES))


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_counted_bytes(dtype, emulator, pytestconfig):
    """The race build counts every byte: the rows in use are read once for all the queries that share them."""
    if pytestconfig.getoption("--emulated-build") != "race":
        pytest.skip("only the race build counts bytes exactly")
    given = arguments((128, 128), dtype, "cpu", (250, 130), 300, (8, 1), queries=2, new=2, splits=1)
    emulator.reset_counters()
    output, lse = _cuda.forward(**given)
    counted = emulator.counters()
    row = 128 * dtype.itemsize
    rows, new = 252 + 132, 4
    # The queries, and new rows a second time for the append.
    assert counted["global_load_bytes"] <= (2 * (rows + new) * row + output.nbytes) * 1.05
    assert counted["global_store_bytes"] <= (2 * new * row + output.nbytes + lse.nbytes) * 1.05


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_shared_memory_without_bank_conflicts(dim, emulator):
    """Copies of tiles, ldmatrix; in the race build, every other access too."""
    given = arguments((dim, dim), BF16, "cpu", (100,), heads=(4, 1), splits=1)
    emulator.set_options(bank_conflicts=True)
    emulator.reset_counters()
    _cuda.forward(**given)
    counted = emulator.counters()
    emulator.set_options(bank_conflicts=False)
    assert counted["shared_load_wavefronts"] > 0 and counted["shared_store_wavefronts"] > 0
    assert counted["bank_conflict_places"] == []


def test_refusals_name_the_argument(device):
    """Raw ops check what keeps a kernel inside its tensors."""
    good = arguments((16, 16), F32, device)
    bad = {
        "query": (torch.ones(5, 8, device=device), "expected four dimensions"),
        "key_cache": (torch.ones(2, 2, 170, 9, device=device), r"key_cache .* expected Float \[2, 2, 170, 16\]"),
        "value_cache": (torch.ones(2, 2, 169, 16, device=device), r"value_cache .* expected Float \[2, 2, 170, 16\]"),
        "key": (torch.ones(2, 2, 1, 15, device=device), r"key .* expected Float \[2, 2, 1, 16\]"),
        "value": (torch.ones(2, 2, 2, 16, device=device), r"value .* expected Float \[2, 2, 1, 16\]"),
        "cache_seqlens": (torch.ones(2, device=device), r"cache_seqlens .* expected a contiguous Int or Long \[2\]"),
        "cache_starts": (torch.ones(1, dtype=torch.int64, device=device), "cache_starts"),
        "alibi_slopes": (torch.ones(3, device=device), "alibi_slopes .*"),
        "splits": (-1, "splits is -1"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(RuntimeError, match=message):
            _cuda.forward(**{**good, name: value})
    with pytest.raises(RuntimeError, match="cache_seqlens is missing"):
        _cuda.forward(**{**good, "cache_seqlens": None})
    with pytest.raises(RuntimeError, match="inner stride 2"):
        _cuda.forward(**{**good, "query": torch.ones(2, 4, 1, 32, device=device)[..., ::2]})
