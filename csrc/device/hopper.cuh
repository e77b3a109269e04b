// The Hopper part of the device layer (sm_90a): mbarriers, TMA, wgmma, setmaxnreg, clusters.
#pragma once

#include "device/device.cuh"

#include BK_PLATFORM_HOPPER

namespace bigkern {

// A wgmma operand of 16-bit elements in shared memory at p. W is the swizzle in bytes (0, 32, 64, 128); the byte
// address of element (mn, k), before the swizzle XORs bits of it, is p plus
//   K-major, swizzled:   mn % 8 * W + mn / 8 * sbo + 2 k                                (lbo unused)
//   MN-major, swizzled:  2 (mn % (W/2)) + mn / (W/2) * lbo + k % 8 * W + k / 8 * sbo
//   K-major, W = 0:      mn % 8 * 16 + mn / 8 * sbo + 2 (k % 8) + k / 8 * lbo
//   MN-major, W = 0:     2 (mn % 8) + mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo
// The swizzle is on shared memory's own address bits: tiles start at multiples of 8 W, and p may point inside one.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* p, uint32_t lbo, uint32_t sbo, int swizzle) {
  const uint64_t layout = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t{(shared_address(p) & 0x3ffffu) >> 4} | uint64_t{(lbo & 0x3ffffu) >> 4} << 16 |
         uint64_t{(sbo & 0x3ffffu) >> 4} << 32 | layout << 62;
}

// 2^x without the exponent unit, which makes 16 results a cycle of a multiprocessor, by 9 operations of its 128 fp32
// lanes: Cody and Waite's reduction to [-1/2, 1/2] and a polynomial of degree 5. The relative error is at most 1.7e-7,
// of which the polynomial's own is 9.2e-8. x is at most 127; NaN stays; from -126.5 down the result is 0.
__device__ __forceinline__ float exp2_polynomial(float x) {
  // At this size a last place is 1: the sum rounds x to an integer n, and its low bits are the exponent field of 2^n.
  constexpr float kRound = 12582912.0f + 127.0f;
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + kRound, r = x - (shifted - kRound);
  float power = 0x1.5bba08p-10f;
  power = __fmaf_rn(power, r, 0x1.3cea88p-7f);
  power = __fmaf_rn(power, r, 0x1.c6b754p-5f);
  power = __fmaf_rn(power, r, 0x1.ebf9bcp-3f);
  power = __fmaf_rn(power, r, 0x1.62e42ap-1f);
  power = __fmaf_rn(power, r, 1.0f);
  return __fmul_rn(power, __uint_as_float(__float_as_uint(shifted) << 23));
}

}  // namespace bigkern
