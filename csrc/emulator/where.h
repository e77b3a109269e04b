#pragma once

#include <string>

// The race build instruments kernels; emulator code that is compiled with them opts out.
#define BK_UNINSTRUMENTED __attribute__((no_sanitize("thread")))

namespace bigkern::emulator {

// A place in a kernel's source. As a default argument, Where::here() is the place of the call.
struct Where {
  const char* file = nullptr;
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const { return file ? std::string(file) + ":" + std::to_string(line) : "an unknown place"; }
};

}  // namespace bigkern::emulator
