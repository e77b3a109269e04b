"""Attention's forward kernel of Hopper GPUs, called as a raw op: every instance and feature, what the launcher sends
it, the products and bytes that the model in its header counts.

On the CPU the emulated GPU says that it is one (compute capability 90); other GPUs skip these tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import bigkern
from bigkern.ops import _extension
from bigkern.ops.attention import _cuda
from tests import numerics
from tests.conftest import pick
from tests.kernels.test_attention import FEATURES, OPTIONS, RawCase, arguments
from tests.kernels.test_attention import check as check_both
from tests.ops.attention_cases import Case, pairwise

BF16, F16 = torch.bfloat16, torch.float16

# Keys a tile and warpgroups of 64 queries: hopper_forward_tiling of csrc/kernels/attention_hopper_forward.cuh.
TILING = {
    (64, True): (128, 3),
    (128, True): (128, 2),
    (192, True): (96, 2),
    (256, True): (80, 2),
    (64, False): (64, 2),
    (128, False): (64, 2),
    (192, False): (64, 2),
    (256, False): (48, 2),
}


class Hopper:
    """The GPU under test: what it did since the last question, where it can be asked."""

    def __init__(self, emulator):
        self.emulator = emulator

    def set(self, **options):
        if self.emulator:
            self.emulator.set_options(**options)

    def counted(self) -> tuple[int, int]:
        """Products of warpgroups, and bytes that TMA loaded."""
        counters = self.emulator.counters()
        self.emulator.reset_counters()
        return counters["wgmmas"], counters["tma_load_bytes"]

    def forward(self, tensors, options, *, taken=True):
        """The op's results; the kernel was taken, or not."""
        if self.emulator:
            self.emulator.reset_counters()
        with numerics.uninitialised_memory_is_nan():
            results = _cuda.forward(*tensors, *options)
        if self.emulator:
            assert (self.emulator.counters()["wgmmas"] > 0) == taken
        return results


@pytest.fixture
def hopper(device, request):
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")
        yield Hopper(None)
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(compute_capability=90, multiprocessors=2, blocks_per_multiprocessor=1)
    yield Hopper(emulator)
    emulator.set_options(**options)


def check(hopper, tensors, options, *, taken=True):
    """The results by the error rule of tests/numerics.py."""
    case = RawCase(tensors, dict(zip(OPTIONS, options, strict=True)))
    mask = options[0]
    inputs = [*tensors, *([mask] if mask is not None and mask.dtype != torch.bool else [])]
    numerics.check(
        lambda query, key, value, bias=None: hopper.forward([query, key, value], options, taken=taken),
        case.reference,
        inputs,
    )


def slopes(heads):
    """ALiBi's, as the reference takes them."""
    return 2.0 ** -torch.arange(1.0, heads + 1)


def together(heads, queries, rows):
    """Heads that share tiles, and their places there: tile_heads of csrc/kernels/attention_hopper.h."""
    group = heads[0] // heads[1]
    places = 1 << (group - 1).bit_length()
    tiles = [math.ceil(queries * n / rows) for n in (places, 1)]
    return (group, places) if 1 < places <= 64 and 10 * tiles[0] <= 9 * group * tiles[1] else (1, 1)


