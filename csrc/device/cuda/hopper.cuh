#pragma once

#include "device/cuda/mbarrier.cuh"
#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
