#include "emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bigkern::emulator {

namespace {

// Instrumented frames are larger.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr int kStacksPerSlab = 256;
// Every guard page splits a mapping, and a process may have 65530 of them; later stacks do without.
constexpr size_t kGuardedSlabs = 64;

struct Slab {
  char* base;
  int used;
};

struct Slabs {
  std::mutex mutex;
  std::vector<Slab> slabs;
};

Slabs& slabs() {
  static Slabs* all = new Slabs;  // outlives every static destructor
  return *all;
}

}  // namespace

Stack allocate_stack() {
  Slabs& all = slabs();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.slabs.empty() || all.slabs.back().used == kStacksPerSlab) {
    void* base = mmap(nullptr, kStackBytes * kStacksPerSlab, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    all.slabs.push_back({static_cast<char*>(base), 0});
  }
  Slab& slab = all.slabs.back();
  char* base = slab.base + kStackBytes * slab.used++;
  if (all.slabs.size() <= kGuardedSlabs) mprotect(base, kGuardBytes, PROT_NONE);
  return {base + kGuardBytes, kStackBytes - kGuardBytes};
}

bool is_fiber_stack(const void* p) {
  Slabs& all = slabs();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (const Slab& slab : all.slabs) {
    if (static_cast<size_t>(static_cast<const char*>(p) - slab.base) < kStackBytes * kStacksPerSlab) return true;
  }
  return false;
}

#if defined(__x86_64__)

// Saves the registers the ABI lets a callee keep, changes stacks, restores. Returning by an indirect jump keeps the
// processor's return-address predictor of the resumed fiber out of it.
asm(R"(
.text
.p2align 4
.globl bigkern_switch_context
.hidden bigkern_switch_context
.type bigkern_switch_context, @function
bigkern_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rdx
  jmp *%rdx
.size bigkern_switch_context, .-bigkern_switch_context
)");

void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.base, stack.bytes);  // a failed launch leaves frames behind
#endif
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack.base + stack.bytes - 64 - colour * 7 % 32 * 128);
  *--top = nullptr;  // entry's return address
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
  context.stack_pointer = top;
}

#else

void switch_context(Context& from, Context& to) {
  swapcontext(&from.machine, &to.machine);
}

void prepare(Context& context, const Stack& stack, unsigned, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack.base;
  context.machine.uc_stack.ss_size = stack.bytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
}

#endif

#if defined(__SANITIZE_ADDRESS__)
void announce_switch(void** fake_stack, const Stack& to) {
  __sanitizer_start_switch_fiber(fake_stack, to.base, to.bytes);
}
void finish_switch(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#endif

Stack thread_stack() {
  static thread_local Stack stack;  // asking takes a while: for the first thread it reads /proc
  if (stack.base) return stack;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    void* base = nullptr;
    pthread_attr_getstack(&attributes, &base, &stack.bytes);
    pthread_attr_destroy(&attributes);
    stack.base = static_cast<char*>(base);
  }
  return stack;
}

}  // namespace bigkern::emulator
