#include "emulator/barrier.h"

#include <string>

#include "emulator/scheduler.h"

using namespace bigkern::emulator;

void __syncthreads(Where where) {
  RuntimeScope scope;
  Fiber* fiber = current;
  Block& block = *fiber->block;
  BlockBarrier& barrier = block.barrier;
  if (block.live != block.threads && fiber->scheduler->options().strict_exit) {
    fail("__syncthreads after " + std::to_string(block.threads - block.live) + " threads of the block have exited",
         where);
  }
  if (barrier.arrived == 0) {
    barrier.where = where;
  } else if (barrier.where.line != where.line || !same_operation(barrier.where.file, where.file)) {
    fail_mismatch("__syncthreads", where, "__syncthreads", barrier.where);
  }
  barrier.fiber[barrier.arrived++] = fiber;
  if (barrier.arrived < block.live) {
    bigkern::emulator::wait("__syncthreads", where);
    return;
  }
  happens_before_barrier(block);
  align_banks(block);
  const int count = barrier.arrived;
  barrier.arrived = 0;
  release_together(barrier.fiber, count);
}

namespace {

void arrive(int id, int threads, bool waits, Where where) {
  RuntimeScope scope;
  Fiber* fiber = current;
  if (id < 1 || id >= kNamedBarriers) {
    fail("named barrier " + std::to_string(id) + ": the numbers are 1 to 15", where);
  }
  if (threads <= 0 || threads % kWarpSize != 0 || threads > fiber->block->threads) {
    fail("named barrier " + std::to_string(id) + ": " + std::to_string(threads) +
             " threads; needs a multiple of 32 up to the block's " + std::to_string(fiber->block->threads),
         where);
  }
  NamedBarrier& barrier = fiber->block->named[id];
  if (barrier.arrived == 0) {
    barrier.needed = threads;
    barrier.where = where;
  } else if (barrier.needed != threads) {
    fail("named barrier " + std::to_string(id) + ": counts " + std::to_string(threads) + " and " +
             std::to_string(barrier.needed) + " (" + barrier.where.text() + ") meet",
         where);
  }
  happens_before_release(barrier.clock, fiber);
  if (waits) barrier.waiting.push_back(fiber);
  if (++barrier.arrived < barrier.needed) {
    if (waits) bigkern::emulator::wait("named_barrier", where);
    return;
  }
  for (Fiber* waiter : barrier.waiting) happens_before_acquire(barrier.clock, waiter);
  const std::vector<Fiber*> released = std::move(barrier.waiting);
  barrier = NamedBarrier{};
  release_together(released.data(), static_cast<int>(released.size()));
}

}  // namespace

namespace bigkern {

void named_barrier(int id, int threads, emulator::Where where) {
  arrive(id, threads, true, where);
}
void named_barrier_arrive(int id, int threads, emulator::Where where) {
  arrive(id, threads, false, where);
}

}  // namespace bigkern
