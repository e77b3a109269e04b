"""Functions that Triton's language lacks.  Imported only by kernel files, so only once a kernel runs."""

import triton
import triton.language as tl

# ln(2): sixteen bits of it, whose products with whole numbers up to 2^8 are exact, and the rest.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.42860682030941723212e-6)


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


@triton.jit
def exponential(difference, factor, EXACT: tl.constexpr):
    """2 to the power of a difference times factor; where EXACT, factor is log2(e)."""
    if EXACT:
        # A difference of 10 times log2(e) rounds by 5e-7, which would be the weight's error; one below 0.35 does not.
        difference = tl.where(difference < -150.0, -150.0, difference)  # whose exponential is 0; NaN passes
        power = tl.floor(difference * factor + 0.5)
        rest = difference - power * _LN2_HIGH - power * _LN2_LOW
        return tl.exp2(power) * tl.exp2(rest * factor)
    else:
        return tl.exp2(difference * factor)
