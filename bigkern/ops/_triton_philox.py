"""Dropout's random bits, for Triton kernels.  Imported only by kernel files, so only once a kernel runs.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), arranged
as in cuRAND: counter = {offset, subsequence} and key = seed, each a 64-bit number, low word first.
csrc/device/philox.cuh is the same, so a mask drawn by one backend can be redrawn by the other.
"""

import triton
import triton.language as tl


@triton.jit
def philox_words(philox, subsequence):
    """The four random words of each subsequence (int64).  philox: [seed, offset], int64."""
    offset = tl.load(philox + 1)
    return tl.philox(
        tl.load(philox),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        subsequence.to(tl.uint32),
        (subsequence >> 32).to(tl.uint32),
    )


@triton.jit
def uniform(word):
    """A random word as a float in (0, 1]: word * 2^-32 + 2^-33, as curand_uniform."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def dropout_keep(philox, first, dropout_p, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr):
    """Which elements of a ROWS x COLS tile survive.

    first: [ROWS, 1] int64, the number of each row's first element of the tile, counted in row-major order over the
    whole tensor.  Element i uses word i % 4 of subsequence i / 4.  QUADS promises that first is a multiple of 4, so
    that the four words of a subsequence serve four neighbours.
    """
    if QUADS:
        subsequence = (first >> 2) + tl.arange(0, COLS // 4)[None, :]
        word_0, word_1, word_2, word_3 = philox_words(philox, subsequence)
        word = tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), (ROWS, COLS))
    else:
        index = first + tl.arange(0, COLS)[None, :]
        word_0, word_1, word_2, word_3 = philox_words(philox, index >> 2)
        low = tl.where((index & 1) == 0, word_0, word_1)
        high = tl.where((index & 1) == 0, word_2, word_3)
        word = tl.where((index & 2) == 0, low, high)
    return uniform(word) > dropout_p
