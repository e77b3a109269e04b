// The Hopper part of the device layer, emulated.
#pragma once

#include "emulator/cluster.h"
#include "emulator/mbarrier.h"
#include "emulator/tma.h"
#include "emulator/wgmma.h"

namespace bigkern {

constexpr bool kHopper = true;  // see device/cuda/hopper.cuh

}  // namespace bigkern
