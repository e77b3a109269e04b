#include "emulator/atomics.h"

#include <atomic>
#include <string>

namespace bigkern::emulator {

void check_atomic(const void* p, size_t bytes, const char* operation, Where where) {
  check_global_alignment(p, bytes, operation, where);
}

}  // namespace bigkern::emulator

void __threadfence() {
  using namespace bigkern::emulator;
  RuntimeScope scope;
  fence(current);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void __threadfence_block() {
  __threadfence();
}
void __threadfence_system() {
  __threadfence();
}

void __nanosleep(unsigned, bigkern::emulator::Where where) {
  bigkern::emulator::RuntimeScope scope;
  bigkern::emulator::spin_point("__nanosleep", where);
}
