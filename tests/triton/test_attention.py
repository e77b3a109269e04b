"""Attention's Triton kernels, interpreted, in tiles so small that few rows and keys cross several of them.

tests/ops runs the public op over the same kernels in the product's tiles.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import bigkern
from bigkern.ops import _triton_support, attention
from bigkern.ops.attention import _torch, _triton
from tests import numerics
from tests.conftest import pick
from tests.ops.attention_cases import Case, pairwise

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("interpreter")]

NAMES = ("query", "key", "value", "attn_mask")

# Of tests/ops/attention_cases.py, in tiles of 16.
LENGTHS = {
    (33, 70): (20, 35), (16, 72): (16, 36), (70, 33): (35, 20), (65, 130): (17, 49), (1, 200): (1, 50),
    (96, 64): (32, 16),
}  # fmt: skip


def crossed() -> list[Case]:
    """80 of the generated cases, on fewer rows and keys."""
    return [replace(case, lengths=LENGTHS.get(case.lengths, case.lengths)) for case in pairwise(400, seed=1)[:80]]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    small_tiles(monkeypatch)
    with bigkern.use_backend("triton"):
        yield


def small_tiles(monkeypatch):
    monkeypatch.setattr(_triton, "_tile", lambda *traits: _triton.Tile(16, 16, 4, 1))


def check(case: Case):
    inputs = case.inputs("cpu")
    numerics.check(case.kernel, case.reference, inputs, names=NAMES[: len(inputs)])


@pytest.mark.parametrize("case", pick(crossed(), crossed()[::16]), ids=str)
def test_features_crossed(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, lengths=(50, 50), heads=(1, 1), head_dim=8, causal="top"),
        Case(dtype=torch.bfloat16, lengths=(35, 50), heads=(2, 1), head_dim=8, window=(20, 3)),
    ],
    ids=str,
)
def test_tiles_before_whole_ones_whole_ones_and_tiles_after(case):
    check(case)


def test_tiles_of_other_shapes(monkeypatch):
    tiles = {"forward": (32, 16), "keys": (16, 32), "queries": (32, 16), "mask": (16, 32)}
    monkeypatch.setattr(_triton, "_tile", lambda kernel, *traits: _triton.Tile(*tiles[kernel], 4, 1))
    check(Case(dtype=torch.float16, lengths=(40, 70), heads=(1, 1), head_dim=8, mask="bias", window=(30, 9)))


@pytest.mark.parametrize(
    "shape",
    pick(itertools.product((1, 2), (1, 2), (1, 18), (1, 20)), [(1, 1, 1, 1), (2, 1, 18, 1), (1, 2, 1, 20)]),
    ids=str,
)
def test_gradient_of_a_mask_of_any_shape(shape):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 2, 18, 8), (2, 2, 20, 8), (2, 2, 20, 8), shape)
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    mine, its = (
        numerics.run(lambda *t, backend=backend: call(backend, *t), inputs)[1] for backend in ("triton", "torch")
    )
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def call(backend, query, key, value, mask):
    with bigkern.use_backend(backend):
        return attention(query, key, value, mask, window=(9, 2))


def test_gradient_of_alibi_slopes_over_several_tiles():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *size, 8, generator=generator) for size in ((2, 18), (1, 20), (1, 20)))
    slopes = torch.rand(2, 2, generator=generator, requires_grad=True)
    options = dict(alibi_slopes=slopes, dropout_p=0.3, philox=torch.tensor([3, 4]), window=9, enable_gqa=True)

    def grad(backend, dtype):
        with bigkern.use_backend(backend):
            output = attention(*(x.to(dtype) for x in (q, k, v)), **options)
        return torch.autograd.grad(output, slopes, numerics.cotangent(output))[0]

    numerics.assert_close(
        "alibi_slopes", grad("triton", torch.float32), grad("torch", torch.float32), grad("torch", torch.float64)
    )


def test_hidden_tiles_are_not_looked_at():
    """NaN in a tile that is read would spread through products with 0."""
    query, key, value = (torch.ones(1, 1, 64, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        value[:, :, :16] = torch.nan
        value[:, :, 48:] = torch.nan
    output = attention(query, key, value, window=(0, 0))
    assert torch.equal(output[:, :, 16:48], torch.ones(1, 1, 32, 8, dtype=torch.bfloat16))
    cotangent = torch.ones_like(output)
    cotangent[:, :, 48:] = torch.nan
    for grad in torch.autograd.grad(output, (query, key, value), cotangent):
        assert grad[:, :, 16:48].isfinite().all() and grad[:, :, 48:].isnan().any()


def test_every_kernel_is_reached(monkeypatch):
    from bigkern.ops.attention import _triton_kernels

    launched = []
    for name, kernel in list(vars(_triton_kernels).items()):
        if not name.endswith("_kernel"):
            continue

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(_triton_kernels, name, Spy())
    numerics.run(Case(mask="bias").kernel, Case(mask="bias", lengths=(3, 5), heads=(1, 1), head_dim=8).inputs("cpu"))
    assert sorted(launched) == sorted(name for name in vars(_triton_kernels) if name.endswith("_kernel"))


def test_cu_seqlens_of_any_values_stay_within_the_tensors():
    """The raw op, whose caller has not looked at them."""
    query, key, value = (torch.randn(1, 1, 9, 8) for _ in range(3))
    cu_q, cu_k = (torch.tensor(values, dtype=torch.int32) for values in ([-3, 4, 100], [5, 2, 1000]))
    options = (None, None, cu_q, cu_k, 20, 20, -1, -1, True, 0.0, 1.0, 0.0, None, False)
    output, lse = _triton.forward(query, key, value, *options)
    assert output.isfinite().all() and (lse[:, :, :4] == -torch.inf).all() and lse[:, :, 4:].isfinite().all()
    expected, _ = _torch.forward(
        query[:, :, 4:], key[:, :, 2:], value[:, :, 2:], *[None] * 4, 5, 7, -1, -1, *options[8:]
    )
    torch.testing.assert_close(output[:, :, 4:], expected)
    grads = _triton.backward(output, None, query, key, value, output, lse, *options, False, False, False)
    assert all(grad.isfinite().all() for grad in grads)


def objection(query, key, mask=None, slopes=None, length=5):
    return _triton.unsupported(query, key, key, mask, slopes, None, None, 5, length)


def test_unsupported(monkeypatch):
    x = torch.zeros(1, 2, 5, 8)
    assert objection(x, x) is None
    assert "float64" in objection(x.double(), x.double())
    assert "key is on meta" in objection(x, x.to("meta"))
    assert "head_dim is 257" in objection(torch.zeros(1, 1, 5, 257), x)
    assert "attn_mask is torch.float16" in objection(x, x, mask=x.half())
    assert objection(x, x, slopes=torch.ones(2, requires_grad=True)) is None
    assert "5 and 1073741824 long" in objection(x, x, length=2**30)
    monkeypatch.setattr(_triton_support, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in objection(x, x)
