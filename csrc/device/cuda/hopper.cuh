#pragma once

namespace bigkern {

// Whether this pass compiles for sm_90a. Every kernel is compiled for every architecture: one that uses what only
// sm_90a has is a template whose body stands within `if constexpr (kHopper)`, empty elsewhere; its launcher goes by
// compute_capability().
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

}  // namespace bigkern

#include "device/cuda/cluster.cuh"
#include "device/cuda/mbarrier.cuh"
#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
