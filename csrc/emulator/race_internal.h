// Between the checker (race.cpp), the instrumentation (race_hooks.cpp) and the source places (race_places.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/race.h"

namespace bigkern::emulator {

// An access of the kernel's own code.
void instrumented_access(Fiber* fiber, const void* address, size_t bytes, Access kind, const void* pc);

// A place in the source in 32 bits: an offset in this library's code, or a numbered Where.
uint32_t place_of_pc(const void* pc);
uint32_t place_of(Where where);
std::string place_text(uint32_t place);

// In the fiber's stack, or that of the host thread, where a launch's arguments lie.
bool is_private(const char* p, const Fiber& fiber);
// In this library's own image: tables the compiler made, which are no traffic.
bool is_image(const char* p);

}  // namespace bigkern::emulator
