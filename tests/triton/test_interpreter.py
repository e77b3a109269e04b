"""The interpreter's traps, and that our repairs of them hold: the other interpreted tests rely on both."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

from bigkern.ops._triton_philox import dropout_keep, philox_words  # noqa: E402
from tests.triton.philox import keep_mask, words  # noqa: E402

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("interpreter")]


@triton.jit
def _cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, c, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def _words_kernel(philox, subsequence, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    word_0, word_1, word_2, word_3 = philox_words(philox, tl.load(subsequence + index))
    tl.store(out + index * 4, word_0.to(tl.int64))
    tl.store(out + index * 4 + 1, word_1.to(tl.int64))
    tl.store(out + index * 4 + 2, word_2.to(tl.int64))
    tl.store(out + index * 4 + 3, word_3.to(tl.int64))


@triton.jit
def _keep_kernel(philox, first, out, dropout_p, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    keep = dropout_keep(philox, tl.load(first + row), dropout_p, ROWS, COLS, QUADS)
    tl.store(out + row * COLS + tl.arange(0, COLS)[None, :], keep.to(tl.int32))


def _bits(*patterns: int) -> torch.Tensor:
    return torch.tensor([struct.unpack("f", struct.pack("I", pattern))[0] for pattern in patterns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype):
    """Random values, ties in both directions, subnormals, overflow, infinities."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(256, generator=generator) * 10.0 ** torch.randint(-9, 6, (256,), generator=generator)
    source[:8] = _bits(0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000, 0x7F7FFFFF, 0x00018000, 0x7F800000, 0xFF800000)
    target = torch.empty(256, dtype=dtype)
    _cast_kernel[(1,)](source, target, 256)
    torch.testing.assert_close(target, source.to(dtype), rtol=0, atol=0)


def test_nan_stays_nan_in_a_cast():
    source = _bits(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF)
    target = torch.empty(4, dtype=torch.bfloat16)
    _cast_kernel[(1,)](source, target, 4)
    assert target.isnan().all()


def test_bf16_reads_exactly():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    target = torch.empty(2**16)
    _cast_kernel[(1,)](patterns, target, 2**16)
    torch.testing.assert_close(target, patterns.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values(dtype):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_without_the_repair_a_cast_truncates():
    """The trap itself, in a fresh process: if Triton mends it, this fails, and tests/triton/interpreter.py can go."""
    script = """
import torch
from tests.triton import test_interpreter as t
source = t._bits(0x3F80FFFF)
target = torch.empty(1, dtype=torch.bfloat16)
t._cast_kernel[(1,)](source, target, 1)
print(target.item())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1.0", "rounds to 1.0078125 where the interpreter is right"


def _unsigned(value: int) -> int:
    """The int64 with the bits of a 64-bit unsigned number."""
    return value - 2**64 if value >= 2**63 else value


# (offset, subsequence, seed) -> words: the known answers published with the generator (Random123, kat_vectors).
_KNOWN = [
    (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("offset, subsequence, seed, expected", _KNOWN)
def test_philox_known_answers(offset, subsequence, seed, expected):
    """Of the kernels' generator, and of numpy's in tests/triton/philox.py."""
    out = torch.empty(4, dtype=torch.int64)
    philox = torch.tensor([_unsigned(seed), _unsigned(offset)])
    _words_kernel[(1,)](philox, torch.tensor([_unsigned(subsequence)]), out, 1)
    assert tuple(out.tolist()) == expected
    assert tuple(words(seed, np.array([subsequence], dtype=np.uint64), offset)[0].tolist()) == expected


@pytest.mark.parametrize("quads", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_dropout_keeps_the_documented_elements(quads, dropout_p):
    seed, offset = 2**62 + 12345, 2**40 + 7
    first = torch.tensor([0, 32, 2**34 + (0 if quads else 3), 2**60])
    out = torch.empty(4, 32, dtype=torch.int32)
    _keep_kernel[(1,)](torch.tensor([seed, offset]), first, out, dropout_p, 4, 32, quads)
    for row, start in zip(out, first.tolist(), strict=True):
        expected = keep_mask(seed, offset, np.arange(start, start + 32, dtype=np.uint64), dropout_p)
        assert row.tolist() == expected.astype(int).tolist()
