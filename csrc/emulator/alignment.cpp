// Misaligned accesses. On a GPU a vector access that is not aligned to its size is a fault; kernels are compiled with
// -fsanitize=alignment -fno-sanitize-recover=alignment, whose calls land here instead of in libubsan.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator/core.h"

namespace {

// As the compiler lays them out (libubsan's ubsan_value.h and ubsan_handlers.h).
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation place;
  const TypeDescriptor* type;
  unsigned char log2_alignment;
  unsigned char access;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t address) {
  using namespace bigkern::emulator;
  const bool write = data->access == 1;
  const std::string message = std::string("misaligned ") + (write ? "store" : "access") + ": an address that is " +
                              std::to_string(address % (uintptr_t{1} << data->log2_alignment)) +
                              " bytes past alignment to " + std::to_string(1u << data->log2_alignment) + ", for type " +
                              data->type->name;
  const Where where{data->place.file, static_cast<int>(data->place.line)};
  if (current) {
    RuntimeScope scope;
    fail(message, where);
  }
  std::fprintf(stderr, "%s, %s\n", message.c_str(), where.text().c_str());
  std::abort();
}
