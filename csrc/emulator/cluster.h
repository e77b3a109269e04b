// Clusters of blocks; see device/cuda/cluster.cuh. The blocks of a cluster run interleaved on one worker.
//
// Besides deadlocks and, in the race build, races, reported are: an access to another block before the cluster's first
// barrier or after that block has ended; a block that ends while the last access to it is followed neither by the
// cluster's barrier nor by an arrival it has waited for; and a thread that ends between arriving and waiting.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "emulator/core.h"
#include "emulator/mbarrier.h"
#include "emulator/shared_memory.h"
#include "emulator/warp.h"

namespace bigkern {

namespace emulator {

// An object in the shared memory of a block of the cluster.
struct RemotePlace {
  Block* owner;
  char* address;
};

// Where block `rank` has what the running block has at p.
RemotePlace remote_place(const void* p, uint32_t rank, const char* operation, Where where);
// The place an address of the cluster stands for.
RemotePlace remote_place(uint32_t address, const char* operation, Where where);

// Fails unless the running thread may use the bytes now.
void check_remote(const RemotePlace& place, size_t bytes, size_t align, const char* operation, Where where);
// The same for a use whose end nothing tells the owner.
void note_remote_use(const RemotePlace& place, size_t bytes, size_t align, const char* operation, Where where);

void load_remote(void* value, uint32_t address, size_t bytes, Where where);
void store_remote(uint32_t address, const void* value, size_t bytes, Where where);
void store_remote_async(const void* p, const void* value, size_t bytes, Mbarrier* barrier, uint32_t rank, Where where);

// Runs an asynchronous copy into the block's shared memory now or leaves it for later. Copies complete in any order, so
// each draws for itself.
void issue_copy(Block& owner, std::function<void()> copy);

void cluster_thread_exits(Fiber& fiber);
void cluster_block_exits(Block& block);

}  // namespace emulator

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(BK_WHERE);
void cluster_wait(BK_WHERE);

inline void cluster_sync(BK_WHERE) {
  cluster_arrive(where);
  cluster_wait(where);
}

// An address of the cluster is a shared address with the block's rank, plus 1, above it: as on the device, a block's
// own shared addresses are addresses of the cluster too.
uint32_t cluster_address(const void* p, uint32_t rank, BK_WHERE);

template <class T>
BK_UNINSTRUMENTED T ld_cluster(uint32_t address, BK_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "ld_cluster: 4, 8 or 16 bytes");
  T value;
  emulator::load_remote(&value, address, sizeof(T), where);
  return value;
}

template <class T>
BK_UNINSTRUMENTED void st_cluster(uint32_t address, T value, BK_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_cluster: 4, 8 or 16 bytes");
  emulator::store_remote(address, &value, sizeof(T), where);
}

template <class T>
BK_UNINSTRUMENTED void st_async(T* p, T value, Mbarrier* barrier, uint32_t rank, BK_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_async: 4, 8 or 16 bytes");
  emulator::store_remote_async(p, &value, sizeof(T), barrier, rank, where);
}

}  // namespace bigkern
