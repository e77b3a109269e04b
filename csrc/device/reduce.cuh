// Sums and maxima over a group of lanes, a warp or a block. Every thread gets the result, and the order of the
// additions depends on nothing but the thread count, so equal inputs give equal bits.
#pragma once

#include "device/platform.cuh"

namespace bigkern {

namespace detail {

struct Sum {
  static __device__ __forceinline__ float identity() { return 0.0f; }
  static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
};

// NaN wins, as in torch.
struct Max {
  static __device__ __forceinline__ float identity() { return -INFINITY; }
  static __device__ __forceinline__ float combine(float a, float b) { return (a > b || a != a) ? a : b; }
};

// A butterfly: partners add the same two numbers, so all lanes end with the same bits.
template <class Op, int kLanes>
__device__ __forceinline__ float group_reduce(float value) {
  static_assert(kLanes >= 1 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "a power of two up to 32");
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = Op::combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__host__ __device__ constexpr int next_power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

template <class Op, int kThreads, int kValues>
__device__ __forceinline__ void block_reduce(float (&values)[kValues]) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / 32;
#pragma unroll
  for (int i = 0; i < kValues; i++) values[i] = group_reduce<Op, 32>(values[i]);
  if constexpr (kWarps > 1) {
    BK_SHARED(float, partial, [kValues][kWarps]);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int lane = thread % 32, warp = thread / 32;
    __syncthreads();  // the readers of an earlier call are done
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kValues; i++) partial[i][warp] = values[i];
    }
    __syncthreads();
    constexpr int kGroup = next_power_of_two(kWarps);
    const int source = lane % kGroup;
#pragma unroll
    for (int i = 0; i < kValues; i++) {
      values[i] = group_reduce<Op, kGroup>(source < kWarps ? partial[i][source] : Op::identity());
    }
  }
}

}  // namespace detail

// Over aligned groups of kLanes lanes. All 32 lanes of the warp must call.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
  return detail::group_reduce<detail::Sum, kLanes>(value);
}

template <int kLanes>
__device__ __forceinline__ float group_max(float value) {
  return detail::group_reduce<detail::Max, kLanes>(value);
}

__device__ __forceinline__ float warp_sum(float value) {
  return group_sum<32>(value);
}
__device__ __forceinline__ float warp_max(float value) {
  return group_max<32>(value);
}

// Over a block of kThreads threads, all of which must call. Two block barriers, none for a single warp.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  float values[1] = {value};
  detail::block_reduce<detail::Sum, kThreads>(values);
  return values[0];
}

// Two sums for the barriers of one.
template <int kThreads>
__device__ __forceinline__ float2 block_sum(float2 value) {
  float values[2] = {value.x, value.y};
  detail::block_reduce<detail::Sum, kThreads>(values);
  return make_float2(values[0], values[1]);
}

template <int kThreads>
__device__ __forceinline__ float block_max(float value) {
  float values[1] = {value};
  detail::block_reduce<detail::Max, kThreads>(values);
  return values[0];
}

}  // namespace bigkern
