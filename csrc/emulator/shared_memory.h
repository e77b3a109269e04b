// Shared memory: BK_SHARED and SharedMemory, as in device/cuda/memory.cuh. Both start as 0xff bytes, NaN in every
// floating type, so that a read of what nobody wrote shows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/core.h"

namespace bigkern {

namespace emulator {

// The block's variable that the tag stands for, made when the first thread asks.
char* shared_variable(const void* tag, size_t bytes, size_t align);
char* shared_variable(Block& block, const void* tag, size_t bytes, size_t align);

// AddressSanitizer: opens [offset, offset + bytes) of the dynamic memory once; the rest stays poisoned.
void carve(size_t offset, size_t bytes);

}  // namespace emulator

#define BK_SHARED(T, name, ...)                                                                                 \
  static char bk_shared_tag_##name;                                                                             \
  typedef T bk_shared_type_##name __VA_ARGS__;                                                                  \
  bk_shared_type_##name& name = *reinterpret_cast<bk_shared_type_##name*>(::bigkern::emulator::shared_variable( \
      &bk_shared_tag_##name, sizeof(bk_shared_type_##name), alignof(bk_shared_type_##name)))

// Offset in the block's shared memory: what descriptors and asm operands hold.
uint32_t shared_address(const void* p);

class SharedMemory {
 public:
  template <class T>
  T* take(uint32_t count, uint32_t align = 16) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T), align < alignof(T) ? alignof(T) : align));
  }

 private:
  char* take_bytes(size_t bytes, size_t align);

  size_t used_ = 0;    // as on the device
  size_t offset_ = 0;  // the same plus the gaps
};

}  // namespace bigkern
