"""Attention's backward kernel for Hopper, called as a raw op: features, tails, tiles skipped, schedules.

Emulated as on a GPU of compute capability 9.0.  Every call must issue exactly the warpgroup products that a model of
the tiles counts: so it is known that the kernel ran, and that it left out the tiles that a window hides.
"""

from __future__ import annotations

import pytest
import torch

import bigkern
from bigkern.ops import _extension
from bigkern.ops.attention import _cuda
from tests import numerics
from tests.conftest import pick
from tests.kernels.test_attention import BF16, F16, FEATURES, OPTIONS, arguments, check
from tests.numerics import uninitialised_memory_is_nan
from tests.ops.attention_cases import Case, pairwise

KEYS, QUERIES = 128, 64  # KEYS of up to 128 columns; half of them beyond


@pytest.fixture(autouse=True)
def kernels(device, request, monkeypatch):
    """The kernels on a Hopper GPU, emulated one of 2 multiprocessors; products are counted."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability(device) != (9, 0):
            pytest.skip("needs a Hopper GPU")
        yield
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=2, blocks_per_multiprocessor=1, compute_capability=90)

    def counted(*given, run=_cuda.backward):
        emulator.reset_counters()
        results = run(*given)
        assert emulator.counters()["wgmmas"] == products(*given)
        return results

    monkeypatch.setattr(_cuda, "backward", counted)
    yield
    emulator.set_options(**options)


def reachable(x):
    """By TMA: see can_map in csrc/kernels/attention_hopper.h."""
    outer = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in outer) and x.shape[3] % 8 == 0


def products(grad_output, grad_lse, query, key, value, output, lse, *options):
    """Of all warpgroups: S^T, dP^T, dV, dK and dQ of each tile that holds a query which sees a key, and S^T, beyond 128
    columns dP^T too, once more a tile of keys, which is issued for the queries after the last."""
    given = dict(zip(OPTIONS, options, strict=False))
    if not all(map(reachable, (query, key, value, grad_output))):
        return 0
    panels = -(-max(query.shape[3], value.shape[3]) // 64)
    dim, wide = 64 * panels, panels > 2
    tile_keys = KEYS // 2 if wide else KEYS
    if wide:  # a warpgroup has one of dV and dK; dQ's half of three panels is two products
        step, more = 2 * dim // 16 + QUERIES // 16 + (1 + panels % 2) * tile_keys // 16, 2 * dim // 16
    else:
        step, more = 2 * dim // 16 + 2 * QUERIES // 16 + tile_keys // 16, dim // 16
    sequences = [(query.shape[2], key.shape[2])] * query.shape[0]
    if given["cu_seqlens_q"] is not None:
        sequences = list(zip(given["cu_seqlens_q"].diff().tolist(), given["cu_seqlens_k"].diff().tolist(), strict=True))
    left, right = given["window_left"], given["window_right"]
    total = 0
    for queries, keys in sequences:
        shift = keys - queries if given["bottom_right"] else 0
        for first in range(0, keys, tile_keys):
            last = min(first + tile_keys, keys) - 1
            low = 0 if right < 0 else max(0, first - shift - right)
            high = queries - 1 if left < 0 else min(queries - 1, last - shift + left)
            if low > high:
                continue
            tiles = (high // QUERIES - low // QUERIES + 1) * (query.shape[1] // key.shape[1])
            total += 2 * key.shape[1] * (tiles * step + more)
    return total


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_every_instance(dtype, dim, features, device):
    """Two tiles of keys and three of queries, the last ones ragged, of two heads."""
    keys = 200 if dim <= 128 else 100
    tensors, options = arguments((150, keys), (dim, dim), dtype, device, (2, 1), **(FEATURES if features else {}))
    check(tensors, options, deterministic=dtype == F16)


def served(case: Case) -> bool:
    dims = (case.head_dim, case.value_dim or case.head_dim)
    return (
        case.dtype != torch.float32
        and case.layout not in ("odd", "inner")
        and set(dims) <= {8, 24, 40, 96, 128, 200, 256}
    )


@pytest.mark.parametrize("case", pick(filter(served, pairwise(400)), [*filter(served, pairwise(1))][::2]), ids=str)
def test_features_crossed(case, device):
    """Through the public op: layouts, masks of every shape, windows, heads that share keys, lse."""
    inputs = case.inputs(device)
    with bigkern.use_backend("cuda"):
        numerics.check(case.kernel, case.reference, inputs, names=("query", "key", "value", "attn_mask")[: len(inputs)])


@pytest.mark.parametrize(
    "dims",
    pick(
        [(8, 8), (40, 24), (72, 16), (64, 128), (120, 128), (136, 8), (192, 128), (16, 248)],
        [(40, 24), (72, 16), (192, 128)],
    ),
    ids=str,
)
def test_dims_that_are_padded(dims, device):
    """Heads lie one behind the other: what stands after a row's last column is the next head's."""
    check(*arguments((70, 130), dims, BF16, device, (2, 2), 2))


WINDOW_LENGTHS = [(1, 1), (63, 65), (64, 128), (65, 129), (300, 130), (1, 300)]


@pytest.mark.parametrize(
    ("lengths", "dim"),
    pick(
        [(lengths, dim) for lengths in WINDOW_LENGTHS for dim in (16, 136)],
        [((1, 1), 16), ((65, 129), 16), ((65, 129), 136)],
    ),
    ids=str,
)
@pytest.mark.parametrize("window", [(-1, 0), (5, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("bottom_right", [False, True])
def test_windows(lengths, dim, window, bottom_right, device):
    window = dict(window_left=window[0], window_right=window[1], bottom_right=bottom_right)
    check(*arguments(lengths, (dim, dim), BF16, device, **window))


@pytest.mark.parametrize("window", [(-1, 0), (100, 40)], ids=str)
def test_hidden_tiles_are_skipped(window, device):
    """The fixture counts; here it has five tiles of keys and eleven of queries to leave some out of."""
    window = dict(window_left=window[0], window_right=window[1])
    tensors, options = arguments((700, 600), (8, 8), BF16, device, **window)
    seen = [
        [max(0, i - window["window_left"]) if window["window_left"] >= 0 else 0, i + window["window_right"]]
        for i in range(700)
    ]
    blocks = {(i // QUERIES, j // KEYS) for i, (low, high) in enumerate(seen) for j in range(low, min(599, high) + 1)}
    lse = torch.zeros(1, 1, 700, device=device)
    output = torch.zeros_like(tensors[0])
    given = (output, None, *tensors, output, lse, *options, False, False, False)
    assert products(*given) == 2 * (len(blocks) * (8 + 8 + 8) + 5 * 4) < 2 * (11 * 5 * (8 + 8 + 8) + 5 * 4)
    _cuda.backward(*given)


@pytest.mark.parametrize("shape", pick([(2, 2, 70, 140), (1, 2, 70, 140), (2, 1, 1, 140)], [(2, 1, 70, 140)]), ids=str)
@pytest.mark.parametrize(
    ("dim", "deterministic"),
    pick([(16, False), (16, True), (200, False), (200, True)], [(16, False), (16, True), (200, True)]),
)
def test_gradient_of_a_bias(shape, dim, deterministic, device):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for mask in (bias.to(BF16), bias):
        tensors, options = arguments((70, 140), (dim, dim), BF16, device, (2, 2), 2, attn_mask=mask)
        check(tensors, options, deterministic)


def test_rows_without_keys(device):
    mask = torch.rand(1, 1, 70, 140, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[:, :, ::3] = False
    check(*arguments((70, 140), (16, 16), BF16, device, (4, 2), attn_mask=mask))
    # The first 60 queries stand before the first key.
    check(*arguments((200, 140), (16, 16), BF16, device, window_right=0, bottom_right=True))


@pytest.mark.sanitized
@pytest.mark.parametrize(("dim", "deterministic"), [(16, False), (16, True), (136, True)])
def test_packed_sequences_do_not_meet(dim, deterministic, device):
    """Each has the gradients it has alone, to the bit, whatever stands in the others' rows; two are empty."""
    lengths = [(70, 40), (0, 9), (5, 140), (9, 0), (66, 66)]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int().to(device) for x in zip(*lengths, strict=True))
    tensors, options = arguments((150, 255), (dim, dim), BF16, device, (2, 1), window_right=30)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2)).to(device, BF16)
    packed = [*options]
    packed[2:6] = cu_q, cu_k, 70, 140
    output, lse = _cuda.forward(*tensors, *packed)
    grads = _cuda.backward(grad, None, *tensors, output, lse, *packed, False, False, deterministic)
    for i, (queries, keys) in enumerate(lengths):
        q, k = slice(int(cu_q[i]), int(cu_q[i]) + queries), slice(int(cu_k[i]), int(cu_k[i]) + keys)
        if not queries or not keys:
            assert not grads[0][:, :, q].any() and not grads[1][:, :, k].any() and not grads[2][:, :, k].any()
            continue
        alone = [torch.full_like(x, torch.inf) for x in (*tensors, grad, output)]
        for mine, x, rows in zip(alone, (*tensors, grad, output), (q, k, k, q, q), strict=True):
            mine[:, :, rows] = x[:, :, rows]
        query, key, value, grad_output, my_output = alone
        found = _cuda.backward(
            grad_output, None, query, key, value, my_output, lse, *packed, False, False, deterministic
        )
        for name, got, wanted, rows in zip(("query", "key", "value"), found, grads, (q, k, k), strict=False):
            assert torch.equal(got[:, :, rows], wanted[:, :, rows]), f"gradient of {name} of sequence {i}"


