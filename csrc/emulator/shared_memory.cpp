#include "emulator/shared_memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace bigkern {

namespace emulator {

namespace {

// What a block has on the GPU, static variables included, with some slack for the distance between them here.
constexpr size_t kSharedLimit = (227 << 10) + 4096;

void open_memory(char* address, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(address, bytes);
#endif
  std::memset(address, 0xff, bytes);
}

}  // namespace

char* shared_variable(const void* tag, size_t bytes, size_t align) {
  return shared_variable(*current->block, tag, bytes, align);
}

char* shared_variable(Block& block, const void* tag, size_t bytes, size_t align) {
  for (const SharedVariable& variable : block.variables) {
    if (variable.tag == tag) return variable.address;
  }
  RuntimeScope scope;
  constexpr size_t kGap = 64;  // poisoned under AddressSanitizer
  block.static_start = (block.static_start - bytes - kGap) & ~(std::max<size_t>(align, kGap) - 1);
  if (kArenaBytes - block.static_start + block.dynamic_bytes > kSharedLimit) {
    fail("static shared memory: " + std::to_string(kArenaBytes - block.static_start) + " bytes beside " +
         std::to_string(block.dynamic_bytes) + " dynamic ones do not fit a block");
  }
  char* address = block.arena + block.static_start;
  open_memory(address, bytes);
  block.variables.push_back({tag, address, bytes, align});
  return address;
}

void carve(size_t offset, size_t bytes) {
  Block& block = *current->block;
  if (offset + bytes <= block.carved) return;
  open_memory(block.arena + offset, bytes);
  block.carved = offset + bytes;
}

size_t check_shared(const void* p, size_t bytes, size_t align, const char* operation, Where where) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - current->block->arena);
  if (offset >= kArenaBytes || bytes > kArenaBytes - offset) {
    fail(std::string(operation) + ": not an address in the block's shared memory", where);
  }
  if (offset % align != 0) {
    fail(std::string(operation) + ": shared address not aligned to " + std::to_string(align) + " bytes", where);
  }
  return offset;
}

void check_global_alignment(const void* p, size_t align, const char* operation, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % align != 0) {
    fail(std::string(operation) + ": global address not aligned to " + std::to_string(align) + " bytes", where);
  }
}

}  // namespace emulator

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulator::current->block->arena);
}

// Only under AddressSanitizer do the pieces lie apart, with poisoned gaps that show one running into the next.
char* SharedMemory::take_bytes(size_t bytes, size_t align) {
  emulator::Block& block = *emulator::current->block;
  auto round_up = [align](size_t x) { return (x + align - 1) / align * align; };
  used_ = round_up(used_) + bytes;
  if (used_ > block.dynamic_bytes) {
    emulator::RuntimeScope scope;
    emulator::fail("dynamic shared memory: the kernel takes " + std::to_string(used_) + " bytes, the launch gave " +
                   std::to_string(block.dynamic_bytes));
  }
  offset_ = round_up(offset_);
  char* piece = block.arena + offset_;
#if defined(__SANITIZE_ADDRESS__)
  constexpr size_t kGap = 256;
  emulator::carve(offset_, bytes);
  offset_ += kGap;
#endif
  offset_ += bytes;
  return piece;
}

}  // namespace bigkern
