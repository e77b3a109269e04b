// What a test may choose about a launch. Read when a kernel is launched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bigkern::emulator {

// The order in which ready threads run. A thread runs until it waits, so the order decides which interleavings of a
// wrong kernel are seen: kForward and kReverse are the extremes, kRandom mixes, and kPriority gives every warp a fixed
// random rank, so that a few warps run far ahead of the others.
enum class Order { kForward, kReverse, kRandom, kPriority };

// When asynchronous copies and products take effect. Both ends are legal on hardware, so a correct kernel must bear
// each. kDrawn takes one of them at random for every interval between two waits under kRandom and kPriority, and is
// kAtWait under the fixed orders.
enum class AsyncMode { kAtIssue, kAtWait, kDrawn };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  int workers = 0;   // OS threads the blocks are spread over; 0: one for each core
  int resident = 1;  // blocks, or clusters, a worker keeps in flight; a cooperative launch keeps all of them
  AsyncMode async_mode = AsyncMode::kDrawn;
  bool bank_conflicts = false;        // count them (bank_conflicts.h); slower
  bool strict_exit = true;            // a thread that exits while others still meet at __syncthreads is an error
  int multiprocessors = 4;            // what multiprocessor_count() answers
  int blocks_per_multiprocessor = 2;  // what occupancy() answers
  size_t max_shared_bytes = 227 << 10;
  int compute_capability = 80;  // what compute_capability() answers, by which launchers choose their path
};

Options& options();

}  // namespace bigkern::emulator
