// One small kernel for each part of the device layer that only sm_90a has. test_conformance.py says what each must
// compute.
#include "harness.cuh"

#include <utility>

using namespace bigkern;
using conformance::as;
using conformance::Buffers;
using conformance::launch_case;

namespace {

__global__ void stmatrix_x4_kernel(const char* in, char* out) {
  BK_SHARED(uint4, rows, [32]);
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = as<uint32_t>(in)[i * 32 + lane];
  stmatrix_x4(&rows[31 - lane], r);
  __syncwarp();
  as<uint4>(out)[lane] = rows[lane];
}

__global__ void exp2_approx_kernel(const char* in, char* out) {
  as<float>(out)[threadIdx.x] = exp2_approx(as<float>(in)[threadIdx.x]);
}

__global__ void exp2_polynomial_kernel(const char* in, char* out) {
  for (int i = threadIdx.x; i < 8192; i += 256) as<float>(out)[i] = exp2_polynomial(as<float>(in)[i]);
}

// ---- mbarrier.cuh

// Warp 0 hands five words of each of its lanes to warp 1, one at a time, through one slot a lane.
template <bool kTryWait>
__global__ void mbarrier_kernel(const char* in, char* out) {
  BK_SHARED(int, slot, [32]);
  BK_SHARED(Mbarrier, full, [1]);
  BK_SHARED(Mbarrier, empty, [1]);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    fence_barrier_init();
  }
  __syncthreads();
  for (int step = 0; step < 5; step++) {
    if (threadIdx.x < 32) {
      mbarrier_wait(empty, (step & 1) ^ 1);
      slot[lane] = as<int>(in)[step * 32 + lane];
      mbarrier_arrive(full);
    } else {
      if (kTryWait) {
        while (!mbarrier_try_wait(full, step & 1)) {
        }
      } else {
        mbarrier_wait(full, step & 1);
      }
      as<int>(out)[step * 32 + lane] = slot[31 - lane];
      mbarrier_arrive(empty);
    }
  }
}

// ---- cluster.cuh

constexpr int kClusterBlocks = 4;

// The blocks of two clusters, each with its rank and its cluster's size.
__global__ void cluster_rank_kernel(const char*, char* out) {
  if (threadIdx.x == 0) as<uint2>(out)[blockIdx.x] = make_uint2(cluster_rank(), cluster_size());
}

// Every block shows the others its part of the input and takes, from each in turn, a part of that, backwards.
template <class T>
__global__ void ld_cluster_kernel(const char* in, char* out) {
  SharedMemory memory;
  T* dynamic = memory.take<T>(32);
  BK_SHARED(T, fixed, [32]);
  const int thread = threadIdx.x, from = (blockIdx.x * 32 + thread) * 2;
  dynamic[thread] = as<T>(in)[from];
  fixed[thread] = as<T>(in)[from + 1];
  cluster_sync();
  const uint32_t peer = (cluster_rank() + thread) % cluster_size();
  as<T>(out)[from] = ld_cluster<T>(cluster_address(dynamic, peer) + (31 - thread) * sizeof(T));
  as<T>(out)[from + 1] = ld_cluster<T>(cluster_address(&fixed[31 - thread], peer));
  cluster_sync();
}

// Every block writes its part of the input, backwards, into the next block's memory. The first barrier's halves stand
// apart.
template <class T>
__global__ void st_cluster_kernel(const char* in, char* out) {
  BK_SHARED(T, slots, [32]);
  const int thread = threadIdx.x;
  cluster_arrive();
  const T value = as<T>(in)[blockIdx.x * 32 + thread];
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  cluster_wait();
  st_cluster(cluster_address(&slots[31 - thread], next), value);
  cluster_sync();
  as<T>(out)[blockIdx.x * 32 + thread] = slots[thread];
}

// The same asynchronously: the next block's mbarrier counts the bytes.
template <class T>
__global__ void st_async_kernel(const char* in, char* out) {
  BK_SHARED(T, slots, [32]);
  BK_SHARED(Mbarrier, landed, [1]);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(landed, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(landed, 32 * sizeof(T));
  }
  cluster_sync();
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  st_async(&slots[31 - thread], as<T>(in)[blockIdx.x * 32 + thread], landed, next);
  mbarrier_wait_cluster(landed, 0);
  as<T>(out)[blockIdx.x * 32 + thread] = slots[thread];
}

