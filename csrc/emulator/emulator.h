// Everything a kernel sees of the emulated device (device/platform.cuh includes it in place of CUDA).
#pragma once

#include "emulator/cuda_names.h"

#include "emulator/async_copy.h"
#include "emulator/atomics.h"
#include "emulator/barrier.h"
#include "emulator/launch.h"
#include "emulator/matrix.h"
#include "emulator/shared_memory.h"
#include "emulator/warp.h"
