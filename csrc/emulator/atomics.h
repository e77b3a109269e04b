// Atomics, fences, and the ordered accesses of device/cuda/memory.cuh.
//
// An atomic is relaxed, as in CUDA: it orders nothing by itself. The race checker demands a fence before the write that
// publishes data and one after the read that finds it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "emulator/core.h"
#include "emulator/warp.h"

namespace bigkern::emulator {

void check_atomic(const void* p, size_t bytes, const char* operation, Where where);

template <class T, class Update>
BK_UNINSTRUMENTED T atomic_update(const char* operation, T* p, Where where, Update update) {
  RuntimeScope scope;
  check_atomic(p, sizeof(T), operation, where);
  record_access(current, p, sizeof(T), Access::kAtomic, Proxy::kGeneric, where);
  relaxed_update(current, p);
  T old, next;
  __atomic_load(p, &old, __ATOMIC_SEQ_CST);
  do {
    next = update(old);
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  if (__builtin_memcmp(&old, &next, sizeof(T)) != 0) note_progress();
  spin_point(operation, where);
  return old;
}

template <class T>
BK_UNINSTRUMENTED void copy_relaxed(T* to, const T* from) {
  if constexpr (sizeof(T) <= 8) {
    __atomic_store(to, const_cast<T*>(from), __ATOMIC_SEQ_CST);
  } else {  // wider accesses may tear between 4-byte words
    auto* target = reinterpret_cast<uint32_t*>(to);
    auto* source = reinterpret_cast<const uint32_t*>(from);
    for (size_t i = 0; i < sizeof(T) / 4; i++) __atomic_store_n(target + i, source[i], __ATOMIC_SEQ_CST);
  }
}

template <class T>
BK_UNINSTRUMENTED T load_relaxed(const T* p) {
  T value;
  if constexpr (sizeof(T) <= 8) {
    __atomic_load(const_cast<T*>(p), &value, __ATOMIC_SEQ_CST);
  } else {
    auto* target = reinterpret_cast<uint32_t*>(&value);
    auto* source = reinterpret_cast<const uint32_t*>(p);
    for (size_t i = 0; i < sizeof(T) / 4; i++) target[i] = __atomic_load_n(source + i, __ATOMIC_SEQ_CST);
  }
  return value;
}

template <class T>
BK_UNINSTRUMENTED T ordered_load(const char* operation, const T* p, bool acquire, Where where) {
  RuntimeScope scope;
  check_global_alignment(p, sizeof(T), operation, where);
  record_access(current, p, sizeof(T), Access::kAtomicRead, Proxy::kGeneric, where);
  const T value = load_relaxed(p);
  if (acquire) {
    acquire_load(current, p);
  } else {
    relaxed_load(current, p);
  }
  spin_point(operation, where);
  return value;
}

template <class T>
BK_UNINSTRUMENTED void ordered_store(const char* operation, T* p, T value, bool release, Where where) {
  RuntimeScope scope;
  check_global_alignment(p, sizeof(T), operation, where);
  record_access(current, p, sizeof(T), Access::kAtomic, Proxy::kGeneric, where);
  if (release) {
    release_store(current, p);
  } else {
    relaxed_store(current, p);
  }
  copy_relaxed(p, &value);
  note_progress();
}

}  // namespace bigkern::emulator

namespace bigkern {

// See device/cuda/tma.cuh.
BK_UNINSTRUMENTED inline void reduce_add(float* dst, const float (&values)[4], BK_WHERE) {
  using namespace emulator;
  RuntimeScope scope;
  check_atomic(dst, sizeof(values), "reduce_add", where);
  record_access(current, dst, sizeof(values), Access::kAtomic, Proxy::kGeneric, where);
  relaxed_update(current, dst);
  for (int i = 0; i < 4; i++) {
    float old, next;
    __atomic_load(dst + i, &old, __ATOMIC_SEQ_CST);
    do {
      next = old + values[i];
    } while (!__atomic_compare_exchange(dst + i, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  }
  note_progress();
  spin_point("reduce_add", where);
}

}  // namespace bigkern

// T* and the value may differ in type, as CUDA's overloads allow (atomicAdd(float*, 1)).
template <class T>
T atomicAdd(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicAdd", p, where, [value](T old) { return T(old + value); });
}

template <class T>
T atomicSub(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicSub", p, where, [value](T old) { return T(old - value); });
}

template <class T>
T atomicMax(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicMax", p, where, [value](T old) { return old < value ? value : old; });
}

template <class T>
T atomicMin(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicMin", p, where, [value](T old) { return value < old ? value : old; });
}

template <class T>
T atomicExch(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicExch", p, where, [value](T) { return value; });
}

template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicCAS", p, where,
                                          [expected, value](T old) { return old == expected ? value : old; });
}

template <class T>
T atomicAnd(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicAnd", p, where, [value](T old) { return T(old & value); });
}

template <class T>
T atomicOr(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicOr", p, where, [value](T old) { return T(old | value); });
}

template <class T>
T atomicXor(T* p, std::common_type_t<T> value, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicXor", p, where, [value](T old) { return T(old ^ value); });
}

inline unsigned atomicInc(unsigned* p, unsigned limit, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicInc", p, where,
                                          [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}

inline unsigned atomicDec(unsigned* p, unsigned limit, BK_WHERE) {
  return bigkern::emulator::atomic_update("atomicDec", p, where,
                                          [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

void __threadfence();
void __threadfence_block();
void __threadfence_system();
void __nanosleep(unsigned nanoseconds, BK_WHERE);

namespace bigkern {

template <class T>
T ld_acquire(const T* p, BK_WHERE) {
  static_assert(sizeof(T) == 4, "ld_acquire: 4 bytes");
  return emulator::ordered_load("ld_acquire", p, true, where);
}

template <class T>
void st_release(T* p, T value, BK_WHERE) {
  static_assert(sizeof(T) == 4, "st_release: 4 bytes");
  emulator::ordered_store("st_release", p, value, true, where);
}

template <class T>
T ld_relaxed(const T* p, BK_WHERE) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "ld_relaxed: 2 to 16 bytes");
  return emulator::ordered_load("ld_relaxed", p, false, where);
}

template <class T>
void st_relaxed(T* p, T value, BK_WHERE) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st_relaxed: 2 to 16 bytes");
  emulator::ordered_store("st_relaxed", p, value, false, where);
}

inline void fence_acq_rel_gpu() {
  __threadfence();
}

}  // namespace bigkern