// Each block hands the next five words of each of its lanes, one at a time, through one slot a lane.
__global__ void mbarrier_arrive_cluster_kernel(const char* in, char* out) {
  BK_SHARED(int, slot, [32]);
  BK_SHARED(Mbarrier, full, [1]);
  BK_SHARED(Mbarrier, empty, [1]);
  const int lane = threadIdx.x % 32, blocks = gridDim.x;
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  const uint32_t previous = (cluster_rank() + cluster_size() - 1) % cluster_size();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    fence_barrier_init();
  }
  cluster_sync();
  for (int step = 0; step < 5; step++) {
    const int at = (step * blocks + static_cast<int>(blockIdx.x)) * 32 + lane;
    if (threadIdx.x < 32) {
      mbarrier_wait_cluster(empty, (step & 1) ^ 1);
      st_cluster(cluster_address(&slot[lane], next), as<int>(in)[at]);
      mbarrier_arrive_cluster(full, next);
    } else {
      mbarrier_wait_cluster(full, step & 1);
      as<int>(out)[at] = slot[31 - lane];
      mbarrier_arrive_cluster(empty, previous);
    }
  }
  cluster_sync();
}

template <auto kKernel, int kThreads, int kSharedBytes = 0>
constexpr auto kClusterCase = launch_case<kKernel, kThreads, 2 * kClusterBlocks, kSharedBytes, false, kClusterBlocks>;

// Clusters that run and ones that do not.
int cluster_host_case(const Buffers& buffers) {
  LaunchConfig config;
  config.grid = dim3(6);
  config.block = dim3(32);
  config.cluster = 2;
  const int fit = occupancy_clusters(cluster_rank_kernel, config);
  config.cluster = 4;  // no divisor of the grid
  const int refused = launch(cluster_rank_kernel, config, buffers.in, buffers.out);
  if (fit < 1 || refused == 0) return 1;
  config.grid = dim3(8);
  return launch(cluster_rank_kernel, config, buffers.in, buffers.out);
}

// ---- tma.cuh

constexpr int kBulkBytes = 1024;

__device__ void start_barrier(Mbarrier* barrier) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_barrier_init();
  }
  __syncthreads();
}

template <bool kTryWait>
__global__ void bulk_load_kernel(const char* in, char* out) {
  SharedMemory memory;
  char* tile = memory.take<char>(kBulkBytes, 128);
  Mbarrier* barrier = memory.take<Mbarrier>(1, 8);
  start_barrier(barrier);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, kBulkBytes);
    bulk_load(tile, in, kBulkBytes / 2, barrier);
    bulk_load(tile + kBulkBytes / 2, in + kBulkBytes / 2, kBulkBytes / 2, barrier);
  }
  if (kTryWait) {
    while (!mbarrier_try_wait(barrier, 0)) {
    }
  } else {
    mbarrier_wait(barrier, 0);
  }
  as<uint4>(out)[threadIdx.x] = as<uint4>(tile)[63 - threadIdx.x];
}

// The input through shared memory to out, twice: the second time bytes the source's reuse has changed.
__global__ void bulk_store_kernel(const char* in, char* out) {
  SharedMemory memory;
  uint4* tile = memory.take<uint4>(64, 128);
  const int i = threadIdx.x;
  tile[i] = as<uint4>(in)[i];
  fence_proxy_async();
  __syncthreads();
  if (i == 0) {
    bulk_store(out, tile, kBulkBytes);
    bulk_commit();
    bulk_wait_read<0>();
  }
  __syncthreads();
  tile[i] = as<uint4>(in)[63 - i];
  fence_proxy_async();
  __syncthreads();
  if (i == 0) {
    bulk_store(out + kBulkBytes, tile, kBulkBytes);
    bulk_commit();
    bulk_wait<0>();
  }
}

