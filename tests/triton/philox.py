"""Philox4x32-10 and dropout's mask in numpy, from the paper's text: the reference for the kernels' generator."""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def words(seed: int, subsequence: np.ndarray, offset: int) -> np.ndarray:
    """The four words of each subsequence (uint64), as uint32[..., 4].  counter = {offset, subsequence}, key = seed."""
    subsequence = np.asarray(subsequence, dtype=np.uint64)
    c0 = np.full_like(subsequence, offset & 0xFFFFFFFF)
    c1 = np.full_like(subsequence, (offset >> 32) & 0xFFFFFFFF)
    c2, c3 = subsequence & _LOW, subsequence >> _SHIFT
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def keep_mask(seed: int, offset: int, index: np.ndarray, dropout_p: float) -> np.ndarray:
    """Whether each element (by its row-major number) survives dropout."""
    index = np.asarray(index, dtype=np.uint64)
    word = np.take_along_axis(
        words(seed, index >> np.uint64(2), offset), (index & np.uint64(3)).astype(np.int64)[..., None], axis=-1
    )[..., 0]
    uniform = word.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    return uniform > np.float32(dropout_p)
