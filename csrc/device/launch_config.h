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
  unsigned cluster = 1;      // blocks along x that run together (device/cuda/cluster.cuh); at most 8, divides grid.x
};

}  // namespace bigkern
