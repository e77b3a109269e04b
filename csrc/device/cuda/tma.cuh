// Tensor maps and bulk copies by the TMA unit (sm_90). One thread issues for the block. Loads complete on an mbarrier;
// stores and reductions in groups that the issuing thread commits and waits for.
#pragma once

#include "device/cuda/mbarrier.cuh"
#include "device/tensor_map.h"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace bigkern {

// Passed to a kernel as const __grid_constant__ TensorMap.
using TensorMap = CUtensorMap;

// The map of a box of a tensor at global. dims and box count elements, dimension 0 innermost and contiguous; strides
// are bytes, strides[i] of dimension i + 1. A transfer moves ceil(box / element_stride) elements of each dimension,
// every element_stride-th. Throws std::invalid_argument naming the limit that is broken.
template <class T>
TensorMap make_tensor_map(const void* global, int rank, const uint64_t* dims, const uint64_t* strides,
                          const uint32_t* box, const uint32_t* element_strides, int swizzle) {
  constexpr bool kFloat = std::is_same_v<T, float>, kHalf = std::is_same_v<T, __half>;
  static_assert(kFloat || kHalf || std::is_same_v<T, __nv_bfloat16>, "tensor map: float, __half or __nv_bfloat16");
  const TensorMapShape shape =
      detail::tensor_map_shape(global, sizeof(T), rank, dims, strides, box, element_strides, swizzle);
  // The shared object does not link the driver: it must load where there is none.
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) !=
          cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("tensor map: this CUDA driver has no cuTensorMapEncodeTiled");
  }
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  const CUtensorMapDataType type = kFloat  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle pattern = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                     : CU_TENSOR_MAP_SWIZZLE_NONE;
  static_assert(std::is_same_v<cuuint64_t, uint64_t> || sizeof(cuuint64_t) == sizeof(uint64_t), "");
  TensorMap map;
  const CUresult status = encode(
      &map, type, rank, const_cast<void*>(global), reinterpret_cast<const cuuint64_t*>(shape.dims),
      reinterpret_cast<const cuuint64_t*>(shape.strides + 1), shape.box, shape.element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, pattern, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled failed with code " + std::to_string(status));
  }
  return map;
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

namespace detail {

template <bool kMulticast, int kRank>
__device__ __forceinline__ void tma_read(void* dst, const TensorMap& map, Mbarrier* barrier, const int (&start)[kRank],
                                         uint16_t blocks) {
  static_assert(kRank >= 1 && kRank <= 5, "tma_load, tma_load_multicast: rank 1 to 5");
  const uint32_t to = shared_address(dst), on = shared_address(barrier);
#define BK_READ(rank, coordinates, ...)                                                                         \
  if constexpr (kMulticast) {                                                                                   \
    asm volatile(                                                                                               \
        "cp.async.bulk.tensor." rank                                                                            \
        ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" coordinates \
        "}], [%2], %3;" ::"r"(to),                                                                              \
        "l"(&map), "r"(on), "h"(blocks), __VA_ARGS__                                                            \
        : "memory");                                                                                            \
  } else {                                                                                                      \
    asm volatile("cp.async.bulk.tensor." rank                                                                   \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates           \
                 "}], [%2];" ::"r"(to),                                                                         \
                 "l"(&map), "r"(on), "h"(blocks), __VA_ARGS__                                                   \
                 : "memory");                                                                                   \
  }
  if constexpr (kRank == 1) {
    BK_READ("1d", "%4", "r"(start[0]));
  } else if constexpr (kRank == 2) {
    BK_READ("2d", "%4, %5", "r"(start[0]), "r"(start[1]));
  } else if constexpr (kRank == 3) {
    BK_READ("3d", "%4, %5, %6", "r"(start[0]), "r"(start[1]), "r"(start[2]));
  } else if constexpr (kRank == 4) {
    BK_READ("4d", "%4, %5, %6, %7", "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
  } else {
    BK_READ("5d", "%4, %5, %6, %7, %8", "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]), "r"(start[4]));
  }
#undef BK_READ
}

}  // namespace detail