template <class T>
__global__ void bulk_reduce_add_kernel(const char* in, char* out) {
  SharedMemory memory;
  uint4* tile = memory.take<uint4>(64, 128);
  tile[threadIdx.x] = as<uint4>(in)[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_reduce_add(as<T>(out), reinterpret_cast<const T*>(tile), kBulkBytes);
    bulk_commit();
    bulk_wait<0>();
  }
}

__global__ void reduce_add_kernel(const char* in, char* out) {
  const float* from = as<float>(in) + 4 * threadIdx.x;
  reduce_add(as<float>(out) + 4 * threadIdx.x, {from[0], from[1], from[2], from[3]});
}

// What test_conformance.py puts in front of the data.
struct TmaParameters {
  int element;  // 0 float, 1 f16, 2 bf16
  int rank;
  int swizzle;
  int bytes;  // of the box
  uint64_t dims[5];
  uint64_t strides[5];  // of dimensions 1 to 4
  uint32_t box[5];
  uint32_t element_strides[5];
  int start[5];
  int tile_offset;  // of the tile in shared memory, a multiple of 128
};
constexpr int kTmaHeader = 256;
static_assert(sizeof(TmaParameters) <= kTmaHeader);
constexpr int kTmaShared = 64 * 1024;

struct TmaStart {
  int at[5];
};

template <int kRank>
__device__ void take_start(const TmaStart& start, int (&out)[kRank]) {
  for (int i = 0; i < kRank; i++) out[i] = start.at[i];
}

// The box as it lies in shared memory, which is first filled with 0xee bytes. With kMulticast the last of a cluster's
// blocks loads for all but the first.
template <int kRank, bool kMulticast>
__global__ void tma_load_kernel(const __grid_constant__ TensorMap map, TmaStart where, int bytes, int tile_offset,
                                char* out) {
  SharedMemory memory;
  char* tile = memory.take<char>(kTmaShared, 1024) + tile_offset;
  Mbarrier* barrier = memory.take<Mbarrier>(1, 8);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) tile[i] = static_cast<char>(0xee);
  fence_proxy_async();
  start_barrier(barrier);
  int start[kRank];
  take_start(where, start);
  if constexpr (kMulticast) {
    const uint32_t blocks = cluster_size();
    const bool receives = cluster_rank() > 0;
    if (threadIdx.x == 0 && receives) mbarrier_arrive_expect_tx(barrier, bytes);
    cluster_sync();
    if (threadIdx.x == 0 && cluster_rank() == blocks - 1) {
      tma_load_multicast(tile, map, barrier, start, static_cast<uint16_t>((1u << blocks) - 2));
    }
    if (receives) mbarrier_wait(barrier, 0);
    out += int64_t{bytes} * blockIdx.x;
  } else {
    if (threadIdx.x == 0) {
      prefetch_tensor_map(map);
      mbarrier_arrive_expect_tx(barrier, bytes);
      tma_load(tile, map, barrier, start);
    }
    mbarrier_wait(barrier, 0);
  }
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = tile[i];
}

template <int kRank, bool kAdd>
__global__ void tma_store_kernel(const __grid_constant__ TensorMap map, TmaStart where, int bytes, int tile_offset,
                                 const char* in) {
  SharedMemory memory;
  char* tile = memory.take<char>(kTmaShared, 1024) + tile_offset;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) tile[i] = in[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int start[kRank];
    take_start(where, start);
    if constexpr (kAdd) {
      tma_reduce_add(map, tile, start);
    } else {
      tma_store(map, tile, start);
    }
    bulk_commit();
    bulk_wait<0>();
  }
}

TensorMap map_of(const TmaParameters& p, const void* global) {
  const auto make = p.element == 0   ? make_tensor_map<float>
                    : p.element == 1 ? make_tensor_map<__half>
                                     : make_tensor_map<__nv_bfloat16>;
  return make(global, p.rank, p.dims, p.strides, p.box, p.element_strides, p.swizzle);
}

template <int kRank>
int tma_load_rank(const TmaParameters& p, const Buffers& buffers, const LaunchConfig& config, const TmaStart& start) {
  return launch(tma_load_kernel<kRank, false>, config, map_of(p, buffers.in + kTmaHeader), start, p.bytes,
                p.tile_offset, buffers.out);
}

