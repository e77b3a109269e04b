// Layer norm and RMS norm of rows that one block cannot hold, where blocks reach each other's shared memory (compute
// capability 90): forward and backward, in place of layer_norm.cuh's pairs of kernels over chunks of rows.
//
// A cluster of 2, 4 or 8 blocks owns a row, and each block holds its part of it in registers:
//
//     column   0        part       2 part             cols
//              | rank 0 |  rank 1  |  ...  |  rank n-1  |     part: the row over n, rounded up to 8 vectors
//
// so the row is read once; the pairs read it a second time, from L2. A block reduces its part and hands the result to
// every block of the cluster (its own too), which all add them in the order of the ranks: forward the mean, in two
// floats, and the squares about it, by Chan's formula; backward the sums of g and g h. Maths, numerics and arguments
// are those of layer_norm.cuh.
//
// The exchange. Each block stores into all the others' memory with st_async, which counts its bytes on the target's
// mbarrier; the block waits for n of them. No barrier of the cluster stands between the parts and the result: its
// release would wait for all of the block's writes. The cluster's only barrier comes before the first exchange (the
// others' mbarriers must stand), and its first half before the loads, so that the loads hide it. A block needs no
// barrier to end: it has waited for all that is written to its memory, and what it sent needs only the blocks that wait
// for it.
//
// Backward exchanges for every row, through two buffers with an mbarrier each, by turns. A block sends for row k + 2
// once it has row k + 1 of all, and it gets that of another block only when that one is done with row k, since its
// threads meet at a block barrier between reading one row's sums and sending the next. With one buffer, a fast block's
// sums for row k + 1 could count for a slow block's for row k.
//
// Floors: forward reads and writes the matrix once, 2 rows cols sizeof(T) bytes; backward reads two and writes one.
// Exchanged are 8 or 16 n bytes for each block and row, between multiprocessors.
//
// What a part holds, 512 threads of 32 elements forward and 16 backward, and so the widest rows: 131,072 and 65,536
// columns of 16 bits, 131,072 and 32,768 of 32, and 32,768 of any where nothing is aligned to vectors. The smallest
// cluster that holds the row is taken, larger ones when there are too few rows to occupy the GPU.
//
// Registers, by ptxas for sm_90a: forward at most 64 for 16 bits (two blocks a multiprocessor) and 128 for 32 (one,
// with as many bytes in flight), backward at most 128; nothing spills. Not measured.
#pragma once

#include "device/hopper.cuh"
#include "kernels/layer_norm.cuh"

#include <cstdint>
#include <optional>

namespace bigkern {
namespace layer_norm {

constexpr int kMaxCluster = 8, kClusterThreads = 512;

template <int V>
constexpr int kClusterForwardItems = V > 1 ? 32 / V : kForwardItems<V>;
// Blocks a multiprocessor that the registers are planned for.
template <class T, int V>
constexpr int kClusterForwardBlocks = V > 1 && sizeof(T) == 4 ? 1 : 2;

// One value from each block of the cluster to all.
template <class Value>
struct ClusterExchange {
  Value* values;     // two buffers of kMaxCluster
  Mbarrier* landed;  // one for each

  // By all threads, a cluster_wait before the first exchange.
  __device__ __forceinline__ void start() const {
    if (threadIdx.x == 0) {
      mbarrier_init(&landed[0], 1);
      mbarrier_init(&landed[1], 1);
      fence_barrier_init();
    }
    cluster_arrive();
  }

  // The values of all blocks, by rank. `turn` counts the calls; the block's threads meet between one and the next.
  __device__ __forceinline__ const Value* operator()(int turn, const Value& own) const {
    const int buffer = turn & 1;
    const uint32_t size = cluster_size();
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&landed[buffer], size * sizeof(Value));
    if (threadIdx.x < size) {
      st_async(&values[buffer * kMaxCluster + cluster_rank()], own, &landed[buffer], threadIdx.x);
    }
    // Nothing is read but the bytes that were counted, in this block's own memory. An acquire of the cluster's scope
    // would also drop what L1 holds of the parameters, for every row.
    mbarrier_wait(&landed[buffer], turn >> 1 & 1);
    return values + buffer * kMaxCluster;
  }
};

// How many of the row's columns block `rank` has.
__device__ __forceinline__ int part_cols(int64_t cols, int part, uint32_t rank) {
  return static_cast<int>(min(cols - int64_t{rank} * part, int64_t{part}));
}

}  // namespace layer_norm

// A cluster a row, `part` columns a block.
template <class T, int V>
__global__ void __launch_bounds__(layer_norm::kClusterThreads, (layer_norm::kClusterForwardBlocks<T, V>))
    layer_norm_forward_cluster_kernel(const LayerNormForwardParams p, int part) {
  if constexpr (kHopper) {
    using namespace layer_norm;
    constexpr int kThreads = kClusterThreads, kItems = kClusterForwardItems<V>;
    BK_SHARED(float4, values, [2 * kMaxCluster]);
    BK_SHARED(Mbarrier, landed, [2]);
    const ClusterExchange<float4> exchange = {values, landed};
    exchange.start();

    const uint32_t rank = cluster_rank(), size = cluster_size();
    const int64_t row = blockIdx.x / size, first = int64_t{rank} * part;
    const int lane = threadIdx.x, cols = part_cols(p.cols, part, rank);
    Held<T, V> tile[kItems];
    load_summed<kThreads>(p, row, first, lane, cols, tile);
    const Moments own = tile_moments<kThreads, kThreads>(tile, lane, cols, p.rms);
    cluster_wait();
    const float4* parts = exchange(0, make_float4(own.center, own.correction, own.squares, 0.0f));

    const float center = parts[0].x;
    float sum = 0.0f, squares = 0.0f;
    for (uint32_t i = 0; i < size; i++) {
      sum += ((parts[i].x - center) + parts[i].y) * part_cols(p.cols, part, i);
    }
    const float correction = sum / static_cast<float>(p.cols);
    for (uint32_t i = 0; i < size; i++) {
      const float difference = (parts[i].x - center) + (parts[i].y - correction);
      squares += parts[i].z + difference * difference * part_cols(p.cols, part, i);
    }
    const Moments moments = {center, correction, squares};
    const float rstd = reciprocal_deviation(p, moments);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int column = item_column<kThreads, V>(i, lane);
      if (column < cols) store_normalised(p, row, first, column, tile[i].get(), moments, rstd);
    }
    if (lane == 0 && rank == 0) store_statistics(p, row, moments, rstd);
  }
}

