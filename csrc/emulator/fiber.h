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
void switch_context(Context& from, Context& to);

// What AddressSanitizer must be told around a switch; nothing in other builds.
void announce_switch(void** fake_stack, const Stack& to);
void finish_switch(void* fake_stack);
Stack thread_stack();  // of the calling OS thread

}  // namespace bigkern::emulator
