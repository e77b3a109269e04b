// Warpgroup products, setmaxnreg and ex2; see device/cuda/wgmma.cuh.
//
// A warp multiplies its own 16 of the 64 rows, and waits, for itself: the hardware promises no more, so a kernel that
// takes a product or a wait for a barrier between the four warps is found out. That the four execute the same sequence
// is checked. Accumulators and A registers are read when the product completes, at the latest when it is waited for:
// their arrays must live until then.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "emulator/core.h"
#include "emulator/warp.h"

namespace bigkern {

namespace emulator {

struct Product {
  int columns;  // N
  bool half;    // f16 instead of bf16
  bool a_in_registers;
  bool trans_a, trans_b;
  bool accumulate;
  uint64_t a, b;  // descriptors
};

// Where a descriptor's element (mn, k) lies: an offset in shared memory.
size_t descriptor_address(uint64_t descriptor, int mn, int k, bool trans);

void wgmma(const Product& product, float* d, const uint32_t* a, Where where);
void wgmma_wait(size_t groups, Where where);
void set_max_registers(int registers, bool raise, Where where);

template <class T>
constexpr bool is_half() {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma: bf16 or f16");
  return std::is_same_v<T, __half>;
}

}  // namespace emulator

void wgmma_fence(BK_WHERE);
void wgmma_commit(BK_WHERE);

template <int N>
void wgmma_wait(BK_WHERE) {
  emulator::wgmma_wait(N, where);
}

template <int N, int kCount>
void wgmma_wait(float (&)[kCount], BK_WHERE) {
  emulator::wgmma_wait(N, where);
}

template <class T, int N, bool kTransA = false, bool kTransB = false>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, BK_WHERE) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0, "wgmma: N is 8 to 256 in steps of 8");
  emulator::wgmma({N, emulator::is_half<T>(), false, kTransA, kTransB, accumulate, a, b}, d, nullptr, where);
}

template <class T, int N, bool kTransB = false>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, BK_WHERE) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0, "wgmma: N is 8 to 256 in steps of 8");
  emulator::wgmma({N, emulator::is_half<T>(), true, false, kTransB, accumulate, 0, b}, d, a, where);
}

template <int kRegisters>
void set_max_registers_inc(BK_WHERE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 in steps of 8");
  emulator::set_max_registers(kRegisters, true, where);
}

template <int kRegisters>
void set_max_registers_dec(BK_WHERE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 in steps of 8");
  emulator::set_max_registers(kRegisters, false, where);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace bigkern
