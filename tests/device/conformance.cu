// One small kernel for each part of the device layer that sm_80 has. test_conformance.py says what each must compute.
#include "harness.cuh"

using namespace bigkern;
using conformance::as;
using conformance::Buffers;
using conformance::launch_case;

namespace {

// ---- types.cuh

template <class T, int N, bool kStreaming>
__global__ void copy_vec_kernel(const char* in, char* out) {
  const T* from = as<T>(in) + threadIdx.x * N;
  T* to = as<T>(out) + threadIdx.x * N;
  if constexpr (kStreaming) {
    store_vec_streaming<T, N>(to, load_vec_streaming<T, N>(from));
  } else {
    store_vec<T, N>(to, load_vec<T, N>(from));
  }
}

// Floats rounded to T and widened again.
template <class T>
__global__ void round_trip_kernel(const char* in, char* out) {
  as<float>(out)[threadIdx.x] = to_float(from_float<T>(as<float>(in)[threadIdx.x]));
}

// ---- reduce.cuh

template <int kLanes, bool kMax>
__global__ void group_kernel(const char* in, char* out) {
  const float value = as<float>(in)[threadIdx.x];
  as<float>(out)[threadIdx.x] = kMax ? group_max<kLanes>(value) : group_sum<kLanes>(value);
}

template <bool kMax>
__global__ void warp_kernel(const char* in, char* out) {
  const float value = as<float>(in)[threadIdx.x];
  as<float>(out)[threadIdx.x] = kMax ? warp_max(value) : warp_sum(value);
}

// Twice in a row, the second time over the first's results: reuse of the scratch memory.
template <int kThreads, bool kMax>
__global__ void block_kernel(const char* in, char* out) {
  const float value = as<float>(in)[threadIdx.x];
  const float first = kMax ? block_max<kThreads>(value) : block_sum<kThreads>(value);
  const float scaled = value - first;
  as<float>(out)[threadIdx.x] = first;
  as<float>(out)[kThreads + threadIdx.x] = kMax ? block_max<kThreads>(scaled) : block_sum<kThreads>(scaled);
}

template <int kThreads>
__global__ void block_sum_pair_kernel(const char* in, char* out) {
  as<float2>(out)[threadIdx.x] = block_sum<kThreads>(as<float2>(in)[threadIdx.x]);
}

// ---- philox.cuh: seed, subsequence, offset in, four words and their uniforms out

__global__ void philox_kernel(const char* in, char* out) {
  const uint64_t* arguments = as<uint64_t>(in) + 3 * threadIdx.x;
  const uint4 words = philox4x32_10(arguments[0], arguments[1], arguments[2]);
  as<uint4>(out)[2 * threadIdx.x] = words;
  as<float4>(out)[2 * threadIdx.x + 1] =
      make_float4(uniform(words.x), uniform(words.y), uniform(words.z), uniform(words.w));
}

// ---- memory.cuh

// The input through static and dynamic shared memory, reversed in each; then facts about the addresses.
constexpr int kDynamicFloats = 15000;  // 60 kB: more than a kernel gets without asking

__global__ void shared_memory_kernel(const char* in, char* out) {
  BK_SHARED(float, fixed, [4][32]);
  SharedMemory memory;
  float* large = memory.take<float>(kDynamicFloats, 1024);
  short* odd = memory.take<short>(3);
  uint4* aligned = memory.take<uint4>(2, 128);
  const int i = threadIdx.x;
  fixed[i / 32][i % 32] = as<float>(in)[i];
  large[kDynamicFloats - 1 - i] = as<float>(in)[i];
  if (i < 3) odd[i] = static_cast<short>(i);
  if (i < 2) aligned[i] = make_uint4(i, i, i, i);
  __syncthreads();
  as<float>(out)[i] = fixed[3 - i / 32][31 - i % 32];
  as<float>(out)[128 + i] = large[kDynamicFloats - 128 + i];
  if (i == 0) {
    int* facts = as<int>(out) + 256;
    facts[0] = shared_address(large) % 1024;
    facts[1] = shared_address(aligned) % 128;
    facts[2] = shared_address(large + 100) - shared_address(large);
    facts[3] = shared_address(odd) >= shared_address(large + kDynamicFloats);
    facts[4] = odd[2] + static_cast<int>(aligned[1].w);
  }
}

// Two groups of copies. Lane l of the first writes zeros where l % 3 == 0; what is read after the first wait may not
// depend on the second group.
__global__ void cp_async_kernel(const char* in, char* out) {
  SharedMemory memory;
  char* tile = memory.take<char>(1024, 16);
  const int lane = threadIdx.x;
  cp_async16(tile + 16 * lane, in + 16 * lane, lane % 3 != 0);
  cp_async_commit();
  cp_async16(tile + 512 + 16 * lane, in + 512 + 16 * (31 - lane));
  cp_async_commit();
  cp_async_wait<1>();
  as<uint4>(out)[lane] = as<uint4>(tile)[lane];
  cp_async_wait<0>();
  __syncwarp();
  as<uint4>(out)[32 + lane] = as<uint4>(tile)[32 + (lane + 1) % 32];
}

// Block 0 writes data, then a flag; block 1 waits for the flag and copies the data. out: flag, 64 words each block's.
template <bool kFence>
__global__ void message_kernel(const char* in, char* out) {
  int* flag = as<int>(out);
  int* data = as<int>(out) + 16;
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    data[i] = as<int>(in)[i];
    __syncthreads();
    if (i == 0 && kFence) {
      fence_acq_rel_gpu();
      st_relaxed(flag, 1);
    } else if (i == 0) {
      st_release(flag, 1);
    }
  } else {
    if (i == 0 && kFence) {
      while (ld_relaxed(flag) == 0) {
      }
      fence_acq_rel_gpu();
    } else if (i == 0) {
      while (ld_acquire(flag) == 0) {
      }
    }
    __syncthreads();
    data[64 + i] = data[63 - i];
  }
}

