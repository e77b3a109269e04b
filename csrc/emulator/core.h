// The emulator's core, on which every emulated operation is built (kernels never see these names).
//
// Every CUDA thread is a fiber with a stack of its own. A block lives on one OS thread, its worker, from start to end;
// within a worker exactly one fiber runs at a time, until it waits. So emulator code needs no locks within a block, and
// an operation that does not call wait(), warp_collective() or spin_point() is atomic.
//
//   current                the running fiber; null on the host
//   fail()                 ends the launch with an error
//   wait(), make_ready()   park the running fiber, put a parked one back
//   warp_collective()      the lanes of a mask meet: all deposit an argument, the last one computes for all
//   spin_point()           must be called by anything a kernel may poll
//   Block::pending         operations that may complete at any time; run when nothing else can, or earlier
//   Cluster                the blocks that reach each other's shared memory (cluster.h)
//   extension<T>(block)    a block's state that belongs to one feature
//   race.h                 record_access() and the happens-before edges the race checker needs
//   bank_conflicts.h       what counts the bank conflicts of shared memory
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/bank_conflicts.h"
#include "emulator/fiber.h"
#include "emulator/race.h"
#include "emulator/where.h"

namespace bigkern::emulator {

struct Block;
struct Cluster;
struct Warp;
class Scheduler;

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Draws, once for every interval between two waits, whether the operations of the interval take effect when they are
// issued or when they are waited for. Drawing for each operation would hide a missing wait: one early completion
// carries all earlier ones with it.
class AsyncInterval {
 public:
  bool late();
  void end() { drawn_ = -1; }

 private:
  int drawn_ = -1;
};

struct CopyRequest {
  void* destination;
  const void* source;
  int bytes;
  int copied;  // the rest is filled with zeros
  Where where;
};

// What a switch touches comes first, in two lines of the cache.
struct alignas(64) Fiber {
  Context context;
  Block* block = nullptr;
  Warp* own_warp = nullptr;
  Scheduler* scheduler = nullptr;
  int lane = 0;
  int warp = 0;
  uint3 thread_index{};
  int index = 0;            // within the block
  bool in_runtime = false;  // instrumented accesses of emulator code are not the kernel's
  bool done = false;
  unsigned spins = 0;
  const char* waiting_for = "";
  Where waiting_at;
  Stack stack;
  std::vector<CopyRequest> copies;  // cp.async that have not taken effect, oldest first
  std::vector<size_t> copy_groups;  // how many of them each group in flight committed, oldest first
  size_t open_copies = 0;           // how many of them are not committed
  AsyncInterval copy_interval;
  uint32_t cluster_arrivals = 0;  // how often it has arrived at its cluster's barrier, and waited there
  uint32_t cluster_waits = 0;
  FiberRace race;
};

// The running fiber. Fibers never change their OS thread.
extern __thread Fiber* current;

// What kernels read most. By value and uninstrumented, so that the race checker does not take them for global memory.
BK_UNINSTRUMENTED inline uint3 thread_index() {
  return current->thread_index;
}
BK_UNINSTRUMENTED inline int lane_index() {
  return current->lane;
}
BK_UNINSTRUMENTED inline uint3 block_index();
BK_UNINSTRUMENTED inline dim3 block_dim();
BK_UNINSTRUMENTED inline dim3 grid_dim();

// Marks the running fiber as executing emulator code while it lives.
class RuntimeScope {
 public:
  BK_UNINSTRUMENTED RuntimeScope() : fiber_(current), outer_(fiber_ && fiber_->in_runtime) {
    if (fiber_) fiber_->in_runtime = true;
  }
  BK_UNINSTRUMENTED ~RuntimeScope() {
    if (fiber_) fiber_->in_runtime = outer_;
  }
  RuntimeScope(const RuntimeScope&) = delete;
  RuntimeScope& operator=(const RuntimeScope&) = delete;

 private:
  Fiber* fiber_;
  bool outer_;
};

// Ends the launch. The message gets the place and the running fiber's block and thread added.
[[noreturn]] void fail(const std::string& message, Where where = {nullptr, 0});

// Parks the running fiber until somebody calls make_ready() on it.
void wait(const char* what, Where where);
void make_ready(Fiber* fiber);
void make_ready(Fiber* const* fibers, int count);

// Makes fibers ready, the running one possibly among them, and goes on with whichever the order prefers.
void release_together(Fiber* const* fibers, int count);

// To be called by every operation a kernel may poll in a loop: lets others run, and reports a livelock.
void spin_point(const char* what, Where where);
// Something a polling thread may wait for has changed.
void note_progress();

uint32_t random_bits();

[[noreturn]] void fail_mismatch(const char* operation, Where where, const char* met, Where met_where);
bool same_operation(const char* a, const char* b);

// A meeting of the lanes of a mask.
struct WarpMeeting {
  unsigned mask = 0;
  int needed = 0;
  int arrived = 0;
  const char* operation = nullptr;
  Where where;
  void* argument[kWarpSize];
  Fiber* fiber[kWarpSize];
};

// Where a whole warp's lanes put registers and get them back. In a collective that has long been under way another
// lane's stack is cold. Inputs are of the meeting to come, outputs of the last one: a lane that runs ahead writes
// inputs only, and outputs change when all have fetched theirs and met again.
struct alignas(64) WarpRegisters {
  uint16_t left[16][16];
  uint16_t right[16][8];
  float left_tf32[16][8];
  float right_tf32[8][8];
  uint32_t stored_tiles[4][8][4];

