"""Functions that Triton's language lacks.  Imported only by kernel files, so only once a kernel runs."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To a few roundings also where x is small, which 2 sigmoid(2x) - 1 is not: there, the Pade approximant (7, 6)."""
    square = x * x
    # x plus a small correction: its roundings hardly show.
    change = square * (-45045.0 - square * (2772.0 + square * 27.0))
    small = x + x * (change / (135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))))
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 1.0, small, tl.where(x < 0, -large, large))
