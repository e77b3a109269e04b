// Clusters (sm_90): up to 8 blocks that run at the same time, synchronise, and reach each other's shared memory.
//
// A block's memory is reached only while the block runs. So a cluster_sync stands before the first access to another
// block, which may not have started, and after the last one, since the other block may otherwise have ended.
#pragma once

#include "device/cuda/mbarrier.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace bigkern {

// This block's place in its cluster, 0 to cluster_size() - 1.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of the cluster, in two halves: what a thread wrote before it arrives is seen by all after
// they have waited. Each thread waits before it arrives again or ends.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the object at p in this block's shared memory lies in that of block `rank`, for ld_cluster and st_cluster.
__device__ __forceinline__ uint32_t cluster_address(const void* p, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// Loads and stores of 4, 8 or 16 bytes at an address in the cluster. They order nothing.
template <class T>
__device__ __forceinline__ T ld_cluster(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "ld_cluster: 4, 8 or 16 bytes");
  T value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];"
                 : "=r"(reinterpret_cast<uint32_t&>(value))
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared::cluster.b64 %0, [%1];"
                 : "=l"(reinterpret_cast<uint64_t&>(value))
                 : "r"(address)
                 : "memory");
  } else {
    uint4& word = reinterpret_cast<uint4&>(value);
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "r"(address)
                 : "memory");
  }
  return value;
}

template <class T>
__device__ __forceinline__ void st_cluster(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_cluster: 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(reinterpret_cast<uint64_t&>(value)) : "memory");
  } else {
    const uint4& word = reinterpret_cast<const uint4&>(value);
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
  }
}

// Stores value where p lies in block `rank`, at some time before the bytes, 4, 8 or 16, count on that block's barrier:
// whoever waits there for the phase sees it, though not, without mbarrier_wait_cluster, what this thread wrote before.
template <class T>
__device__ __forceinline__ void st_async(T* p, T value, Mbarrier* barrier, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_async: 4, 8 or 16 bytes");
  const uint32_t to = cluster_address(p, rank), on = cluster_address(barrier, rank);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(reinterpret_cast<uint32_t&>(value)), "r"(on)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
                 "l"(reinterpret_cast<uint64_t&>(value)), "r"(on)
                 : "memory");
  } else {
    const uint4& word = reinterpret_cast<const uint4&>(value);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(on)
        : "memory");
  }
}

// Arrives on the mbarrier that block `rank` has where this block has barrier. What this thread did before is known to
// those who wait for the phase with mbarrier_wait_cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(Mbarrier* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
               : "memory");
}

// mbarrier_wait on this block's barrier for a phase in which other blocks' threads arrive or store.
__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity & 1)
        : "memory");
  } while (!done);
}

}  // namespace bigkern
