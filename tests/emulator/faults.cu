// Kernels with one fault each. A GPU would mostly run them to a wrong or unlucky result; the emulator must name the
// fault.
#include "device/device.cuh"

#include <cstdint>

namespace bigkern {
namespace {

using Kernel = void (*)(float*);

// ---- found in every build

__global__ void diverged_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void barrier_after_exit(float* out) {
  if (threadIdx.x >= 32) return;
  out[threadIdx.x] = 1;
  __syncthreads();
}

__global__ void shuffle_names_absent_lanes(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_meets_vote(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else {
    out[threadIdx.x] = __any_sync(0xffffffffu, 1);
  }
}

__global__ void masks_overlap(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0x0001ffffu, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffff8000u, 1.0f, 1);
  }
}

__global__ void awaited_lane_leaves(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0x0001ffffu, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffff0000u, 1.0f, 1);
  }
}

__global__ void caller_not_in_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);
}

__global__ void source_not_in_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

__global__ void named_barrier_counts_differ(float* out) {
  named_barrier(1, threadIdx.x < 32 ? 64 : 32);
  out[threadIdx.x] = 1;
}

__global__ void named_barrier_left_half(float* out) {
  if (threadIdx.x < 32) named_barrier_arrive(3, 64);
  out[threadIdx.x] = 1;
}

__global__ void deadlock(float* out) {
  if (threadIdx.x < 32) named_barrier(1, 64);
  if (threadIdx.x >= 32) named_barrier(2, 64);
  out[threadIdx.x] = 1;
}

__global__ void livelock(float* out) {
  auto* flag = reinterpret_cast<unsigned*>(out);
  while (ld_acquire(flag) != 12345u) __nanosleep(20);
}

__global__ void misaligned_vector(float* out) {
  *reinterpret_cast<float4*>(out + 1) = make_float4(1, 2, 3, 4);
}