template <class T>
__global__ void relaxed_kernel(const char* in, char* out) {
  st_relaxed(as<T>(out) + threadIdx.x, ld_relaxed(as<T>(in) + 31 - threadIdx.x));
}

// Three warps write and only count in; the fourth waits for them and copies.
__global__ void named_barrier_kernel(const char* in, char* out) {
  BK_SHARED(int, tile, [96]);
  const int i = threadIdx.x;
  if (i < 96) {
    tile[i] = as<int>(in)[i];
    named_barrier_arrive(3, 128);
  } else {
    named_barrier(3, 128);
    for (int j = 0; j < 96; j += 32) as<int>(out)[j + i - 96] = tile[95 - j - (i - 96)];
  }
}

// ---- mma.cuh

// 8 rows of 8 elements a tile; the lanes name them last to first.
template <int kTiles, bool kTrans>
__global__ void ldmatrix_kernel(const char* in, char* out) {
  BK_SHARED(uint4, rows, [32]);
  const int lane = threadIdx.x;
  rows[lane] = as<uint4>(in)[lane];
  __syncwarp();
  const uint4* row = &rows[31 - lane];
  uint32_t r[kTiles];
  if constexpr (kTiles == 1) {
    kTrans ? ldmatrix_x1_trans(r, row) : ldmatrix_x1(r, row);
  } else if constexpr (kTiles == 2) {
    kTrans ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
  } else {
    kTrans ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  }
  for (int i = 0; i < kTiles; i++) as<uint32_t>(out)[i * 32 + lane] = r[i];
}

enum class Mma { kBf16, kF16, kTf32 };

// Registers of each lane in and out: a[4], b[2], d[4].
template <Mma kMma>
__global__ void mma_kernel(const char* in, char* out) {
  const uint32_t* mine = as<uint32_t>(in) + 10 * threadIdx.x;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(mine[6 + i]);
  if constexpr (kMma == Mma::kBf16) {
    mma_m16n8k16_bf16(d, a, b);
  } else if constexpr (kMma == Mma::kF16) {
    mma_m16n8k16_f16(d, a, b);
  } else {
    mma_m16n8k8_tf32(d, a, b);
  }
  for (int i = 0; i < 4; i++) as<float>(out)[4 * threadIdx.x + i] = d[i];
}

__global__ void to_tf32_kernel(const char* in, char* out) {
  // The low 13 bits mean nothing to mma.
  as<uint32_t>(out)[threadIdx.x] = to_tf32(as<float>(in)[threadIdx.x]) & 0xffffe000u;
}

// ---- launch.cuh

__global__ void nothing_kernel(const char*, char*) {}

__global__ void store_kernel(int* out, float value) {
  if (threadIdx.x == 0) *out = static_cast<int>(value);
}