namespace layer_norm {

// Row means by adding the sums of the cluster's blocks.
struct ExchangeSums {
  const LayerNormBackwardParams& p;
  ClusterExchange<float2> exchange;
  int64_t first;
  int lane, turn = 0;

  template <class Tile>
  __device__ __forceinline__ float2 operator()(const Tile& tile, int64_t, int cols) {
    float own[2];
    sum_tile<kClusterThreads>(p, first, lane, cols, tile, own);
    row_sum<kClusterThreads, kClusterThreads>(own, turn & 1);
    if (turn == 0) cluster_wait();
    const float2* parts = exchange(turn++, make_float2(own[0], own[1]));
    float2 sums = make_float2(0.0f, 0.0f);
    for (uint32_t i = 0; i < cluster_size(); i++) {
      sums.x += parts[i].x;
      sums.y += parts[i].y;
    }
    const float count = static_cast<float>(p.cols);
    return make_float2(sums.x / count, sums.y / count);
  }
};

}  // namespace layer_norm

// A persistent grid of no more clusters than rows; parameter sums in registers, one row of partial sums a cluster.
template <class T, int V>
__global__ void __launch_bounds__(layer_norm::kClusterThreads)
    layer_norm_backward_cluster_kernel(const LayerNormBackwardParams p, int part, layer_norm::PartialSums partial) {
  if constexpr (kHopper) {
    using namespace layer_norm;
    constexpr int kThreads = kClusterThreads, kItems = kBackwardItems<V>;
    BK_SHARED(float2, values, [2 * kMaxCluster]);
    BK_SHARED(Mbarrier, landed, [2]);
    const ClusterExchange<float2> exchange = {values, landed};
    exchange.start();

    const uint32_t rank = cluster_rank(), size = cluster_size();
    const int64_t cluster = blockIdx.x / size, clusters = gridDim.x / size, first = int64_t{rank} * part;
    const int lane = threadIdx.x, cols = part_cols(p.cols, part, rank);
    RegisterSums<V, kItems> sums;
    backward_rows<T, V, kItems, kThreads>(p, {cluster, cluster, clusters, p.rows}, first, cols, lane, sums,
                                          ExchangeSums{p, exchange, first, lane});
    const int64_t start = cluster * p.cols + first;
    if (partial.weight != nullptr) store_thread_sums<kThreads>(sums.weight, lane, cols, false, partial.weight + start);
    if (partial.bias != nullptr) store_thread_sums<kThreads>(sums.bias, lane, cols, false, partial.bias + start);
  }
}

namespace layer_norm {

// Blocks a row and columns of each; size 0: no cluster holds the row, or the device has none.
struct ClusterPlan {
  unsigned size;
  int part;
};

template <int V>
ClusterPlan plan_cluster(int64_t rows, int64_t cols, int64_t tile_cols) {
  // 8 vectors: whole lines of the cache. Even in the narrowest rows that come here every block keeps some columns.
  auto part = [cols](unsigned size) { return round_up<int64_t>(ceil_div<int64_t>(cols, size), 8 * V); };
  if (compute_capability() != 90 || part(kMaxCluster) > tile_cols) return {0, 0};
  unsigned size = 2;
  while (part(size) > tile_cols || (size < kMaxCluster && rows * size < multiprocessor_count())) size *= 2;
  return {size, static_cast<int>(part(size))};
}

inline LaunchConfig cluster_grid(int64_t clusters, unsigned size, Stream stream) {
  LaunchConfig config = grid_of(clusters * size, kClusterThreads, 0, stream);
  config.cluster = size;
  return config;
}

template <class T, int V>
std::optional<int> launch_forward_cluster(const LayerNormForwardParams& p, Stream stream) {
  const ClusterPlan plan = plan_cluster<V>(p.rows, p.cols, kClusterThreads * kClusterForwardItems<V> * V);
  if (plan.size == 0) return std::nullopt;
  return launch(layer_norm_forward_cluster_kernel<T, V>, cluster_grid(p.rows, plan.size, stream), p, plan.part);
}

template <class T, int V>
std::optional<int> launch_backward_cluster(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate) {
  const ClusterPlan plan = plan_cluster<V>(p.rows, p.cols, kClusterThreads * kBackwardItems<V> * V);
  if (plan.size == 0) return std::nullopt;
  const auto kernel = layer_norm_backward_cluster_kernel<T, V>;
  const int64_t resident = int64_t{multiprocessor_count()} * occupancy(kernel, kClusterThreads, 0) / plan.size;
  const int64_t clusters = persistent_blocks(p.rows, resident);
  const PartialSums partial = allocate_partial_sums(p, clusters, allocate);
  if (int error = launch(kernel, cluster_grid(clusters, plan.size, stream), p, plan.part, partial)) return error;
  return launch_parameter_gradients<T>(p, partial, clusters, stream);
}

}  // namespace layer_norm
}  // namespace bigkern