@pytest.mark.parametrize("layout", ["misaligned", "expanded", "odd width"])
def test_what_tma_cannot_reach_takes_the_other_path(layout, device):
    tensors, options = arguments((70, 140), (15 if layout == "odd width" else 16,) * 2, BF16, device, (2, 2))
    if layout == "misaligned":
        storage = torch.empty(tensors[1].numel() + 1, dtype=BF16, device=device)
        tensors[1] = storage[1:].view(tensors[1].shape).copy_(tensors[1])
    if layout == "expanded":
        tensors[1] = tensors[1][:, :1].expand(-1, 2, -1, -1)
    assert not reachable(tensors[1])
    check(tensors, options)


@pytest.mark.parametrize("dim", pick([16, 128, 192, 256], [16, 128, 200]))
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradient_of_slopes(dim, deterministic, device):
    """By the gradient of a bias that is added to the same scores."""
    bias = torch.zeros(1, 2, 150, 200)
    tensors, options = arguments((150, 200), (dim, 16), BF16, device, (2, 1), attn_mask=bias, **FEATURES)
    options[OPTIONS.index("bottom_right")] = True
    output, lse = _cuda.forward(*tensors, *options)
    with uninitialised_memory_is_nan():
        grads = _cuda.backward(output, None, *tensors, output, lse, *options, True, True, deterministic)
    distance = torch.arange(150, device=device)[:, None] + 50 - torch.arange(200, device=device)
    parts = grads[3].double() * distance.abs()
    tolerance = 1e-6 * parts.abs().sum(dim=(0, 2, 3)).max().item()
    torch.testing.assert_close(grads[4].double(), -parts.sum(dim=(0, 2, 3)), atol=tolerance, rtol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("dim", [16, 136])
def test_gradient_of_slopes_of_packed_sequences(dim, device):
    """The same two sequences, packed and not."""
    tensors, options = arguments((70, 70), (dim, dim), BF16, device, (2, 2), 2, alibi_slopes=FEATURES["alibi_slopes"])
    output, lse = _cuda.forward(*tensors, *options)
    wanted = _cuda.backward(output, None, *tensors, output, lse, *options, False, True, True)[4]
    cu = torch.tensor([0, 70, 140], dtype=torch.int32, device=device)
    options[2:6] = cu, cu, 70, 70
    packed = [x.transpose(0, 1).reshape(1, 2, 140, dim) for x in (*tensors, output)]
    lse = lse.transpose(0, 1).reshape(1, 2, 140).contiguous()
    found = _cuda.backward(packed[3], None, *packed, lse, *options, False, True, True)[4]
    assert wanted.all() and torch.equal(found, wanted)


def test_equal_inputs_give_equal_bits(device, request):
    """Under any schedule, in deterministic mode: two blocks share seven tiles of keys, or, of wide heads, five."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    schedules = emulator.schedules(seeds=1) if emulator else [{}] * 4
    mask = torch.randn(1, 1, 70, 800, generator=torch.Generator().manual_seed(1)).bfloat16()
    for dim, keys, features in ((16, 800, {}), (16, 800, FEATURES | {"attn_mask": mask}), (136, 280, {})):
        tensors, options = arguments((70, keys), (dim, dim), BF16, device, (2, 1), **features)
        first = None
        for schedule in schedules:
            if emulator:
                emulator.set_options(**schedule)
            output, lse = _cuda.forward(*tensors, *options) if first is None else first[:2]
            flags = (bool(features), False, True)
            results = (output, lse, *_cuda.backward(output, lse, *tensors, output, lse, *options, *flags))
            first = first or results
            assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("dims", [(24, 40), (128, 104), (136, 200)], ids=str)
def test_small(dims, device):
    """Small enough for the race checker and AddressSanitizer, with two or three tiles of keys and two of queries."""
    tensors, options = arguments((70, 140), dims, BF16, device, window_right=60)
    check(tensors, options)
    check(tensors, options, deterministic=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("dims", [(40, 16), (136, 16)], ids=str)
def test_small_features(dims, device):
    mask = torch.randn(1, 1, 70, 140, generator=torch.Generator().manual_seed(1)).bfloat16()
    check(*arguments((70, 140), dims, BF16, device, (2, 2), attn_mask=mask, **FEATURES))


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_shared_memory_without_bank_conflicts(dim, emulator):
    tensors, options = arguments((64, 128), (dim, dim), BF16, "cpu")
    output, lse = _cuda.forward(*tensors, *options)
    emulator.set_options(bank_conflicts=True)
    _cuda.backward(torch.ones_like(output), None, *tensors, output, lse, *options, False, False, True)
    counted = emulator.counters()
    emulator.set_options(bank_conflicts=False)
    assert counted["shared_store_wavefronts"] > 0
    assert counted["bank_conflict_places"] == []