  float product[16][8];
  uint16_t loaded_tiles[4][8][8];
};

// One warp. Lanes may meet in disjoint groups at the same time, each with its own mask.
struct Warp {
  unsigned alive = 0;  // lanes that have not exited
  int open = 0;        // meetings that lanes wait in
  WarpMeeting meetings[4];
  WarpRegisters registers;
};

// The slot of the meeting that the mask names; fails when the mask is wrong.
WarpMeeting& find_meeting(Fiber& fiber, Warp& warp, const char* operation, unsigned mask, Where where);

// All lanes of mask meet. Each deposits `argument`; the last to arrive calls execute(meeting) while the others still
// wait, and sees each lane's argument at argument[lane].
template <class Execute>
BK_UNINSTRUMENTED void warp_collective(const char* operation, unsigned mask, void* argument, Where where,
                                       Execute execute) {
  Fiber* fiber = current;
  Warp& warp = *fiber->own_warp;
  WarpMeeting* meeting = warp.meetings;
  // What nearly always holds: the whole warp meets, and no other group does.
  if (mask != warp.alive || !(mask >> fiber->lane & 1) || warp.open > 1 ||
      (warp.open == 1 && (meeting->arrived == 0 || meeting->mask != mask))) {
    meeting = &find_meeting(*fiber, warp, operation, mask, where);
  }
  if (meeting->arrived == 0) {
    warp.open++;
    meeting->operation = operation;
    meeting->mask = mask;
    meeting->needed = __builtin_popcount(mask);
    meeting->where = where;
  } else if (meeting->where.line != where.line || !same_operation(meeting->operation, operation)) {
    fail_mismatch(operation, where, meeting->operation, meeting->where);
  }
  meeting->argument[fiber->lane] = argument;
  meeting->fiber[meeting->arrived++] = fiber;
  if (meeting->arrived < meeting->needed) {
    wait(operation, where);
    return;
  }
  {
    RuntimeScope scope;
    execute(*meeting);
  }
  if (mask == warp.alive) align_banks(*fiber);
  const int count = meeting->arrived;
  meeting->arrived = 0;
  warp.open--;
  make_ready(meeting->fiber, count - 1);
}

// State of one feature within a block. It is made when first asked for and lives until the block ends.
struct BlockExtension {
  virtual ~BlockExtension() = default;
  // Called when a thread returns from the kernel and when the last one has; may fail().
  virtual void on_thread_exit(Fiber&) {}
  virtual void on_block_exit(Block&) {}
};

constexpr int kNamedBarriers = 16;

struct NamedBarrier {
  int needed = 0;
  int arrived = 0;
  std::vector<Fiber*> waiting;
  Where where;
  SyncClock clock;
};

// __syncthreads of a block.
struct BlockBarrier {
  int arrived = 0;
  Where where;
  Fiber* fiber[kMaxThreads];
};

struct SharedVariable {
  const void* tag;
  char* address;
  size_t bytes, align;
};

constexpr size_t kArenaBytes = 256 << 10;

// What one block of a cluster last did to the shared memory of another, without being known to be done.
struct RemoteUse {
  const Fiber* fiber = nullptr;  // null: nothing
  uint64_t number = 0;           // counts such uses in the cluster
  uint32_t phase = 0;            // of the cluster's barrier, behind which it is done
  const char* operation = "";
  Where where;
};

// Blocks that run together; without clusters, each block is one of its own.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint64_t uses = 0;
  uint32_t phases = 0;  // of the barrier, complete
  int arrived = 0;      // in the next one
  Where where;          // the first arrival
  std::vector<Fiber*> waiting;
  ClusterClock clock;
};

struct Block {
  uint3 index{};
  unsigned linear = 0;  // of the grid
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::vector<RemoteUse> remote_uses;  // of this block's shared memory, by the other block's rank
  int threads = 0;
  int live = 0;  // threads that have not exited
  dim3 block_dim, grid_dim;

  // Shared memory: dynamic from the bottom up, static variables from the top down.
  char* arena = nullptr;
  size_t dynamic_bytes = 0;
  size_t static_start = 0;
  size_t carved = 0;  // AddressSanitizer: how much of the arena SharedMemory::take has opened
  std::vector<SharedVariable> variables;

  BlockBarrier barrier;
  NamedBarrier named[kNamedBarriers];
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  std::vector<std::function<void()>> pending;
  std::vector<std::pair<const void*, std::unique_ptr<BlockExtension>>> extensions;
  BankCounter* bank_counter = nullptr;  // null: not asked for
  BlockRace race;
};

inline uint3 block_index() {
  return current->block->index;
}
inline dim3 block_dim() {
  return current->block->block_dim;
}
inline dim3 grid_dim() {
  return current->block->grid_dim;
}

template <class State>
BK_UNINSTRUMENTED State& extension(Block& block) {
  static const char tag = 0;
  for (auto& entry : block.extensions) {
    if (entry.first == &tag) return static_cast<State&>(*entry.second);
  }
  RuntimeScope scope;
  block.extensions.emplace_back(&tag, std::make_unique<State>());
  return static_cast<State&>(*block.extensions.back().second);
}

// Offset in the arena; fails unless [p, p + bytes) is this block's shared memory and aligned.
size_t check_shared(const void* p, size_t bytes, size_t align, const char* operation, Where where);
void check_global_alignment(const void* p, size_t align, const char* operation, Where where);

}  // namespace bigkern::emulator
