// Launching kernels and asking about the emulated device; the counterpart of device/cuda/launch.cuh.
#pragma once

#include <cstddef>

#include "device/launch_config.h"
#include "emulator/core.h"

namespace bigkern {

namespace emulator {

// Runs the kernel to its end. `call` runs it for the current fiber.
int launch(const LaunchConfig& config, void (*call)(void*), void* arguments);

}  // namespace emulator

// Returns 0, or an error code for error_string.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const LaunchConfig& config, Args... args) {
  auto call = [&] { kernel(static_cast<Params>(args)...); };
  using Call = decltype(call);
  return emulator::launch(config, [](void* pointer) { (*static_cast<Call*>(pointer))(); }, &call);
}

// The message of this thread's last failed launch when code stands for one.
const char* error_string(int code);

int multiprocessor_count();
int max_shared_bytes();
int compute_capability();

namespace emulator {

int occupancy(int threads, size_t shared_bytes);
int occupancy_clusters(const LaunchConfig& config);

}  // namespace emulator

template <class... Params>
int occupancy(void (*)(Params...), int threads, size_t shared_bytes) {
  return emulator::occupancy(threads, shared_bytes);
}

template <class... Params>
int occupancy_clusters(void (*)(Params...), const LaunchConfig& config) {
  return emulator::occupancy_clusters(config);
}

}  // namespace bigkern
