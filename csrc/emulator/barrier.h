// Barriers of a block.
#pragma once

#include "emulator/core.h"

void __syncthreads(bigkern::emulator::Where where = bigkern::emulator::Where::here());

namespace bigkern {

void named_barrier(int id, int threads, emulator::Where where = emulator::Where::here());
void named_barrier_arrive(int id, int threads, emulator::Where where = emulator::Where::here());

}  // namespace bigkern
