// Launching kernels and asking about the current device.
#pragma once

#include "device/capability.h"
#include "device/launch_config.h"

#include <cuda_runtime.h>

#include <cstddef>

namespace bigkern {

namespace detail {

// Above 48 KiB a kernel gets dynamic shared memory only after asking for it.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

}  // namespace detail

namespace detail {

// A LaunchConfig as the runtime takes it.
struct RuntimeConfig {
  explicit RuntimeConfig(const LaunchConfig& config) {
    cudaLaunchAttribute* next = attributes;
    if (config.cooperative) {
      next->id = cudaLaunchAttributeCooperative;
      next++->val.cooperative = 1;
    }
    if (config.cluster > 1) {
      next->id = cudaLaunchAttributeClusterDimension;
      next++->val.clusterDim = {config.cluster, 1, 1};
    }
    runtime.gridDim = config.grid;
    runtime.blockDim = config.block;
    runtime.dynamicSmemBytes = config.shared_bytes;
    runtime.stream = static_cast<cudaStream_t>(config.stream);
    runtime.attrs = attributes;
    runtime.numAttrs = static_cast<unsigned>(next - attributes);
  }
  RuntimeConfig(const RuntimeConfig&) = delete;
  RuntimeConfig& operator=(const RuntimeConfig&) = delete;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t runtime = {};
};

}  // namespace detail

// Returns 0, or an error code for error_string. The error is the caller's to report: it does not stay behind as
// the runtime's last error, where an unrelated check would find it.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const LaunchConfig& config, Args... args) {
  cudaError_t status = detail::allow_shared_bytes(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  if (status == cudaSuccess) {
    const detail::RuntimeConfig attributed(config);
    status = cudaLaunchKernelEx(&attributed.runtime, kernel, static_cast<Params>(args)...);
  }
  const cudaError_t last = cudaGetLastError();
  return status != cudaSuccess ? status : last;
}

inline const char* error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Of the current device; 0 when there is none.
inline int multiprocessor_count() {
  return detail::device_attribute(cudaDevAttrMultiProcessorCount);
}

// The most dynamic shared memory a block may ask for.
inline int max_shared_bytes() {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// By which launchers choose their path: 10 times the major version and the minor one, 80, 90, ...; 0 when there is no
// GPU. On a Hopper GPU 89 unless this build has code for sm_90a (setup.py says so), of which the kernels that need it
// would otherwise be empty.
inline int compute_capability() {
  const int found = 10 * detail::device_attribute(cudaDevAttrComputeCapabilityMajor) +
                    detail::device_attribute(cudaDevAttrComputeCapabilityMinor);
#if defined(BK_SM90A)
  return allowed_capability(found);
#else
  return allowed_capability(found == 90 ? 89 : found);
#endif
}

// Blocks that fit one multiprocessor; 0 when the kernel cannot run.
template <class... Params>
int occupancy(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int blocks = 0;
  if (detail::allow_shared_bytes(function, shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return blocks;
}

// Clusters of the configuration that fit the GPU at once; 0 when the kernel cannot run.
template <class... Params>
int occupancy_clusters(void (*kernel)(Params...), const LaunchConfig& config) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const detail::RuntimeConfig attributed(config);
  int clusters = 0;
  if (detail::allow_shared_bytes(function, config.shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, function, &attributed.runtime) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace bigkern
