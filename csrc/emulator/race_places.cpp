#include "emulator/race_internal.h"

#if defined(BK_EMULATE_RACE)

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/core.h"
#include "emulator/scheduler.h"

// The linker's own names for the bounds of this library.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) const char _end[];

namespace bigkern::emulator {

namespace {

constexpr uint32_t kNumbered = 0x80000000u;

std::vector<Where>& numbered_places() {
  static auto* all = new std::vector<Where>;
  return *all;
}

// addr2line's answer for an offset in the library; empty without debug information or addr2line.
std::string resolve(const char* library, uint32_t offset) {
  char command[4096];
  const int length = std::snprintf(command, sizeof(command), "addr2line -e '%s' 0x%x 2>/dev/null", library, offset);
  if (length < 0 || static_cast<size_t>(length) >= sizeof(command)) return "";
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  char line[4096] = "";
  const bool read = std::fgets(line, sizeof(line), pipe) != nullptr;
  pclose(pipe);
  if (!read || std::strncmp(line, "??", 2) == 0) return "";
  line[std::strcspn(line, " \n")] = 0;
  const char* path = line;
  while (std::strncmp(path, "./", 2) == 0) path += 2;
  return path;
}

}  // namespace

uint32_t place_of_pc(const void* pc) {
  return static_cast<uint32_t>(static_cast<const char*>(pc) - __ehdr_start) & ~kNumbered;
}

uint32_t place_of(Where where) {
  auto& places = numbered_places();
  for (size_t i = places.size(); i-- > 0;) {
    if (places[i].line == where.line && places[i].file == where.file) return kNumbered | static_cast<uint32_t>(i);
  }
  places.push_back(where);
  return kNumbered | static_cast<uint32_t>(places.size() - 1);
}

std::string place_text(uint32_t place) {
  if (place & kNumbered) {
    const Where where = numbered_places()[place & ~kNumbered];
    return where.file ? where.text() : "an emulated operation";
  }
  Dl_info library;
  char offset[32];
  std::snprintf(offset, sizeof(offset), "+0x%x", place);
  if (!dladdr(static_cast<const void*>(__ehdr_start), &library)) return offset;
  const std::string found = resolve(library.dli_fname, place - 1);  // the call before the return address
  return found.empty() ? std::string(library.dli_fname) + offset : found;
}

bool is_private(const char* p, const Fiber& fiber) {
  const Stack& own = fiber.stack;
  if (static_cast<size_t>(p - own.base) < own.bytes) return true;
  const Stack& host = fiber.scheduler->host_stack();
  return static_cast<size_t>(p - host.base) < host.bytes;
}

bool is_image(const char* p) {
  return p >= __ehdr_start && p < _end;
}

}  // namespace bigkern::emulator

#endif
