// What kernels compiled with -fsanitize=thread call at every access. libtsan is not linked: it would take the
// emulator's fibers for one thread.
#if defined(BK_EMULATE_RACE)

#include <cstddef>
#include <cstdint>

#include "emulator/core.h"
#include "emulator/race_internal.h"

using bigkern::emulator::Access;
using bigkern::emulator::current;
using bigkern::emulator::instrumented_access;

namespace {

inline bool watched() {
  return current && !current->in_runtime;
}

}  // namespace

#define BK_HOOK extern "C" void
#define BK_ON_ACCESS(name, bytes, kind)                                                               \
  BK_HOOK name(void* p) {                                                                             \
    if (watched()) instrumented_access(current, p, bytes, Access::kind, __builtin_return_address(0)); \
  }
// A volatile access is a relaxed one.
#define BK_ON_SIZE(bytes)                                                         \
  BK_ON_ACCESS(__tsan_read##bytes, bytes, kRead)                                  \
  BK_ON_ACCESS(__tsan_write##bytes, bytes, kWrite)                                \
  BK_ON_ACCESS(__tsan_unaligned_read##bytes, bytes, kRead)                        \
  BK_ON_ACCESS(__tsan_unaligned_write##bytes, bytes, kWrite)                      \
  BK_ON_VOLATILE(__tsan_volatile_read##bytes, bytes, kAtomicRead, load)           \
  BK_ON_VOLATILE(__tsan_volatile_write##bytes, bytes, kAtomic, store)             \
  BK_ON_VOLATILE(__tsan_unaligned_volatile_read##bytes, bytes, kAtomicRead, load) \
  BK_ON_VOLATILE(__tsan_unaligned_volatile_write##bytes, bytes, kAtomic, store)
#define BK_ON_VOLATILE(name, bytes, kind, direction)                                   \
  BK_HOOK name(void* p) {                                                              \
    if (!watched()) return;                                                            \
    instrumented_access(current, p, bytes, Access::kind, __builtin_return_address(0)); \
    bigkern::emulator::RuntimeScope scope;                                             \
    bigkern::emulator::relaxed_##direction(current, p);                                \
  }

BK_ON_SIZE(1)
BK_ON_SIZE(2)
BK_ON_SIZE(4)
BK_ON_SIZE(8)
BK_ON_SIZE(16)

BK_HOOK __tsan_read_range(void* p, size_t bytes) {
  if (watched()) instrumented_access(current, p, bytes, Access::kRead, __builtin_return_address(0));
}
BK_HOOK __tsan_write_range(void* p, size_t bytes) {
  if (watched()) instrumented_access(current, p, bytes, Access::kWrite, __builtin_return_address(0));
}

BK_HOOK __tsan_init() {}
BK_HOOK __tsan_func_entry(void*) {}
BK_HOOK __tsan_func_exit() {}
BK_HOOK __tsan_vptr_read(void**) {}
BK_HOOK __tsan_vptr_update(void**, void*) {}
BK_HOOK __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
BK_HOOK __tsan_atomic_signal_fence(int) {}

// std::atomic and the guards of function-local statics in host code beside the kernels; kernels use CUDA's atomics.
#define BK_ON_ATOMIC(bits, T)                                                                           \
  extern "C" T __tsan_atomic##bits##_load(const T* p, int) {                                            \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                     \
  BK_HOOK __tsan_atomic##bits##_store(T* p, T value, int) {                                             \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                     \
  extern "C" T __tsan_atomic##bits##_exchange(T* p, T value, int) {                                     \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                     \
  extern "C" T __tsan_atomic##bits##_fetch_add(T* p, T value, int) {                                    \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                     \
  extern "C" T __tsan_atomic##bits##_fetch_sub(T* p, T value, int) {                                    \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                     \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(T* p, T* expected, T value, int, int) { \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }

BK_ON_ATOMIC(8, uint8_t)
BK_ON_ATOMIC(16, uint16_t)
BK_ON_ATOMIC(32, uint32_t)
BK_ON_ATOMIC(64, uint64_t)

// Copies the compiler leaves to the C library (linked with --wrap).
extern "C" {

void* __real_memcpy(void*, const void*, size_t);
void* __real_memmove(void*, const void*, size_t);
void* __real_memset(void*, int, size_t);

void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  if (watched()) {
    instrumented_access(current, from, bytes, Access::kRead, __builtin_return_address(0));
    instrumented_access(current, to, bytes, Access::kWrite, __builtin_return_address(0));
  }
  return __real_memcpy(to, from, bytes);
}

void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  if (watched()) {
    instrumented_access(current, from, bytes, Access::kRead, __builtin_return_address(0));
    instrumented_access(current, to, bytes, Access::kWrite, __builtin_return_address(0));
  }
  return __real_memmove(to, from, bytes);
}

void* __wrap_memset(void* to, int value, size_t bytes) {
  if (watched()) instrumented_access(current, to, bytes, Access::kWrite, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}

}  // extern "C"

#endif
