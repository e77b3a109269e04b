// cp.async: copies a thread starts from global to shared memory, in groups it waits for in order.
#pragma once

#include "emulator/core.h"
#include "emulator/warp.h"

namespace bigkern {

namespace emulator {

void copy_async_wait(size_t groups_left);

}  // namespace emulator

void cp_async16(void* destination, const void* source, bool pred = true, BK_WHERE);
void cp_async_commit();

template <int N>
void cp_async_wait() {
  emulator::copy_async_wait(N);
}

}  // namespace bigkern
