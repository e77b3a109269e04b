// Tensor maps and bulk copies; see device/cuda/tma.cuh. A load may land at any time up to the end of the block: a
// drawn part of them at once, the rest when no thread can run. A store is read and written at the latest when waited
// for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "device/tensor_map.h"
#include "emulator/core.h"
#include "emulator/mbarrier.h"
#include "emulator/warp.h"

namespace bigkern {

namespace emulator {
enum class Element { kFloat, kHalf, kBfloat16 };

template <class T>
constexpr Element element_of() {
  constexpr bool kFloat = std::is_same_v<T, float>, kHalf = std::is_same_v<T, __half>;
  static_assert(kFloat || kHalf || std::is_same_v<T, __nv_bfloat16>, "float, __half or __nv_bfloat16");
  return kFloat ? Element::kFloat : kHalf ? Element::kHalf : Element::kBfloat16;
}
}  // namespace emulator

struct alignas(64) TensorMap {
  TensorMapShape shape;
  char* global;
  emulator::Element element;
};

template <class T>
TensorMap make_tensor_map(const void* global, int rank, const uint64_t* dims, const uint64_t* strides,
                          const uint32_t* box, const uint32_t* element_strides, int swizzle) {
  return {detail::tensor_map_shape(global, sizeof(T), rank, dims, strides, box, element_strides, swizzle),
          static_cast<char*>(const_cast<void*>(global)), emulator::element_of<T>()};
}

inline void prefetch_tensor_map(const TensorMap&) {}

namespace emulator {

// The address the hardware uses for an address in a tile swizzled over `bytes` bytes.
size_t swizzled(size_t address, int bytes);

void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier, const int* start, int rank, Where where);
void tma_load_multicast(void* dst, const TensorMap& map, Mbarrier* barrier, const int* start, int rank, unsigned blocks,
                        Where where);
void tma_store(const TensorMap& map, const void* src, const int* start, int rank, bool add, const char* operation,
               Where where);
void bulk_reduce_add(void* dst, const void* src, uint32_t bytes, Element element, Where where);
// Until at most `groups` of the thread's groups are left to be read or, with `written`, to be written.
void bulk_wait(size_t groups, bool written);

}  // namespace emulator

template <int kRank>
void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier, const int (&start)[kRank], BK_WHERE) {
  emulator::tma_load(dst, map, barrier, start, kRank, where);
}

template <int kRank>
void tma_load_multicast(void* dst, const TensorMap& map, Mbarrier* barrier, const int (&start)[kRank], uint16_t blocks,
                        BK_WHERE) {
  emulator::tma_load_multicast(dst, map, barrier, start, kRank, blocks, where);
}

template <int kRank>
void tma_store(const TensorMap& map, const void* src, const int (&start)[kRank], BK_WHERE) {
  emulator::tma_store(map, src, start, kRank, false, "tma_store", where);
}

template <int kRank>
void tma_reduce_add(const TensorMap& map, const void* src, const int (&start)[kRank], BK_WHERE) {
  emulator::tma_store(map, src, start, kRank, true, "tma_reduce_add", where);
}

void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier, BK_WHERE);
void bulk_store(void* dst, const void* src, uint32_t bytes, BK_WHERE);

template <class T>
void bulk_reduce_add(T* dst, const T* src, uint32_t bytes, BK_WHERE) {
  emulator::bulk_reduce_add(dst, src, bytes, emulator::element_of<T>(), where);
}

void bulk_commit();

template <int N>
void bulk_wait_read() {
  emulator::bulk_wait(N, false);
}

template <int N>
void bulk_wait() {
  emulator::bulk_wait(N, true);
}

}  // namespace bigkern
