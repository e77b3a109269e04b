// The Hopper part of the device layer (sm_90a): mbarriers, TMA, wgmma, setmaxnreg.
#pragma once

#include "device/device.cuh"

#include BK_PLATFORM_HOPPER
