// Runs one kernel by name on bytes from the test: the same source on a GPU (nvcc) and on the emulator.
#pragma once

#include "device/hopper.cuh"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

namespace conformance {

struct Buffers {
  const char* parameters;  // the input again, readable by the host
  const char* in;
  char* out;  // holds the test's initial bytes
};

struct Case {
  const char* name;
  int (*run)(const Buffers&);
};

// What BK_EMULATE changes here is only where the buffers live.
#if defined(BK_EMULATE)
struct DeviceBytes {
  DeviceBytes(const void* host, size_t) : data(static_cast<char*>(const_cast<void*>(host))) {}
  int finish(void*, size_t) { return 0; }
  char* data;
};
#else
struct DeviceBytes {
  DeviceBytes(const void* host, size_t bytes) {
    status = cudaMalloc(&data, bytes ? bytes : 1);
    if (status == cudaSuccess) status = cudaMemcpy(data, host, bytes, cudaMemcpyHostToDevice);
  }
  ~DeviceBytes() { cudaFree(data); }
  int finish(void* host, size_t bytes) {
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    if (status == cudaSuccess) status = cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost);
    return status;
  }
  char* data = nullptr;
  cudaError_t status;
};
#endif

inline std::string& message() {
  static std::string text;
  return text;
}

// 0, or a nonzero code with the reason in message().
inline int run(const Case* cases, size_t count, const char* name, const void* in, size_t in_bytes, void* out,
               size_t out_bytes) {
  for (size_t i = 0; i < count; i++) {
    if (std::strcmp(cases[i].name, name) != 0) continue;
    try {
      DeviceBytes device_in(in, in_bytes), device_out(out, out_bytes);
      int code = cases[i].run({static_cast<const char*>(in), device_in.data, device_out.data});
      if (code == 0) code = device_out.finish(out, out_bytes);
      message() = code == 0 ? "" : bigkern::error_string(code);
      return code;
    } catch (const std::exception& error) {
      message() = error.what();
      return -1;
    }
  }
  message() = std::string("no case named ") + name;
  return -1;
}

using Kernel = void (*)(const char*, char*);

template <Kernel kKernel, int kThreads, int kBlocks = 1, int kSharedBytes = 0, bool kCooperative = false,
          unsigned kCluster = 1>
int launch_case(const Buffers& buffers) {
  bigkern::LaunchConfig config;
  config.grid = dim3(kBlocks);
  config.block = dim3(kThreads);
  config.shared_bytes = kSharedBytes;
  config.cooperative = kCooperative;
  config.cluster = kCluster;
  return bigkern::launch(kKernel, config, buffers.in, buffers.out);
}

template <class T>
__device__ T* as(char* p) {
  return reinterpret_cast<T*>(p);
}

template <class T>
__device__ const T* as(const char* p) {
  return reinterpret_cast<const T*>(p);
}

}  // namespace conformance

// The library's C interface over a table of cases.
#define BK_CONFORMANCE(cases)                                                                                      \
  extern "C" int conformance_run(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes) { \
    return conformance::run(cases, sizeof(cases) / sizeof(cases[0]), name, in, in_bytes, out, out_bytes);          \
  }                                                                                                                \
  extern "C" const char* conformance_message() {                                                                   \
    return conformance::message().c_str();                                                                         \
  }                                                                                                                \
  extern "C" int conformance_cases() {                                                                             \
    return static_cast<int>(sizeof(cases) / sizeof(cases[0]));                                                     \
  }                                                                                                                \
  extern "C" const char* conformance_case(int i) {                                                                 \
    return cases[i].name;                                                                                          \
  }
