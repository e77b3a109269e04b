// Bank conflicts of shared memory, counted when Options::bank_conflicts is on.
//
// Shared memory has 32 banks of 4 bytes. A warp's access of up to 4 bytes a lane is one phase, of 8 bytes two (half a
// warp each), of 16 bytes four (a quarter each); ldmatrix and stmatrix take a phase for each 8x8 tile, and cp.async
// counts as a store of 16 bytes. A phase takes as many wavefronts as the busiest bank has different words in it: lanes
// at the same word do not conflict. Phases without a lane are not counted.
//
//   ldmatrix, stmatrix   exact, in every build
//   cp.async             in every build; as ordinary stores below
//   loads and stores     in the race build only, whose instrumentation sees them
//
// A lane's n-th access from one place in the code since the warp was last aligned (a collective of all its lanes, or
// __syncthreads) is taken for the same instruction as the other lanes' n-th. That is the warp's access when the lanes
// loop alike; lanes that skip an iteration are matched with others' later one. What the compiler made of the source is
// counted, so neighbouring accesses may have been joined to a wider one or an access repeated in unrolled code.
//
// Not counted: atomics, ld_acquire and its kin, TMA and wgmma. How the hardware serialises the first is not documented;
// TMA and wgmma are free of conflicts or not by the swizzle of their tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/where.h"

namespace bigkern::emulator {

struct Block;
struct Fiber;

struct BankTotals {
  uint64_t accesses = 0;    // of warps
  uint64_t ideal = 0;       // wavefronts without conflicts: the phases
  uint64_t wavefronts = 0;  // those it takes
};

struct BankPlace {
  std::string place;
  bool store;
  BankTotals totals;
};

struct BankReport {
  BankTotals loads, stores;
  std::vector<BankPlace> worst;  // places with conflicts, most conflicts first
};

// Of the blocks that ended well since the last clear.
BankReport bank_report();
void clear_bank_report();

class BankCounter;

BankCounter& start_bank_counter(Block& block);

// These do nothing when the block has no counter.

// A lane's access from the code at `pc`, which names the place unless `where` does.
void count_bank_access(const Fiber& fiber, const void* address, size_t bytes, bool store, const void* pc,
                       Where where = {});

// ldmatrix or stmatrix by the fiber's warp; rows: of `tiles` 8x8 tiles, 8 each.
void count_bank_tiles(const Fiber& fiber, void* const* rows, int tiles, bool store, Where where);

// All lanes of the fiber's warp, or of the block, stand at the same place.
void align_banks(const Fiber& fiber);
void align_banks(const Block& block);

}  // namespace bigkern::emulator