template <int kRank>
int tma_load_multicast_rank(const TmaParameters& p, const Buffers& buffers, const LaunchConfig& config,
                            const TmaStart& start) {
  LaunchConfig clusters = config;
  clusters.grid = dim3(kClusterBlocks);
  clusters.cluster = kClusterBlocks;
  return launch(tma_load_kernel<kRank, true>, clusters, map_of(p, buffers.in + kTmaHeader), start, p.bytes,
                p.tile_offset, buffers.out);
}

template <int kRank>
int tma_store_rank(const TmaParameters& p, const Buffers& buffers, const LaunchConfig& config, const TmaStart& start) {
  return launch(tma_store_kernel<kRank, false>, config, map_of(p, buffers.out), start, p.bytes, p.tile_offset,
                buffers.in + kTmaHeader);
}

template <int kRank>
int tma_reduce_add_rank(const TmaParameters& p, const Buffers& buffers, const LaunchConfig& config,
                        const TmaStart& start) {
  return launch(tma_store_kernel<kRank, true>, config, map_of(p, buffers.out), start, p.bytes, p.tile_offset,
                buffers.in + kTmaHeader);
}

using TmaRun = int (*)(const TmaParameters&, const Buffers&, const LaunchConfig&, const TmaStart&);

int tma_case(const TmaRun (&by_rank)[5], const Buffers& buffers) {
  TmaParameters parameters;
  std::memcpy(&parameters, buffers.parameters, sizeof parameters);
  LaunchConfig config;
  config.grid = dim3(1);
  config.block = dim3(128);
  config.shared_bytes = kTmaShared + 1024;
  TmaStart start;
  std::memcpy(start.at, parameters.start, sizeof start.at);
  const int rank = parameters.rank < 1 || parameters.rank > 5 ? 1 : parameters.rank;  // make_tensor_map refuses it
  return by_rank[rank - 1](parameters, buffers, config, start);
}

int tma_load_case(const Buffers& buffers) {
  return tma_case({tma_load_rank<1>, tma_load_rank<2>, tma_load_rank<3>, tma_load_rank<4>, tma_load_rank<5>}, buffers);
}

int tma_load_multicast_case(const Buffers& buffers) {
  return tma_case({tma_load_multicast_rank<1>, tma_load_multicast_rank<2>, tma_load_multicast_rank<3>,
                   tma_load_multicast_rank<4>, tma_load_multicast_rank<5>},
                  buffers);
}

int tma_store_case(const Buffers& buffers) {
  return tma_case({tma_store_rank<1>, tma_store_rank<2>, tma_store_rank<3>, tma_store_rank<4>, tma_store_rank<5>},
                  buffers);
}

int tma_reduce_add_case(const Buffers& buffers) {
  return tma_case({tma_reduce_add_rank<1>, tma_reduce_add_rank<2>, tma_reduce_add_rank<3>, tma_reduce_add_rank<4>,
                   tma_reduce_add_rank<5>},
                  buffers);
}

// ---- wgmma.cuh

// What test_conformance.py puts in front of the operands' bytes. Each step multiplies 16 elements of K.
struct WgmmaParameters {
  int steps;
  int accumulate;        // whether the first step adds to the accumulators given, or starts from nothing
  int a_bytes, b_bytes;  // as they lie in shared memory, multiples of 16, behind this header in that order
  int swizzle;
  uint32_t a_lbo, a_sbo, b_lbo, b_sbo;
  int a_offsets[8], b_offsets[8];  // where each step's descriptors start
};
constexpr int kWgmmaHeader = 256;
static_assert(sizeof(WgmmaParameters) <= kWgmmaHeader);
constexpr int kWgmmaABytes = 32 * 1024, kWgmmaBBytes = 64 * 1024;

