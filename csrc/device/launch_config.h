#pragma once

#include <vector_types.h>

#include <cstddef>

#include "device/stream.h"

namespace bigkern {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  bool cooperative = false;  // all blocks resident at once, as a grid-wide exchange needs
};

}  // namespace bigkern
