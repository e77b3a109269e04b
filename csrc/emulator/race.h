// The race checker (build "race"): happens-before between the threads of a launch, by vector clocks, over shared and
// global memory. The kernels are compiled with -fsanitize=thread, whose calls race_hooks.cpp answers.
//
// A thread's accesses are numbered by its block's generation (how many __syncthreads the block has passed) and, within
// a generation, by the thread's own clock. Two accesses of which one writes race unless the second thread knows the
// first one's number. Knowledge spreads
//   within a block   at __syncthreads (all), __syncwarp, and through SyncClocks: named barriers, mbarriers
//   in a cluster     at cluster_sync (all), and through mbarriers
//   across blocks    as the PTX memory model says: through release and acquire operations on one address, or relaxed
//                    ones with a fence before the write and a fence after the read
// In other builds everything here is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/where.h"

namespace bigkern::emulator {

struct Block;
struct Cluster;
struct Fiber;

enum class Access { kRead, kWrite, kAtomic, kAtomicRead };
// TMA and wgmma reach shared memory through the asynchronous proxy, for which a thread's own writes become visible
// only by its fence.proxy.async.
enum class Proxy { kGeneric, kAsync };

#if defined(BK_EMULATE_RACE)

// What is known of the accesses of one block: all of earlier generations, and those of `generation` up to each
// thread's clock.
struct BlockKnowledge {
  uint32_t block;
  uint32_t generation;
  std::shared_ptr<const std::vector<uint32_t>> clocks;
};
using Knowledge = std::vector<BlockKnowledge>;  // sorted by block
using KnowledgePtr = std::shared_ptr<const Knowledge>;

struct FiberRace {
  uint32_t clock = 1;
  uint32_t generation = 0;      // for which `known` holds
  bool joined = false;          // anything but zeros in `known`
  uint32_t proxy_epoch = 1;     // counts this thread's fence.proxy.async
  std::vector<uint32_t> known;  // clocks of the block's threads
  KnowledgePtr foreign;         // other blocks
  KnowledgePtr released;        // state at the last fence: what a relaxed write publishes
  KnowledgePtr pending;         // read by relaxed reads, known after the next fence
  const void* pc = nullptr;     // of the access under way
};

struct BlockRace {
  uint32_t id = 0;  // unique among all blocks of the process
  uint32_t generation = 1;
  bool exchanged = false;  // some thread has released or acquired
};

// What one synchronisation object within a block carries from those who release to those who acquire.
struct SyncClock {
  uint32_t generation = 0;
  std::vector<uint32_t> clocks;
  KnowledgePtr foreign;
  KnowledgePtr released;  // fences made before: they count for the atomics of whoever acquires
};

// What the barrier of a cluster carries from all its threads to all.
struct ClusterClock {
  std::vector<SyncClock> arrived;  // by rank
  SyncClock completed;
};

// An access by emulated hardware on behalf of a fiber: a copy, a matrix load, an atomic. Also counts the bytes.
void record_access(Fiber* fiber, const void* address, size_t bytes, Access access, Proxy proxy = Proxy::kGeneric,
                   Where where = {});

// An asynchronous write begins: until its kWrite is recorded nobody may touch the bytes.
void record_copy_issue(Fiber* fiber, const void* address, size_t bytes, Proxy proxy = Proxy::kGeneric,
                       Where where = {});

void happens_before_release(SyncClock& clock, Fiber* fiber);
void happens_before_acquire(const SyncClock& clock, Fiber* fiber);
void happens_before_join(Fiber* const* fibers, int count);  // all to all
void happens_before_barrier(Block& block);                  // all threads of the block

// From a thread to one of another block of its cluster.
void happens_before_release_remote(SyncClock& clock, Fiber* fiber);
void happens_before_acquire_remote(const SyncClock& clock, Fiber* fiber);

// The cluster's barrier: every thread arrives, the phase ends, every thread has waited.
void cluster_arrived(Cluster& cluster, Fiber* fiber);
void cluster_phase_ended(Cluster& cluster);
void cluster_waited(const Cluster& cluster, Fiber* fiber);

// Synchronisation through memory.
void release_store(Fiber* fiber, const void* address);
void acquire_load(Fiber* fiber, const void* address);
void relaxed_store(Fiber* fiber, const void* address);
void relaxed_load(Fiber* fiber, const void* address);
void relaxed_update(Fiber* fiber, const void* address);  // an atomic that reads and writes
void fence(Fiber* fiber);
void fence_async_proxy(Fiber* fiber);

void race_start_launch(unsigned blocks);
void race_start_block(Block& block);

#else

struct FiberRace {};
struct BlockRace {};
struct SyncClock {};
struct ClusterClock {};
inline void record_access(Fiber*, const void*, size_t, Access, Proxy = Proxy::kGeneric, Where = {}) {}
inline void record_copy_issue(Fiber*, const void*, size_t, Proxy = Proxy::kGeneric, Where = {}) {}
inline void happens_before_release(SyncClock&, Fiber*) {}
inline void happens_before_acquire(const SyncClock&, Fiber*) {}
inline void happens_before_join(Fiber* const*, int) {}
inline void happens_before_barrier(Block&) {}
inline void happens_before_release_remote(SyncClock&, Fiber*) {}
inline void happens_before_acquire_remote(const SyncClock&, Fiber*) {}
inline void cluster_arrived(Cluster&, Fiber*) {}
inline void cluster_phase_ended(Cluster&) {}
inline void cluster_waited(const Cluster&, Fiber*) {}
inline void release_store(Fiber*, const void*) {}
inline void acquire_load(Fiber*, const void*) {}
inline void relaxed_store(Fiber*, const void*) {}
inline void relaxed_load(Fiber*, const void*) {}
inline void relaxed_update(Fiber*, const void*) {}
inline void fence(Fiber*) {}
inline void fence_async_proxy(Fiber*) {}
inline void race_start_launch(unsigned) {}
inline void race_start_block(Block&) {}

#endif

}  // namespace bigkern::emulator