__global__ void misaligned_copy(float* out) {
  SharedMemory shared;
  float* tile = shared.take<float>(64);
  cp_async16(tile + 1, out);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_to_global(float* out) {
  cp_async16(out, out + 4);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void exit_with_copies(float* out) {
  SharedMemory shared;
  float* tile = shared.take<float>(64);
  cp_async16(tile, out);
  cp_async_commit();
}

__global__ void too_much_shared(float* out) {
  SharedMemory shared;
  out[0] = shared.take<float>(65)[0];
}

__global__ void traps(float*) {
  __trap();
}

// ---- wrong values, or the race checker's own

// A copy that is read before the wait.
__global__ void missing_copy_wait(float* out) {
  SharedMemory shared;
  float* tile = shared.take<float>(256);
  cp_async16(tile + threadIdx.x * 4, out + threadIdx.x * 4);
  cp_async_commit();
  out[1024 + threadIdx.x] = tile[threadIdx.x * 4];
  cp_async_wait<0>();
}

__global__ void read_after_write(float* out) {
  BK_SHARED(float, tile, [64]);
  tile[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void write_after_read(float* out) {
  BK_SHARED(float, tile, [64]);
  tile[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  const float x = tile[63 - threadIdx.x];
  tile[threadIdx.x] = x + 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void write_after_write(float* out) {
  BK_SHARED(float, total);
  total = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = total;
}

__global__ void shuffle_as_fence(float* out) {
  BK_SHARED(float, tile, [64]);
  tile[threadIdx.x] = out[threadIdx.x];
  __shfl_sync(0xffffffffu, 0, 0);
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void uninitialised(float* out) {
  BK_SHARED(float, tile, [64]);
  if (threadIdx.x > 0) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void copy_into_tile_being_read(float* out) {
  SharedMemory shared;
  float* tile = shared.take<float>(64);
  tile[threadIdx.x] = 1;
  __syncthreads();
  const float x = tile[63 - threadIdx.x];
  if (threadIdx.x < 16) cp_async16(tile + threadIdx.x * 4, out + threadIdx.x * 4);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  out[threadIdx.x] = x;
}

// ---- across blocks, four of them

__global__ void blocks_write_one_place(float* out) {
  out[threadIdx.x] = static_cast<float>(blockIdx.x);
}

__global__ void neighbours_read(float* out) {
  out[blockIdx.x * 64 + threadIdx.x] = 1;
  __syncthreads();
  out[1024 + blockIdx.x * 64 + threadIdx.x] = out[(blockIdx.x + 1) % gridDim.x * 64 + threadIdx.x];
}

// The last block sums the partial results: with a fence missing on either side, or the barrier before the count.
template <bool kReleaseFence, bool kAcquireFence, bool kBarrier>
__global__ void last_block(float* out) {
  BK_SHARED(bool, last);
  auto* counter = reinterpret_cast<unsigned*>(out + 2048);
  out[blockIdx.x * 64 + threadIdx.x] = 1;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kReleaseFence) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (kAcquireFence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; i++) total += out[i * 64 + threadIdx.x];
  out[1024 + threadIdx.x] = total;
}

// A flag is written with st_release; with the flag read relaxed, the data is not ordered.
template <bool kAcquire>
__global__ void flag(float* out) {
  auto* ready = reinterpret_cast<unsigned*>(out + 2048);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[0] = 5;
    st_release(ready, 1u);
  } else {
    while ((kAcquire ? ld_acquire(ready) : ld_relaxed(ready)) == 0) __nanosleep(20);
    out[blockIdx.x] = out[0];
  }
}

__global__ void volatile_flag(float* out) {
  auto* ready = reinterpret_cast<volatile unsigned*>(out + 2048);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[0] = 5;
    __threadfence();
    *ready = 1;
  } else {
    while (*ready == 0) __nanosleep(20);
    __threadfence();
    out[blockIdx.x] = out[0];
  }
}

// Neighbouring bytes and halves, each of one block: no race.
__global__ void neighbouring_bytes(float* out) {
  if (threadIdx.x != 0) return;
  reinterpret_cast<unsigned char*>(out)[blockIdx.x] = 1;
  reinterpret_cast<uint16_t*>(out + 16)[blockIdx.x] = 2;
}

// ---- for AddressSanitizer

__global__ void read_past_tensor(float* out) {
  out[threadIdx.x] = out[threadIdx.x + 4096];
}

__global__ void static_shared_overrun(float* out) {
  BK_SHARED(float, tile, [64]);
  tile[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_shared_overrun(float* out) {
  SharedMemory shared;
  float* first = shared.take<float>(32);
  float* second = shared.take<float>(32);
  first[threadIdx.x % 33] = 1;  // one past its end, where the second begins
  second[threadIdx.x % 32] = 2;
  __syncthreads();
  out[threadIdx.x] = first[threadIdx.x % 32];
}

struct Named {
  const char* name;
  Kernel kernel;
  int blocks;
  int shared_bytes;
  bool cooperative;
};

const Named kKernels[] = {
    {"diverged_barriers", diverged_barriers, 1, 0, false},
    {"barrier_after_exit", barrier_after_exit, 1, 0, false},
    {"shuffle_names_absent_lanes", shuffle_names_absent_lanes, 1, 0, false},
    {"shuffle_meets_vote", shuffle_meets_vote, 1, 0, false},
    {"masks_overlap", masks_overlap, 1, 0, false},
    {"awaited_lane_leaves", awaited_lane_leaves, 1, 0, false},
    {"caller_not_in_mask", caller_not_in_mask, 1, 0, false},
    {"source_not_in_mask", source_not_in_mask, 1, 0, false},
    {"named_barrier_counts_differ", named_barrier_counts_differ, 1, 0, false},
    {"named_barrier_left_half", named_barrier_left_half, 1, 0, false},
    {"deadlock", deadlock, 1, 0, false},
    {"livelock", livelock, 1, 0, false},
    {"misaligned_vector", misaligned_vector, 1, 0, false},
    {"misaligned_copy", misaligned_copy, 1, 256, false},
    {"copy_to_global", copy_to_global, 1, 0, false},
    {"exit_with_copies", exit_with_copies, 1, 256, false},
    {"too_much_shared", too_much_shared, 1, 256, false},
    {"traps", traps, 1, 0, false},
    {"missing_copy_wait", missing_copy_wait, 1, 1024, false},
    {"read_after_write", read_after_write, 1, 0, false},
    {"write_after_read", write_after_read, 1, 0, false},
    {"write_after_write", write_after_write, 1, 0, false},
    {"shuffle_as_fence", shuffle_as_fence, 1, 0, false},
    {"uninitialised", uninitialised, 1, 0, false},
    {"copy_into_tile_being_read", copy_into_tile_being_read, 1, 256, false},
    {"blocks_write_one_place", blocks_write_one_place, 4, 0, false},
    {"neighbours_read", neighbours_read, 4, 0, false},
    {"last_block", last_block<true, true, true>, 4, 0, false},
    {"last_block_no_release", last_block<false, true, true>, 4, 0, false},
    {"last_block_no_acquire", last_block<true, false, true>, 4, 0, false},
    {"last_block_no_barrier", last_block<true, true, false>, 4, 0, false},
    {"flag", flag<true>, 4, 0, true},
    {"flag_no_acquire", flag<false>, 4, 0, true},
    {"volatile_flag", volatile_flag, 4, 0, true},
    {"neighbouring_bytes", neighbouring_bytes, 4, 0, false},
    {"read_past_tensor", read_past_tensor, 1, 0, false},
    {"static_shared_overrun", static_shared_overrun, 1, 0, false},
    {"dynamic_shared_overrun", dynamic_shared_overrun, 1, 256, false},
};

}  // namespace
}  // namespace bigkern

// Blocks of 64 threads; out has 4096 floats.
extern "C" int run_fault(const char* name, float* out) {
  using namespace bigkern;
  for (const Named& entry : kKernels) {
    if (std::strcmp(entry.name, name) != 0) continue;
    LaunchConfig config;
    config.grid = dim3(entry.blocks);
    config.block = dim3(64);
    config.shared_bytes = static_cast<size_t>(entry.shared_bytes);
    config.cooperative = entry.cooperative;
    return launch(entry.kernel, config, out);
  }
  return -1;
}
