// Shared memory, asynchronous copies (sm_80) and ordered global accesses.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// A static shared variable: BK_SHARED(float, tile, [32][33]);
#define BK_SHARED(T, name, ...) __shared__ T name __VA_ARGS__

namespace bigkern {

// The address asm operands of the .shared space take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Carves the launch's dynamic shared memory into arrays. The base is aligned to 1024 bytes, the size of TMA's and
// wgmma's largest swizzle atom, so take those tiles first.
class SharedMemory {
 public:
  template <class T>
  __device__ __forceinline__ T* take(uint32_t count, uint32_t align = 16) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    offset_ = (offset_ + align - 1) / align * align;
    T* p = reinterpret_cast<T*>(dynamic_shared_memory + offset_);
    offset_ += count * static_cast<uint32_t>(sizeof(T));
    return p;
  }

 private:
  uint32_t offset_ = 0;
};

// Starts a copy of 16 bytes from global to shared memory; without pred it writes zeros and reads nothing.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool pred = true) {
  const int bytes = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
               : "memory");
}

// Closes this thread's open group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups are in flight. Other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Device-scope loads and stores for data other blocks exchange; T has 4 bytes (acquire, release) or 2, 4, 8 or 16
// bytes (relaxed). A 16-byte access may tear between its 4-byte words.
template <class T>
__device__ __forceinline__ T ld_acquire(const T* p) {
  static_assert(sizeof(T) == 4, "ld_acquire: 4 bytes");
  T value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(p) : "memory");
  return value;
}

template <class T>
__device__ __forceinline__ void st_release(T* p, T value) {
  static_assert(sizeof(T) == 4, "st_release: 4 bytes");
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");
}

template <class T>
__device__ __forceinline__ T ld_relaxed(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "ld_relaxed: 2 to 16 bytes");
  T value;
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.relaxed.gpu.global.b16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(value)) : "l"(p) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(p) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "l"(p) : "memory");
  } else {
    uint4& word = reinterpret_cast<uint4&>(value);
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(p)
                 : "memory");
  }
  return value;
}

template <class T>
__device__ __forceinline__ void st_relaxed(T* p, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_relaxed: 2 to 16 bytes");
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(p), "h"(reinterpret_cast<uint16_t&>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(reinterpret_cast<uint64_t&>(value)) : "memory");
  } else {
    const uint4& word = reinterpret_cast<const uint4&>(value);
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
  }
}

__device__ __forceinline__ void fence_acq_rel_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Barrier number id (1 to 15; 0 is __syncthreads) for threads threads, a multiple of 32. Each of them either waits
// (named_barrier) or only counts in (named_barrier_arrive).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace bigkern