// out: d[N / 2] of each of the 128 threads, initial values in, results out. With kRegisters the a bytes are the four
// registers of each thread, 128 threads a step.
template <class T, int N, bool kTransA, bool kTransB, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const char* in, char* out) {
  SharedMemory memory;
  char* a_tile = memory.take<char>(kWgmmaABytes, 1024);
  char* b_tile = memory.take<char>(kWgmmaBBytes, 1024);
  const WgmmaParameters& p = *as<WgmmaParameters>(in);
  const int thread = threadIdx.x;
  for (int i = thread * 16; i < p.a_bytes; i += 128 * 16) {
    *as<uint4>(a_tile + i) = *as<uint4>(in + kWgmmaHeader + i);
  }
  for (int i = thread * 16; i < p.b_bytes; i += 128 * 16) {
    *as<uint4>(b_tile + i) = *as<uint4>(in + kWgmmaHeader + p.a_bytes + i);
  }
  fence_proxy_async();
  __syncthreads();
  float d[N / 2];
#pragma unroll
  for (int j = 0; j < N / 2; j++) d[j] = as<float>(out)[thread * (N / 2) + j];
  for (int step = 0; step < p.steps; step++) {
    const uint64_t b = wgmma_descriptor(b_tile + p.b_offsets[step], p.b_lbo, p.b_sbo, p.swizzle);
    const bool accumulate = p.accumulate || step > 0;
    if constexpr (kRegisters) {
      const uint4 registers = as<uint4>(in + kWgmmaHeader)[128 * step + thread];
      const uint32_t a[4] = {registers.x, registers.y, registers.z, registers.w};
      wgmma_fence();
      wgmma_rs<T, N, kTransB>(d, a, b, accumulate);
      wgmma_commit();
      wgmma_wait<0>();
    } else {
      const uint64_t a = wgmma_descriptor(a_tile + p.a_offsets[step], p.a_lbo, p.a_sbo, p.swizzle);
      wgmma_fence();
      wgmma_ss<T, N, kTransA, kTransB>(d, a, b, accumulate);
      wgmma_commit();
      wgmma_wait<0>();
    }
  }
#pragma unroll
  for (int j = 0; j < N / 2; j++) as<float>(out)[thread * (N / 2) + j] = d[j];
}

template <class T, int N, bool kTransA, bool kTransB, bool kRegisters>
constexpr auto kWgmma =
    launch_case<wgmma_kernel<T, N, kTransA, kTransB, kRegisters>, 128, 1, kWgmmaABytes + kWgmmaBBytes>;

// Every N, half of them with each type and source of A.
template <int... kEighths>
void fill_shapes(int (*(&run)[32])(const Buffers&), std::integer_sequence<int, kEighths...>) {
  ((run[kEighths] = kEighths % 2 == 0 ? kWgmma<__nv_bfloat16, 8 * kEighths + 8, false, false, false>
                                      : kWgmma<__half, 8 * kEighths + 8, false, true, true>),
   ...);
}

int wgmma_shape_case(const Buffers& buffers) {
  static int (*run[32])(const Buffers&) = {};
  if (!run[0]) fill_shapes(run, std::make_integer_sequence<int, 32>());
  int columns;  // in the header's last word
  std::memcpy(&columns, buffers.parameters + kWgmmaHeader - sizeof columns, sizeof columns);
  return run[columns / 8 - 1](buffers);
}

// Two products in flight, of which the first is waited for with wait<1>; then registers given and taken.
__global__ void __launch_bounds__(384, 1) pipelined_kernel(const char* in, char* out) {
  SharedMemory memory;
  uint4* tiles = memory.take<uint4>(2 * 512, 1024);  // two K-major tiles of 64 rows, 128 bytes each
  for (int i = threadIdx.x; i < 2 * 512; i += 384) tiles[i] = as<uint4>(in)[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x < 128) {
    set_max_registers_dec<24>();
  } else {
    set_max_registers_inc<240>();
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1;
    const uint64_t a = wgmma_descriptor(tiles, 0, 1024, 128), b = wgmma_descriptor(tiles + 512, 0, 1024, 128);
    float first[32], second[32];
    wgmma_fence();
    wgmma_ss<__nv_bfloat16, 64>(first, a, b, false);
    wgmma_commit();
    wgmma_ss<__nv_bfloat16, 64>(second, a + 2, b + 2, false);  // the next 16 elements of K, 32 bytes on
    wgmma_commit();
    wgmma_wait<1>();
#pragma unroll
    for (int j = 0; j < 32; j++) as<float>(out)[(group * 256 + thread) * 32 + j] = first[j];
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < 32; j++) as<float>(out)[(group * 256 + 128 + thread) * 32 + j] = second[j];
  }
}

