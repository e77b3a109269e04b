"""Decoding with a cache on every backend: the error rule, the append, every feature, edge cases, bad input, compile."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import bigkern
from bigkern.ops import attention, attention_decode
from bigkern.ops._triton_support import INTERPRETED
from bigkern.ops.attention_decode import _cuda
from tests import numerics
from tests.conftest import pick

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, KV_HEADS, CAPACITY = 3, 4, 2, 90
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LENGTHS = [70, 0, 84]

# The interpreter takes half a second a step.
FEW = DTYPES[1:2] if INTERPRETED else DTYPES[:2]

dtypes = pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]) if INTERPRETED else DTYPES, ids=str)


class Step:
    """One call's arguments.  Rows of the caches that hold nothing are NaN."""

    def __init__(
        self, device, dtype=torch.float32, dims=(16, 16), queries=1, new=None, lengths=LENGTHS, starts=None, scale=1.0,
        heads=(HEADS, KV_HEADS), capacity=CAPACITY, seed=0, index=torch.int32, **features,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        batch, new = len(lengths), queries if new is None else new
        self.query = normal(batch, heads[0], queries, dims[0])
        self.caches = [normal(batch, heads[1], capacity, dim) for dim in dims]
        for cache in self.caches:
            for b, length in enumerate(lengths):
                cache[b, :, length:] = torch.nan
        self.new = [normal(batch, heads[1], new, dim) for dim in dims] if new else [None, None]
        self.lengths = torch.tensor(lengths, dtype=index, device=device)
        self.starts = None if starts is None else torch.tensor(starts, dtype=index, device=device)
        self.features = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in features.items()}

    def run(self, function=attention_decode, caches=None, **more):
        caches = self.caches if caches is None else caches
        return function(
            self.query, *caches, *self.new, self.lengths, cache_starts=self.starts, enable_gqa=True,
            **self.features, **more,
        )  # fmt: skip

    def appended(self, dtype=None):
        """The caches as they should be afterwards."""
        caches = [cache.clone() for cache in self.caches]
        for cache, new in zip(caches, self.new, strict=True):
            for b, length in enumerate(self.lengths.tolist()):
                if new is not None:
                    cache[b, :, length : length + new.shape[2]] = new[b]
        return [cache if dtype is None else cache.to(dtype) for cache in caches]

    def reference(self, caches, dtype):
        """(output, lse), written out a batch element at a time in ``dtype``; ``caches`` hold the new rows."""
        new = 0 if self.new[0] is None else self.new[0].shape[2]
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        outputs, sums = [], []
        for b, length in enumerate(self.lengths.tolist()):
            end, start = length + new, 0 if self.starts is None else int(self.starts[b])
            start = min(start, end)
            key, value = (cache[b, :, start:end].to(dtype).to(accumulate) for cache in caches)
            query = self.query[b].to(dtype).to(accumulate)
            group = query.shape[0] // key.shape[0]
            key, value = (x.repeat_interleave(group, 0) for x in (key, value))
            distance = torch.arange(start, end, device=key.device) - (
                end - query.shape[1] + torch.arange(query.shape[1], device=key.device).view(-1, 1)
            )
            scores = query @ key.transpose(1, 2) * query.shape[2] ** -0.5
            if softcap := self.features.get("softcap"):
                scores = softcap * torch.tanh(scores / softcap)
            slopes = self.features.get("alibi_slopes")
            if slopes is not None:
                slopes = slopes[b] if slopes.dim() == 2 else slopes
                scores = scores - slopes.to(accumulate).view(-1, 1, 1) * distance.abs()
            left, right = self.features.get("window", (math.inf, math.inf))
            left, right = (math.inf if side == -1 else side for side in (left, right))
            right = 0 if self.features.get("is_causal", True) else right
            scores = scores.masked_fill((distance < -left) | (distance > right), -torch.inf)
            outputs.append((torch.softmax(scores, 2).nan_to_num() @ value).to(dtype))
            sums.append(torch.logsumexp(scores, 2))
        return torch.stack(outputs), torch.stack(sums)


def check(step: Step):
    """The error rule for output and lse, and the append to the bit."""
    wanted = step.appended()
    with numerics.uninitialised_memory_is_nan():
        output, lse = step.run(return_lse=True)
    for cache, its in zip(step.caches, wanted, strict=True):
        torch.testing.assert_close(cache, its, rtol=0, atol=0, equal_nan=True)
    its = step.reference(wanted, step.query.dtype)
    truth = step.reference(wanted, torch.float64)
    numerics.assert_close("output", output, its[0], truth[0])
    seen = truth[1] > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen) and not output[~seen].any()
    numerics.assert_close("lse", lse[seen], its[1][seen], truth[1][seen])