// Copies the box at start (elements, dimension 0 first; it may be negative) to dst, rows packed one after another,
// zeros where it leaves the tensor, and counts the whole box's bytes on barrier. dst is a multiple of 128.
//   tma_load(dst, map, barrier, {column, row});
template <int kRank>
__device__ __forceinline__ void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier,
                                         const int (&start)[kRank]) {
  detail::tma_read<false>(dst, map, barrier, start, 0);
}

// The same to every block of the cluster whose rank's bit is set in blocks, each at the place that dst and barrier have
// in it: L2 is read once.
template <int kRank>
__device__ __forceinline__ void tma_load_multicast(void* dst, const TensorMap& map, Mbarrier* barrier,
                                                   const int (&start)[kRank], uint16_t blocks) {
  detail::tma_read<true>(dst, map, barrier, start, blocks);
}

namespace detail {

template <bool kAdd, int kRank>
__device__ __forceinline__ void tma_write(const TensorMap& map, const void* src, const int (&start)[kRank]) {
  static_assert(kRank >= 1 && kRank <= 5, "tma_store, tma_reduce_add: rank 1 to 5");
  const uint32_t from = shared_address(src);
#define BK_WRITE(rank, coordinates, ...)                                                                          \
  if constexpr (kAdd) {                                                                                           \
    asm volatile("cp.reduce.async.bulk.tensor." rank ".global.shared::cta.add.tile.bulk_group [%0, {" coordinates \
                 "}], [%1];" ::"l"(&map),                                                                         \
                 "r"(from), __VA_ARGS__                                                                           \
                 : "memory");                                                                                     \
  } else {                                                                                                        \
    asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.tile.bulk_group [%0, {" coordinates            \
                 "}], [%1];" ::"l"(&map),                                                                         \
                 "r"(from), __VA_ARGS__                                                                           \
                 : "memory");                                                                                     \
  }
  if constexpr (kRank == 1) {
    BK_WRITE("1d", "%2", "r"(start[0]));
  } else if constexpr (kRank == 2) {
    BK_WRITE("2d", "%2, %3", "r"(start[0]), "r"(start[1]));
  } else if constexpr (kRank == 3) {
    BK_WRITE("3d", "%2, %3, %4", "r"(start[0]), "r"(start[1]), "r"(start[2]));
  } else if constexpr (kRank == 4) {
    BK_WRITE("4d", "%2, %3, %4, %5", "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
  } else {
    BK_WRITE("5d", "%2, %3, %4, %5, %6", "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]), "r"(start[4]));
  }
#undef BK_WRITE
}

}  // namespace detail

// Writes the box at src to the tensor; elements outside the tensor are dropped.
template <int kRank>
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* src, const int (&start)[kRank]) {
  detail::tma_write<false>(map, src, start);
}

// Adds the box at src to the tensor, each element atomically.
template <int kRank>
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, const void* src, const int (&start)[kRank]) {
  detail::tma_write<true>(map, src, start);
}

// Copies of contiguous bytes: addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(dst)),
               "l"(src), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)),
               "r"(bytes)
               : "memory");
}

// Adds contiguous elements in shared memory to global memory, each atomically.
template <class T>
__device__ __forceinline__ void bulk_reduce_add(T* dst, const T* src, uint32_t bytes) {
  const uint32_t from = shared_address(src);
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(from),
                 "r"(bytes)
                 : "memory");
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%0], [%1], %2;" ::"l"(dst),
                 "r"(from), "r"(bytes)
                 : "memory");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "bulk_reduce_add: float, __half or __nv_bfloat16");
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(dst),
                 "r"(from), "r"(bytes)
                 : "memory");
  }
}

// Adds four neighbours to global memory at a multiple of 16 bytes, each atomically.
__device__ __forceinline__ void reduce_add(float* dst, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
}

// Closes this thread's open group of stores and reductions.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups still read shared memory. Needed before the source is reused and
// before the block ends.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Waits until at most N of this thread's groups are not yet written to global memory.
template <int N>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace bigkern