const conformance::Case kCases[] = {
    {"stmatrix_x4", launch_case<stmatrix_x4_kernel, 32>},
    {"exp2_approx", launch_case<exp2_approx_kernel, 256>},
    {"exp2_polynomial", launch_case<exp2_polynomial_kernel, 256>},
    {"mbarrier_wait", launch_case<mbarrier_kernel<false>, 64>},
    {"mbarrier_try_wait", launch_case<mbarrier_kernel<true>, 64>},
    {"cluster_rank", kClusterCase<cluster_rank_kernel, 32>},
    {"cluster_host", cluster_host_case},
    {"ld_cluster_4", kClusterCase<ld_cluster_kernel<uint32_t>, 32, 32 * 4>},
    {"ld_cluster_8", kClusterCase<ld_cluster_kernel<uint2>, 32, 32 * 8>},
    {"ld_cluster_16", kClusterCase<ld_cluster_kernel<uint4>, 32, 32 * 16>},
    {"st_cluster_4", kClusterCase<st_cluster_kernel<uint32_t>, 32>},
    {"st_cluster_8", kClusterCase<st_cluster_kernel<uint2>, 32>},
    {"st_cluster_16", kClusterCase<st_cluster_kernel<uint4>, 32>},
    {"st_async_4", kClusterCase<st_async_kernel<uint32_t>, 32>},
    {"st_async_8", kClusterCase<st_async_kernel<uint2>, 32>},
    {"st_async_16", kClusterCase<st_async_kernel<uint4>, 32>},
    {"mbarrier_arrive_cluster", kClusterCase<mbarrier_arrive_cluster_kernel, 64>},
    {"bulk_load", launch_case<bulk_load_kernel<false>, 64, 1, kBulkBytes + 16>},
    {"bulk_load_try_wait", launch_case<bulk_load_kernel<true>, 64, 1, kBulkBytes + 16>},
    {"bulk_store", launch_case<bulk_store_kernel, 64, 1, kBulkBytes>},
    {"reduce_add", launch_case<reduce_add_kernel, 64>},
    {"bulk_reduce_add_float", launch_case<bulk_reduce_add_kernel<float>, 64, 1, kBulkBytes>},
    {"bulk_reduce_add_f16", launch_case<bulk_reduce_add_kernel<__half>, 64, 1, kBulkBytes>},
    {"bulk_reduce_add_bf16", launch_case<bulk_reduce_add_kernel<__nv_bfloat16>, 64, 1, kBulkBytes>},
    {"tma_load", tma_load_case},
    {"tma_load_multicast", tma_load_multicast_case},
    {"tma_store", tma_store_case},
    {"tma_reduce_add", tma_reduce_add_case},
    {"wgmma_shape", wgmma_shape_case},
    {"wgmma_ss_bf16_64", kWgmma<__nv_bfloat16, 64, false, false, false>},
    {"wgmma_ss_bf16_64_a", kWgmma<__nv_bfloat16, 64, true, false, false>},
    {"wgmma_ss_bf16_64_b", kWgmma<__nv_bfloat16, 64, false, true, false>},
    {"wgmma_ss_bf16_64_ab", kWgmma<__nv_bfloat16, 64, true, true, false>},
    {"wgmma_rs_bf16_64", kWgmma<__nv_bfloat16, 64, false, false, true>},
    {"wgmma_rs_bf16_64_b", kWgmma<__nv_bfloat16, 64, false, true, true>},
    {"wgmma_ss_f16_128", kWgmma<__half, 128, false, false, false>},
    {"wgmma_ss_f16_128_ab", kWgmma<__half, 128, true, true, false>},
    {"wgmma_rs_f16_128", kWgmma<__half, 128, false, false, true>},
    {"wgmma_rs_f16_128_b", kWgmma<__half, 128, false, true, true>},
    {"pipelined", launch_case<pipelined_kernel, 384, 1, 16384>},
};

}  // namespace

BK_CONFORMANCE(kCases)