def model(heads, lengths, tiling, left=-1, right=-1, shift=0, dim=64):
    """Products of warpgroups, and bytes loaded, as the launcher's window asks."""
    (seqlen_q, seqlen_k), (keys, warpgroups) = lengths, tiling
    rows = 64 * warpgroups
    group, places = together(heads, seqlen_q, rows)
    products = loaded = 0
    for first in range(0, seqlen_q * places, rows):
        last = min(first + rows, seqlen_q * places) - 1
        start = 0 if left < 0 else max(0, first // places + shift - left)
        end = seqlen_k if right < 0 else max(0, min(seqlen_k, last // places + shift + right + 1))
        if end > start:
            met = math.ceil(end / keys) - start // keys
            products += met * warpgroups * (dim // 16 + keys // 16)
            loaded += (2 * met * keys + rows) * dim * 2
    return products * heads[0] // group, loaded * heads[0] // group


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_every_instance(dtype, dim, features, device, hopper):
    """Two tiles of queries, several of keys, both ragged."""
    lengths = (200, 270) if dtype == BF16 else (140, 100)
    check(hopper, *arguments(lengths, (dim, dim), dtype, device, (2, 1), **(FEATURES if features else {})))


def _served(case: Case) -> Case:
    """The case with sizes that the kernel takes."""
    longer = {(33, 70): (70, 133), (1, 1): (65, 1), (7, 7): (135, 135), (16, 72): (80, 200), (1, 200): (100, 300)}
    return dataclasses.replace(
        case,
        dtype=BF16 if case.dtype == torch.float32 else case.dtype,
        head_dim=40 if case.head_dim == 33 else case.head_dim,
        value_dim=72 if case.value_dim == 65 else case.value_dim,
        lengths=longer.get(case.lengths, (case.lengths[0] + 32, case.lengths[1])),
        layout={"odd": "transposed", "inner": "joined"}.get(case.layout, case.layout),
        lse=True,
    )


@pytest.mark.parametrize("case", [_served(case) for case in pick(pairwise(300), pairwise(1)[2::6])], ids=str)
def test_features_crossed(case, device, hopper):
    """Through the public op, as in tests/ops, without gradients."""
    inputs = [x.detach() for x in case.inputs(device)]

    def kernel(*tensors):
        if hopper.emulator:
            hopper.emulator.reset_counters()
        with bigkern.use_backend("cuda"):
            results = case.kernel(*tensors)
        assert not hopper.emulator or hopper.counted()[0] > 0
        return results

    numerics.check(kernel, case.reference, inputs)


@pytest.mark.parametrize("dims", [(8, 8), (72, 16), (16, 136), (200, 256)], ids=str)
def test_dims_that_are_padded(dims, device, hopper):
    check(hopper, *arguments((70, 90), dims, F16, device))


@pytest.mark.parametrize(
    "lengths", pick([(65, 1), (65, 129), (128, 128), (193, 70), (300, 200), (500, 500)], [(65, 1), (300, 200)]), ids=str
)
@pytest.mark.parametrize("window", [(-1, 0), (70, 30), (0, 0), (-1, -1), (200, -1)], ids=str)
@pytest.mark.parametrize("bottom_right", [False, True])
def test_windows(lengths, window, bottom_right, device, hopper):
    """Right, and tiles that a window hides are neither loaded nor multiplied: products and bytes are the model's."""
    left, right = window
    tensors, options = arguments(
        lengths, (64, 64), BF16, device, (2, 1), window_left=left, window_right=right, bottom_right=bottom_right
    )
    shift = lengths[1] - lengths[0] if bottom_right else 0
    wanted = model((2, 1), lengths, TILING[64, True], left, right, shift)
    check(hopper, tensors, options, taken=wanted[0] > 0)
    assert not hopper.emulator or hopper.counted() == wanted


@pytest.mark.emulated
@pytest.mark.parametrize(("dim", "plain"), TILING)
def test_products_and_bytes_are_the_models(dim, plain, hopper):
    tensors, options = arguments((150, 150), (dim, dim), BF16, "cpu", softcap=0.0 if plain else 5.0)
    hopper.forward(tensors, options)
    assert hopper.counted() == model((1, 1), (150, 150), TILING[dim, plain], dim=dim)


# Heads, key heads, queries: groups that fill their places and others, one tile and several.
SHARED = [
    (8, 1, 9),
    (3, 1, 30),
    (6, 2, 33),
    (5, 1, 100),
    (64, 1, 2),
    (48, 1, 12),
    (16, 1, 100),
    (12, 4, 70),
    (2, 1, 64),
]


@pytest.mark.parametrize("sizes", pick(SHARED, [SHARED[2], SHARED[4]]), ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_heads_share_tiles(sizes, features, device, hopper):
    """Where that makes fewer tiles: keys and values are loaded once for all the heads of a tile."""
    heads, kv_heads, queries = sizes
    given = dict(window_left=60, window_right=0, bottom_right=True)
    if features:
        given = FEATURES | dict(alibi_slopes=slopes(heads))
    tensors, options = arguments((queries, 150), (64, 64), BF16, device, (heads, kv_heads), 2, **given)
    check(hopper, tensors, options)
    if hopper.emulator:
        window = () if features else (60, 0, 150 - queries)
        wanted = model((heads, kv_heads), (queries, 150), TILING[64, not features], *window)
        assert hopper.counted() == tuple(2 * n for n in wanted)


@pytest.mark.parametrize(
    ("heads", "dim", "plain"), pick(itertools.product([(8, 2), (7, 1)], [64, 128, 256], [True, False]),
                                    [((8, 2), 64, True), ((7, 1), 256, False)]), ids=str
)  # fmt: skip
def test_shared_tiles_change_no_bit(heads, dim, plain, device, hopper):
    """Beside keys and values of their own for every head, dropout's bits among them."""
    given = dict(window_left=100, window_right=3)
    if not plain:
        mask = torch.randn(1, heads[0], 70, 150, generator=torch.Generator().manual_seed(1)).to(BF16)
        given |= FEATURES | dict(attn_mask=mask, alibi_slopes=slopes(heads[0]))
    (query, *others), options = arguments((70, 150), (dim, dim), BF16, device, heads, **given)
    own = [x.repeat_interleave(heads[0] // heads[1], 1) for x in others]
    expected = hopper.forward([query, *own], options)
    before = hopper.counted() if hopper.emulator else None
    found = hopper.forward([query, *others], options)
    assert all(map(torch.equal, found, expected))
    assert not hopper.emulator or hopper.counted()[1] < 0.9 * before[1]


def packed(device, dim=64, heads=(2, 2), **options):
    """Three sequences of queries and keys beside an empty one of each; the lengths; and the op's arguments."""
    lengths = [(70, 130), (0, 5), (200, 256), (90, 0), (65, 200)]
    total = [sum(n) for n in zip(*lengths, strict=True)]
    tensors, given = arguments(total, (dim, dim), BF16, device, heads, **options)
    starts = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in zip(*lengths, strict=True)]
    given[2:6] = (*starts, 200, 256)
    return lengths, tensors, given


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("options", [{}, {"window_right": 0, "bottom_right": True}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("heads", pick([(2, 2), (3, 1), (8, 2)], [(2, 2), (4, 1)]), ids=str)
def test_packed_sequences(dim, options, heads, device, hopper):
    """Each as by itself, to the bit, whatever stands beside it; rows of none are not written."""
    lengths, tensors, given = packed(device, dim, heads, **options)
    output, lse = hopper.forward(tensors, given)
    start_q = start_k = 0
    for q, k in lengths:
        own = [x[:, :, a : a + n] for x, a, n in zip(tensors, (start_q, start_k, start_k), (q, k, k), strict=True)]
        if q and k:
            alone = [None, None, None, None, q, k, *given[6:]]
            expected = hopper.forward(own, alone)
            assert torch.equal(output[:, :, start_q : start_q + q], expected[0])
            assert torch.equal(lse[:, :, start_q : start_q + q], expected[1])
        elif q:
            assert not output[:, :, start_q : start_q + q].any()
            assert (lse[:, :, start_q : start_q + q] == -torch.inf).all()
        start_q, start_k = start_q + q, start_k + k


@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=str)
def test_a_packed_sequence_of_nan_stays_alone(heads, device, hopper):
    """Its keys and values lie in the same tiles as the end of the sequence before."""
    lengths, tensors, given = packed(device, heads=heads)
    clean, _ = hopper.forward(tensors, given)
    bad = slice(lengths[0][1] + lengths[1][1], lengths[0][1] + lengths[1][1] + lengths[2][1])
    tensors[1][:, :, bad], tensors[2][:, :, bad] = torch.nan, torch.nan
    output, _ = hopper.forward(tensors, given)
    own = slice(70, 270)
    assert output[:, :, own].isnan().all()
    output[:, :, own] = clean[:, :, own]
    assert torch.equal(output, clean)


def test_dropout_draws_the_same_bits_as_the_other_kernel(device, hopper):
    """Values of the unit matrix bring out the weights, of which some are dropped: seqlen_k a multiple of 4 or not."""
    for keys in (128, 126):
        dropout = {name: FEATURES[name] for name in ("dropout_p", "philox")}
        tensors, options = arguments((150, keys), (64, 128), BF16, device, (2, 1), 2, **dropout)
        tensors[2].copy_(torch.eye(keys, 128))
        output, _ = hopper.forward(tensors, options)
        if hopper.emulator:
            hopper.set(compute_capability=80)
            other, _ = hopper.forward(tensors, options, taken=False)
        else:
            other, _ = RawCase(tensors, dict(zip(OPTIONS, options, strict=True))).reference(*tensors)
        hopper.set(compute_capability=90)
        dropped = output[..., :keys] == 0
        assert 0.2 < dropped.float().mean() < 0.3
        assert torch.equal(dropped, other[..., :keys] == 0)


@pytest.mark.emulated
def test_older_kernels_can_be_asked_for(device, hopper, monkeypatch):
    """BIGKERN_MAX_CAPABILITY, as the launchers of every op read it."""
    tensors, options = arguments((150, 70), (64, 64), BF16, device)
    for most, taken in (("80", False), ("90", True), ("", True), ("120", True)):
        monkeypatch.setenv("BIGKERN_MAX_CAPABILITY", most)
        hopper.forward(tensors, options, taken=taken)


def test_rows_without_keys(device, hopper):
    """By the window, and by a mask: output 0, lse minus infinity, though key and value be NaN there."""
    tensors, options = arguments((200, 70), (64, 64), BF16, device, window_right=0, bottom_right=True)
    output, lse = hopper.forward(tensors, options)
    assert not output[:, :, :130].any() and (lse[:, :, :130] == -torch.inf).all() and lse[:, :, 130:].isfinite().all()
    mask = torch.ones(1, 1, 200, 70, dtype=torch.bool, device=device)
    mask[:, :, 5:190] = False
    tensors, options = arguments((200, 70), (64, 64), BF16, device, attn_mask=mask)
    check(hopper, tensors, options)
    output, lse = hopper.forward(tensors, options)
    assert not output[:, :, 5:190].any() and (lse[:, :, 5:190] == -torch.inf).all()


def test_hidden_tiles_are_skipped(device, hopper):
    """NaN in keys that a window hides from a whole tile of queries is never multiplied."""
    tensors, options = arguments((384, 384), (64, 64), BF16, device, window_left=10, window_right=0)
    clean, _ = hopper.forward(tensors, options)
    tensors[1][:, :, 256:], tensors[2][:, :, 256:] = torch.nan, torch.nan
    output, _ = hopper.forward(tensors, options)
    assert torch.equal(output[:, :, :192], clean[:, :, :192]) and output[:, :, 256:].isnan().any()


def test_nan_stays_in_its_row(device, hopper):
    tensors, options = arguments((130, 200), (128, 128), BF16, device)
    clean, _ = hopper.forward(tensors, options)
    tensors[0][:, :, 77] = torch.nan
    output, lse = hopper.forward(tensors, options)
    assert output[:, :, 77].isnan().all() and lse[:, :, 77].isnan().all()
    output[:, :, 77] = clean[:, :, 77]
    assert torch.equal(output, clean)


def test_nan_in_a_key_reaches_every_query(device, hopper):
    """Whichever unit makes its exponential, and though its weight is the only one that is none."""
    tensors, options = arguments((130, 100), (64, 64), BF16, device, batch=8)
    for place in range(8):
        tensors[1][place, :, 16 + place] = torch.nan
    output, lse = hopper.forward(tensors, options)
    assert output.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 0.0, -0.3, 30.0])
def test_scales(scale, device, hopper):
    check(hopper, *arguments((70, 140), (64, 64), F16, device, scale=scale))


def test_more_heads_than_the_cache_holds(device, hopper):
    """Sections of heads, and more tiles than blocks: every tile once."""
    hopper.set(multiprocessors=3)
    check(hopper, *arguments((260, 100), (64, 64), BF16, device, (6, 3), 2, window_right=0))


def test_its_lse_serves_the_backward_pass(device, hopper):
    tensors, options = arguments((130, 150), (64, 64), BF16, device, (2, 1), window_right=0, **FEATURES)
    check_both(tensors, options)


class TestOtherKernel:
    """What goes to the kernel of all architectures instead, with the right result."""

    @pytest.mark.parametrize("sizes", [(1, 64), (4, 16), (66, 64)], ids=str)
    def test_few_queries(self, sizes, device, hopper):
        """At most 64 rows, also of heads that share tiles; more than 64 heads of a key head do not."""
        heads, queries = sizes
        check(hopper, *arguments((queries, 20), (64, 64), BF16, device, (heads, 1)), taken=False)

    def test_long_keys_for_few_blocks(self, device, hopper):
        hopper.set(multiprocessors=8)
        check(hopper, *arguments((66, 2048), (16, 16), BF16, device), taken=False)

    def test_float32(self, device, hopper):
        check(hopper, *arguments((70, 90), (16, 16), torch.float32, device), taken=False)

    @pytest.mark.parametrize("dims", [(20, 64), (64, 20)], ids=str)
    def test_rows_that_tma_cannot_reach(self, dims, device, hopper):
        check(hopper, *arguments((70, 90), dims, BF16, device), taken=False)

    def test_misaligned(self, device, hopper):
        tensors, options = arguments((70, 90), (64, 64), BF16, device)
        odd = torch.empty(tensors[1].numel() + 1, dtype=BF16, device=device)[1:].view(tensors[1].shape)
        check(hopper, [tensors[0], odd.copy_(tensors[1]), tensors[2]], options, taken=False)

    def test_expanded(self, device, hopper):
        tensors, options = arguments((70, 90), (64, 64), BF16, device, (2, 2))
        wide = [tensors[0], *(x[:, :1].expand(-1, 2, -1, -1) for x in tensors[1:])]
        check(hopper, wide, options, taken=False)


def test_equal_inputs_give_equal_bits(device, hopper):
    """Under any schedule of the threads."""
    schedules = hopper.emulator.schedules(seeds=2) if hopper.emulator else [{}] * 4
    for dim, queries, heads, features in ((64, 270, 2, {}), (192, 270, 2, FEATURES), (64, 70, 3, {})):
        tensors, options = arguments((queries, 200), (dim, dim), BF16, device, (heads, 1), window_right=0, **features)
        results = None
        for schedule in schedules:
            hopper.set(multiprocessors=1, **schedule)
            found = hopper.forward(tensors, options)
            results = results or found
            assert all(map(torch.equal, found, results))


@pytest.mark.sanitized
@pytest.mark.parametrize(("dim", "features"), [(64, False), (64, True), (256, False)])
def test_small(dim, features, device, hopper):
    """For the race checker and AddressSanitizer: two tiles of queries on one multiprocessor, three of keys."""
    hopper.set(multiprocessors=1)
    keys, warpgroups = TILING[dim, not features]
    lengths, given = (64 * warpgroups + 1, 2 * keys + 1), FEATURES | {"alibi_slopes": FEATURES["alibi_slopes"][:1]}
    check(hopper, *arguments(lengths, (dim, dim), BF16, device, **(given if features else {})))


@pytest.mark.sanitized
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_small_shared_tiles(features, device, hopper):
    """Two tiles of rows, of which every fourth place is empty."""
    hopper.set(multiprocessors=1)
    given = FEATURES | {"alibi_slopes": slopes(3)} if features else {"window_right": 0}
    check(hopper, *arguments((40 if features else 60, 70), (64, 64), BF16, device, (3, 1), **given))


@pytest.mark.sanitized
@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (256, 1), (64, 3)])
def test_small_packed_sequences(dim, heads, device, hopper):
    """Its output in shared memory of its own, or over the queries; a sequence without keys between others."""
    hopper.set(multiprocessors=1)
    _, tensors, given = packed(device, dim, (heads, 1))
    output, lse = hopper.forward(tensors, given)
    assert output.isfinite().all() and not lse.isnan().any()
