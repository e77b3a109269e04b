// The device layer: everything a kernel may use beyond plain C++ and CUDA's own names. Kernels include this header
// (and hopper.cuh for sm_90a), never CUDA's, so that the same source also runs on the emulator.
#pragma once

#include "device/philox.cuh"
#include "device/platform.cuh"
#include "device/reduce.cuh"
#include "device/types.cuh"
