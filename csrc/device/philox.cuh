// Counter-based random numbers: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "device/platform.cuh"

#include <cstdint>

namespace bigkern {

// Four random words. The counter is {offset, subsequence} and the key is seed, low words first, as in cuRAND, whose
// offsets count single words where this one counts groups of four.
__host__ __device__ __forceinline__ uint4 philox4x32_10(uint64_t seed, uint64_t subsequence, uint64_t offset) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32);
  uint32_t c2 = static_cast<uint32_t>(subsequence), c3 = static_cast<uint32_t>(subsequence >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Uniform in (0, 1], as cuRAND: the product is exact, so a fused multiply-add changes nothing.
__host__ __device__ __forceinline__ float uniform(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

}  // namespace bigkern
