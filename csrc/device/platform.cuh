// The one place that tells CUDA from emulation. Both sides declare the same names; see device/cuda/ for what they mean.
#pragma once

#if defined(BK_EMULATE)

#include "emulator/emulator.h"
#define BK_PLATFORM_HOPPER "emulator/hopper.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device/cuda/launch.cuh"
#include "device/cuda/memory.cuh"
#include "device/cuda/mma.cuh"
#define BK_PLATFORM_HOPPER "device/cuda/hopper.cuh"

#endif