FEATURES = {
    "plain": {},
    "window": {"window": (20, 0)},
    "both sides": {"is_causal": False, "window": (20, 1)},
    "not causal": {"is_causal": False},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi by batch": {"alibi_slopes": SLOPES * torch.tensor([[1.0], [2.0], [0.5]])},
    "left padded": {"starts": [60, 0, 3]},
    "all": {"window": (40, 0), "softcap": 2.0, "alibi_slopes": SLOPES, "starts": [60, 0, 80]},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("queries", pick([1, 3, 6], [3]))
@pytest.mark.parametrize("dtype", pick(DTYPES, FEW), ids=str)
def test_features(backend, device, dtype, queries, features):
    check(Step(device, dtype, queries=queries, **features))


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (128, 40), (33, 65), (256, 256), (1, 7)], ids=str)
@dtypes
def test_head_dims(backend, device, dtype, dims):
    check(Step(device, dtype, dims, lengths=[37], heads=(1, 1)))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (17, 1), (8, 8)], ids=str)
def test_heads_that_share_keys(backend, device, heads):
    check(Step(device, heads=heads, queries=2))


@pytest.mark.parametrize("length", pick(range(40), [0, 1, 15, 16, 17, 39]))
def test_append_is_right_at_every_length(backend, device, length):
    check(Step(device, torch.bfloat16, lengths=[length], capacity=40 + length % 2))


@pytest.mark.parametrize("queries, new", [(1, 3), (3, 1), (4, 0), (1, 0), (40, 40)])
def test_queries_and_new_rows_need_not_match(backend, device, queries, new):
    check(Step(device, queries=queries, new=new, lengths=[50, 0, 17]))


@pytest.mark.parametrize("scale", [1e-3, 10.0])
@pytest.mark.parametrize("dtype", pick(DTYPES, FEW), ids=str)
def test_scales(backend, device, dtype, scale):
    check(Step(device, dtype, scale=scale))


def test_the_whole_capacity_without_lengths(backend, device):
    step = Step(device, lengths=[CAPACITY] * 2, new=0)
    assert torch.equal(attention_decode(step.query, *step.caches, enable_gqa=True), step.run())


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 50])
def test_parts_equal_the_whole(backend, device, splits):
    for features in ({}, {"window": (33, 0)}, {"starts": [50, 0, 0]}):
        whole, parts = Step(device, **features), Step(device, **features)
        expected, lse = whole.run(return_lse=True, splits=1)
        found, found_lse = parts.run(return_lse=True, splits=splits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_lse, lse)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole.caches, parts.caches, strict=True))


