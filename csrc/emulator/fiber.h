// Stacks and the switch between them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace bigkern::emulator {

struct Stack {
  char* base = nullptr;
  size_t bytes = 0;
};

#if defined(__x86_64__)
// Where a suspended fiber's registers lie on its own stack.
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t machine;
};
#endif

// Stacks are cut from large mappings and kept for later launches; never freed.
Stack allocate_stack();
// Whether p points into any fiber's stack.
bool is_fiber_stack(const void* p);

// Makes the context start in entry, which must never return, at the top of the stack. `colour` staggers the tops: equal
// offsets in every stack would fall into the same few sets of the L1 cache (measured: 33 ns a switch, 13 staggered).
void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)());
#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void bigkern_switch_context(void** save, void* to);
inline void switch_context(Context& from, Context& to) {
  bigkern_switch_context(&from.stack_pointer, to.stack_pointer);
}
#else
void switch_context(Context& from, Context& to);
#endif

// Asks for the innermost frames of a suspended fiber: the stacks of a block do not fit the L1 cache.
inline void prefetch(const Context& context) {
#if defined(__x86_64__)
  constexpr int kLine = 64, kLines = 4;
  const char* top = static_cast<const char*>(context.stack_pointer);
  for (int i = 0; i < kLines; i++) __builtin_prefetch(top + i * kLine);
#else
  (void)context;
#endif
}

// What AddressSanitizer must be told around a switch; nothing in other builds.
#if defined(__SANITIZE_ADDRESS__)
void announce_switch(void** fake_stack, const Stack& to);
void finish_switch(void* fake_stack);
#else
inline void announce_switch(void**, const Stack&) {}
inline void finish_switch(void*) {}
#endif
Stack thread_stack();  // of the calling OS thread

}  // namespace bigkern::emulator
