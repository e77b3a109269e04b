"""Dropout's random bits in PyTorch's own operators, for every op's torch backend.

csrc/device/philox.cuh and _triton_philox.py are the same, so a mask drawn by one backend can be redrawn by the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dropout(x: Tensor, dropout_p: float, philox: Tensor) -> Tensor:
    """``x`` (fp32 or fp64) with the mask drawn from ``philox``, the kept elements times 1 / (1 - dropout_p)."""
    scale = 0.0 if dropout_p == 1 else 1.0 / (1.0 - dropout_p)
    keep = uniform(x.numel(), philox).view(x.shape) > dropout_p
    return torch.where(keep, x * scale, 0.0)


def uniform(count: int, philox: Tensor) -> Tensor:
    """fp32 in (0, 1] for elements 0..count-1: element i takes word i % 4 of subsequence i // 4."""
    words = philox4x32_10(philox[0], torch.arange((count + 3) // 4, device=philox.device), philox[1])
    return words.view(-1)[:count].to(torch.float32) * 2.0**-32 + 2.0**-33


def philox4x32_10(seed: Tensor, subsequence: Tensor, offset: Tensor) -> Tensor:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011) for each subsequence, as an int64 (..., 4)
    tensor.

    The counter is {offset, subsequence} and the key the seed, low words first, as in csrc/device/philox.cuh.  Sums and
    products are taken modulo 2^64, which int64 does, and cut to 32 bits.
    """
    offset, seed = offset.expand_as(subsequence), seed.expand_as(subsequence)
    c0, c1 = offset & _WORD, (offset >> 32) & _WORD
    c2, c3 = subsequence & _WORD, (subsequence >> 32) & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)