// Questions about the device, a launch that must fail and leave no trace, and one that converts its argument.
int host_case(const Buffers& buffers) {
  LaunchConfig config;
  config.grid = dim3(1);
  config.block = dim3(32);
  config.shared_bytes = size_t{1} << 30;
  const int refused = launch(nothing_kernel, config, buffers.in, buffers.out);
  config.shared_bytes = 0;
  int* out = reinterpret_cast<int*>(buffers.out);
  const int facts[7] = {multiprocessor_count() > 0,
                        compute_capability() >= 80,
                        max_shared_bytes() >= 48 * 1024,
                        occupancy(nothing_kernel, 128, 0) > 0,
                        occupancy(nothing_kernel, 32, size_t{1} << 30) == 0,
                        refused != 0 && error_string(refused)[0] != 0,
                        error_string(0)[0] != 0};
  int code = 0;
  for (int i = 0; i < 7 && code == 0; i++) code = launch(store_kernel, config, out + i, facts[i]);
  return code;
}

const conformance::Case kCases[] = {
    {"copy_vec_1", launch_case<copy_vec_kernel<unsigned char, 1, false>, 32>},
    {"copy_vec_2", launch_case<copy_vec_kernel<__half, 1, false>, 32>},
    {"copy_vec_4", launch_case<copy_vec_kernel<__half, 2, false>, 32>},
    {"copy_vec_8", launch_case<copy_vec_kernel<float, 2, false>, 32>},
    {"copy_vec_16", launch_case<copy_vec_kernel<__nv_bfloat16, 8, false>, 32>},
    {"copy_vec_streaming_2", launch_case<copy_vec_kernel<__half, 1, true>, 32>},
    {"copy_vec_streaming_4", launch_case<copy_vec_kernel<float, 1, true>, 32>},
    {"copy_vec_streaming_8", launch_case<copy_vec_kernel<__half, 4, true>, 32>},
    {"copy_vec_streaming_16", launch_case<copy_vec_kernel<float, 4, true>, 32>},
    {"round_trip_float", launch_case<round_trip_kernel<float>, 256>},
    {"round_trip_bf16", launch_case<round_trip_kernel<__nv_bfloat16>, 256>},
    {"round_trip_f16", launch_case<round_trip_kernel<__half>, 256>},
    {"group_sum_4", launch_case<group_kernel<4, false>, 64>},
    {"group_sum_1", launch_case<group_kernel<1, false>, 64>},
    {"group_max_8", launch_case<group_kernel<8, true>, 64>},
    {"warp_sum", launch_case<warp_kernel<false>, 64>},
    {"warp_max", launch_case<warp_kernel<true>, 64>},
    {"block_sum_32", launch_case<block_kernel<32, false>, 32>},
    {"block_sum_96", launch_case<block_kernel<96, false>, 96>},
    {"block_sum_1024", launch_case<block_kernel<1024, false>, 1024>},
    {"block_max_256", launch_case<block_kernel<256, true>, 256>},
    {"block_sum_pair_160", launch_case<block_sum_pair_kernel<160>, 160>},
    {"philox", launch_case<philox_kernel, 32>},
    {"shared_memory", launch_case<shared_memory_kernel, 128, 1, 4 * kDynamicFloats + 512>},
    {"cp_async", launch_case<cp_async_kernel, 32, 1, 1024>},
    {"acquire_release", launch_case<message_kernel<false>, 64, 2, 0, true>},
    {"relaxed_and_fence", launch_case<message_kernel<true>, 64, 2, 0, true>},
    {"relaxed_2", launch_case<relaxed_kernel<uint16_t>, 32>},
    {"relaxed_4", launch_case<relaxed_kernel<float>, 32>},
    {"relaxed_8", launch_case<relaxed_kernel<uint64_t>, 32>},
    {"relaxed_16", launch_case<relaxed_kernel<uint4>, 32>},
    {"named_barrier", launch_case<named_barrier_kernel, 128>},
    {"ldmatrix_x1", launch_case<ldmatrix_kernel<1, false>, 32>},
    {"ldmatrix_x2", launch_case<ldmatrix_kernel<2, false>, 32>},
    {"ldmatrix_x4", launch_case<ldmatrix_kernel<4, false>, 32>},
    {"ldmatrix_x1_trans", launch_case<ldmatrix_kernel<1, true>, 32>},
    {"ldmatrix_x2_trans", launch_case<ldmatrix_kernel<2, true>, 32>},
    {"ldmatrix_x4_trans", launch_case<ldmatrix_kernel<4, true>, 32>},
    {"mma_m16n8k16_bf16", launch_case<mma_kernel<Mma::kBf16>, 32>},
    {"mma_m16n8k16_f16", launch_case<mma_kernel<Mma::kF16>, 32>},
    {"mma_m16n8k8_tf32", launch_case<mma_kernel<Mma::kTf32>, 32>},
    {"to_tf32", launch_case<to_tf32_kernel, 256>},
    {"host", host_case},
};

}  // namespace

BK_CONFORMANCE(kCases)