def test_a_text_step_by_step_is_causal_attention(backend, device):
    """A prompt at once, then token by token: the rows that attention over the whole text gives."""
    q, k, v = (torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    expected = attention(q, k, v, is_causal=True)
    caches = [torch.full((2, 3, 16, 16), torch.nan, device=device) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int64, device=device)
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
        found = attention_decode(q[:, :, start:end], *caches, k[:, :, start:end], v[:, :, start:end], lengths)
        torch.testing.assert_close(found, expected[:, :, start:end])
        lengths += end - start
    assert torch.equal(caches[0][:, :, :12], k) and torch.equal(caches[1][:, :, :12], v)


# Strides, edges


@pytest.mark.parametrize("layout", ["rows first", "every second row", "odd start", "apart"])
@pytest.mark.parametrize("dim", [16, 33])
def test_strides_of_the_caches(backend, device, layout, dim):
    """What lies between the rows stays as it was."""
    plain, step = (Step(device, dims=(dim, dim), queries=2) for _ in range(2))
    storages = []
    for i, cache in enumerate(step.caches):
        batch, heads, rows, _ = cache.shape
        if layout == "rows first":
            storage = torch.full((batch, rows, heads, dim), 7.0, device=device)
            view = storage.transpose(1, 2)
        elif layout == "every second row":
            storage = torch.full((batch, heads, 2 * rows, dim), 7.0, device=device)
            view = storage[:, :, ::2]
        elif layout == "odd start":
            storage = torch.full((cache.numel() + 1,), 7.0, device=device)
            view = storage[1:].view(cache.shape)
        else:
            storage = torch.full((batch, heads, rows, dim + 3), 7.0, device=device)
            view = storage[..., :dim]
        view.copy_(cache)
        step.caches[i] = view
        storages.append((storage, view))
    torch.testing.assert_close(step.run(), plain.run())
    for (storage, view), its in zip(storages, plain.caches, strict=True):
        torch.testing.assert_close(view, its, rtol=0, atol=0, equal_nan=True)
        view.fill_(7.0)
        assert (storage == 7.0).all()


def test_strides_of_query_and_new_rows(backend, device):
    plain, step = (Step(device, queries=3) for _ in range(2))
    step.query = step.query.transpose(2, 3).contiguous().transpose(2, 3)
    step.new = [new.transpose(1, 2).contiguous().transpose(1, 2) for new in step.new]
    torch.testing.assert_close(step.run(), plain.run())


@pytest.mark.parametrize("sizes", [(0, 4, 1, 8), (2, 4, 0, 8), (2, 4, 1, 0)], ids=str)
def test_nothing_to_compute(backend, device, sizes):
    batch, heads, queries, capacity = sizes
    query = torch.randn(batch, heads, queries, 16, device=device)
    caches = [torch.zeros(batch, 2, capacity, 16, device=device) for _ in range(2)]
    new = [torch.ones(batch, 2, min(1, capacity), 16, device=device) for _ in range(2)]
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    output, lse = attention_decode(query, *caches, *new, lengths, enable_gqa=True, return_lse=True)
    assert output.shape == query.shape and lse.shape == query.shape[:-1]
    assert capacity or not output.any()
    assert all(torch.equal(cache[:, :, :1], rows) for cache, rows in zip(caches, new, strict=True))


def test_nan_and_infinity_stay_in_their_row(backend, device):
    """In bf16: the kernels' split of an infinite float32 makes NaN."""
    clean, step = (Step(device, torch.bfloat16) for _ in range(2))
    step.query[0, 1] = torch.nan
    step.caches[1][2, 1, 5] = torch.inf
    expected, found = clean.run(), step.run()
    assert found[0, 1].isnan().all() and (found[2, 2:] == torch.inf).all()
    found[0, 1], found[2, 2:] = expected[0, 1], expected[2, 2:]
    torch.testing.assert_close(found, expected)


def test_rows_beyond_the_capacity_are_dropped(backend, device):
    """Where nobody can look at the lengths first: under torch.compile, as on a GPU."""
    step = Step(device, queries=3, lengths=[88, 90, 20])
    compiled = torch.compile(attention_decode, fullgraph=True, backend="eager")
    output = step.run(compiled)
    for cache, new in zip(step.caches, step.new, strict=True):
        assert torch.equal(cache[0, :, 88:], new[0, :, :2]) and torch.equal(cache[2, :, 20:23], new[2])
        assert not cache[1].isnan().any()
    assert output.isfinite().all()


def test_equal_inputs_give_equal_bits(backend, device):
    assert torch.equal(*(Step(device, torch.bfloat16).run() for _ in range(2)))


# torch's other machinery


@pytest.mark.parametrize("features", [{}, {"window": (20, 0), "starts": [60, 0, 3], "index": torch.int64}], ids=str)
def test_compile(backend, device, features):
    eager, traced = (Step(device, queries=2, **features) for _ in range(2))
    compiled = torch.compile(lambda *args, **kw: attention_decode(*args, **kw) * 2, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = traced.run(compiled)
    torch.testing.assert_close(found, eager.run() * 2)
    for a, b in zip(traced.caches, eager.caches, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_raw_op_is_one_torch_knows(backend, device):
    if backend == "torch":
        pytest.skip("the torch backend has no raw op")
    step = Step(device, queries=2)
    step.caches = [cache.nan_to_num() for cache in step.caches]
    options = (*step.new, step.lengths, None, None, -1, 0, 0.0, 0.25, 0)
    raw = getattr(torch.ops, f"bigkern_{backend}").attention_decode_forward.default
    torch.library.opcheck(raw, (step.query, *step.caches, *options))


def test_a_change_in_place_is_noticed(backend, device):
    step = Step(device)
    before = [cache._version for cache in step.caches]
    step.run()
    assert all(cache._version > version for cache, version in zip(step.caches, before, strict=True))


def test_inference_mode(backend, device):
    expected = Step(device).run()
    with torch.inference_mode():
        assert torch.equal(Step(device).run(), expected)


def test_autocast_takes_the_caches_dtype(backend, device):
    step = Step(device, torch.bfloat16)
    expected = Step(device, torch.bfloat16).run()
    step.query, step.new = step.query.float(), [new.float() for new in step.new]
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(step.run(), expected)


@pytest.mark.cuda
def test_a_cuda_graph_replays_a_step(backend, device):
    step, expected = Step(device, lengths=[9, 3]), Step(device, lengths=[9, 3])
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step.run()
        step.lengths += 1
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(output, expected.run())
        expected.lengths += 1


# Bad input


def test_gradients_are_refused(backend, device):
    for name in ("query", "key"):
        step = Step(device)
        tensor = step.query if name == "query" else step.new[0]
        tensor.requires_grad_()
        with pytest.raises(ValueError, match=rf"{name} requires a gradient.*bigkern\.ops\.attention"):
            step.run()
        with torch.no_grad():
            step.run()
    with pytest.raises(ValueError, match="alibi_slopes requires a gradient"):
        Step(device, alibi_slopes=SLOPES.clone().requires_grad_()).run()


def test_bad_input(backend, device):
    def call(**changes):
        step = Step(device, lengths=[5, 0], queries=2)
        given = dict(query=step.query, key_cache=step.caches[0], value_cache=step.caches[1], key=step.new[0])
        given |= dict(value=step.new[1], cache_seqlens=step.lengths, enable_gqa=True)
        attention_decode(**{**given, **changes})

    x = torch.ones(2, 2, 2, 16, device=device)
    cache = torch.zeros(2, 2, CAPACITY, 16, device=device)
    bad = [
        (dict(key=None), ValueError, "key and value go together"),
        (dict(cache_seqlens=None), ValueError, "key is given without cache_seqlens"),
        (dict(query=x[0]), ValueError, r"query has shape \(2, 2, 16\)"),
        (dict(query=x.int()), TypeError, "query has dtype torch.int32"),
        (dict(query=[1.0]), TypeError, "query is a list"),
        (dict(query=x.bfloat16()), TypeError, "query is torch.bfloat16 and key_cache torch.float32"),
        (dict(query=x[:1]), ValueError, "query has batch 1 and key_cache 2"),
        (dict(query=x[:, :, :, :8]), ValueError, "head_dim 8 and key_cache 16"),
        (dict(query=torch.ones(2, 3, 1, 16, device=device)), ValueError, "multiple of the key's"),
        (dict(enable_gqa=False), ValueError, "pass enable_gqa=True"),
        (dict(value_cache=cache[:, :, :5]), ValueError, "key_cache is 90 long and value_cache 5"),
        (dict(key=x[:, :, :1]), ValueError, r"value has shape \(2, 2, 2, 16\)"),
        (dict(value=x[..., :8]), ValueError, r"value has shape .* here \(2, 2, 2, 16\)"),
        (dict(key_cache=cache[:1].expand(2, 2, CAPACITY, 16)), ValueError, "key_cache is expanded"),
        (dict(key_cache=cache.transpose(2, 3).contiguous().transpose(2, 3)), ValueError, "key_cache has stride 90"),
        (dict(cache_seqlens=torch.ones(2, device=device)), TypeError, "cache_seqlens is of torch.float32"),
        (dict(cache_seqlens=[5, 0]), TypeError, "cache_seqlens is a list"),
        (dict(cache_seqlens=torch.ones(3, dtype=torch.int32, device=device)), ValueError, r"here \(2,\)"),
        (dict(cache_starts=torch.ones(1, dtype=torch.int32, device=device)), ValueError, "cache_starts has shape"),
        (dict(alibi_slopes=torch.ones(3, device=device)), ValueError, "alibi_slopes has shape"),
        (dict(softcap=-1.0), ValueError, "softcap is -1.0"),
        (dict(scale=math.nan), ValueError, "scale is nan"),
        (dict(window=(1, 2, 3)), ValueError, r"window is \(1, 2, 3\)"),
        (dict(splits=0), ValueError, "splits is 0"),
    ]
    if device.type == "cpu":
        meta = torch.ones(2, 2, 2, 16, device="meta")
        bad += [
            (dict(key=meta), ValueError, "key is on meta"),
            (dict(cache_seqlens=torch.tensor([89, 0])), ValueError, "cache_seqlens has 89 and 2 are to be appended"),
            (dict(cache_seqlens=torch.tensor([-1, 0])), ValueError, "cache_seqlens has -1"),
            (dict(cache_starts=torch.tensor([-1, 0])), ValueError, "cache_starts has -1"),
        ]
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            call(**changes)


def test_refusals_of_the_kernels(backend, device):
    if backend == "torch":
        pytest.skip("the torch backend refuses nothing")
    for changes, reason in ((dict(dtype=torch.float64), "float64"), (dict(dims=(264, 16)), "take up to 256")):
        with pytest.raises(bigkern.BackendError, match=reason):
            Step(device, **changes).run()
    assert _cuda.MAX_HEAD_DIM == 256
