// Layer norm and RMS norm: forward and backward, with residual addition and dropout in the same pass.
//
// Maths, for each row x of `cols` elements (rms: mean = 0, no bias):
//     s    = residual + dropout(input), rounded to T; without a residual s = input
//     mean = sum(s) / cols        rstd = 1 / sqrt(sum((s - mean)^2) / cols + eps)        h = (s - mean) rstd
//     output = h weight + bias
// Backward, with g = grad_output weight:
//     grad_s        = rstd (g - sum(g) / cols - h sum(g h) / cols) + grad_summed          (rms: without the sum(g)
//     term) grad_residual = grad_s              grad_input = dropout(grad_s), the same mask grad_weight   = sum over
//     rows of grad_output h        grad_bias = sum over rows of grad_output
//
// Floors: both directions are bound by memory. Forward reads and writes the matrix once, 2 rows cols sizeof(T) bytes,
// twice that with a residual; backward reads two and writes one, 3 rows cols sizeof(T), plus one for grad_summed and
// one for the second gradient under dropout. Parameters, mean and rstd are small beside it; so are backward's partial
// parameter sums, 8 bytes x cols x blocks written and read once, as long as rows >> blocks.
//
// Tiling. A group of kLanes threads owns a row; each thread holds kItems vectors of V elements (16 bytes, or one
// element where a pointer, a row stride or cols is not a multiple of 16 bytes):
//
//     column   0      V     2V        kLanes V                2 kLanes V
//              |lane 0|lane 1| ... |lane 0|lane 1| ...        |          neighbouring lanes, neighbouring vectors
//              `------ item 0 -----'`------ item 1 ----------'
//
//     lanes 4 .. 32    several rows a warp, sums by shuffles, no barrier
//     lanes 128 ..     a row per block (forward) or per part of the block (backward)
//
// Forward, by width: registers up to 2048 vectors (16,384 columns of 16 bits, 8,192 of 32; unvectorised 8,192); the
// row in shared memory where two blocks fit a multiprocessor; wider rows, and rows too few to occupy the GPU, are cut
// into chunks: a first kernel reduces each chunk to (mean, squares about it), a second combines the chunks of its row
// and normalises. The second read of a chunk is served by L2, since the rows of one pair of launches are kept below
// kWideBytes. On compute capability 90 a cluster of blocks holds such rows and reads them once: layer_norm_cluster.cuh.
//
// Backward: a persistent grid. Each thread keeps its columns' parameter sums over all rows of its block, in registers,
// or in shared memory from 1024 to 2048 vectors a row, and holds the next row's loads in flight while it works on this
// one. Each block writes one row of partial sums; a last kernel adds them in a fixed order. Wider rows: chunks, as in
// the forward pass.
//
// Numerics: everything between load and store is fp32. The variance is taken about the mean (two passes over the row on
// chip), and the first pass's rounding is corrected by the mean of the differences it leaves, which stays a separate
// term: s - mean is exact for rows with a mean far from zero. Chunks combine by Chan's formula. All sums have a fixed
// order, so equal inputs give equal bits. A row is never mixed with another, nor a NaN of it.
//
// Registers, by ptxas for sm_80 and sm_90a: forward at most 64, so that 1024 threads a multiprocessor hold 64 KiB of
// loads in flight; backward at most 128, so 512 threads with 32 KiB and the next row's among them; nothing spills.
//
// Expected: the time of the bytes above at the copy rate, once the matrix is some tens of MB; rows beyond kWideBytes
// pay for one more pass over L2 and the launches between. Not measured.
#pragma once

#include "device/device.cuh"
#include "kernels/layer_norm.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

namespace bigkern {
namespace layer_norm {

// Reads of one pair of launches over wide rows: below half of the L2 cache of the large GPUs, above what a launch
// costs.
constexpr int64_t kWideBytes = 24 << 20;

// Vectors a thread holds: 64 bytes in flight forward, 2 x 32 backward (more in the shared-memory variant, whose
// parameter sums cost no registers). Without vectors: elements.
template <int V>
constexpr int kForwardItems = V > 1 ? 4 : 8;
template <int V>
constexpr int kBackwardItems = V > 1 ? 2 : 8;

// ---- Per-thread pieces ----

// A vector that a thread keeps, in whole 32-bit registers: as a Vec of 16-bit elements that lives through a branch or a
// loop it would take a register an element.
template <class T, int V>
struct Held {
  using Word = std::conditional_t<sizeof(T) * V == 16, uint4, Vec<T, V>>;
  Word word;

  __device__ __forceinline__ Vec<T, V> get() const {
    Vec<T, V> values;
    *reinterpret_cast<Word*>(&values) = word;
    return values;
  }
  __device__ __forceinline__ void set(const Vec<T, V>& values) { word = *reinterpret_cast<const Word*>(&values); }
};

// The sums of each of the values over the kLanes threads of a row, in all of them. A row of more than one warp takes
// one block barrier; a caller that loops alternates `buffer` between 0 and 1, so that a late reader finds its values
// still there.
template <int kLanes, int kThreads, int kValues>
__device__ __forceinline__ void row_sum(float (&values)[kValues], int buffer = 0) {
#pragma unroll
  for (int i = 0; i < kValues; i++) values[i] = group_sum<(kLanes < 32 ? kLanes : 32)>(values[i]);
  if constexpr (kLanes > 32) {
    constexpr int kRowWarps = kLanes / 32;
    BK_SHARED(float, partial, [2][kValues][kThreads / 32]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kValues; i++) partial[buffer][i][warp] = values[i];
    }
    __syncthreads();
    const int source = warp / kRowWarps * kRowWarps + lane % kRowWarps;
#pragma unroll
    for (int i = 0; i < kValues; i++) values[i] = group_sum<kRowWarps>(partial[buffer][i][source]);
  }
}

template <class W, int V>
__device__ __forceinline__ void load_floats(const W* p, float (&values)[V]) {
  constexpr int kStep = V < kVecElements<W> ? V : kVecElements<W>;
#pragma unroll
  for (int j = 0; j < V; j += kStep) {
    const Vec<W, kStep> part = load_vec<W, kStep>(p + j);
#pragma unroll
    for (int k = 0; k < kStep; k++) values[j + k] = to_float(part.v[k]);
  }
}

// V parameters, from column `column` on: of the activations' type T, or floats. Null stands for `missing`. Their type
// is known at run time only: kernels for both would be two fifths of all instances.
template <class T, int V>
__device__ __forceinline__ void load_parameter(const void* parameter, bool is_float, int64_t column, float missing,
                                               float (&values)[V]) {
  if (parameter == nullptr) {
#pragma unroll
    for (int j = 0; j < V; j++) values[j] = missing;
  } else if (is_float) {
    load_floats<float>(static_cast<const float*>(parameter) + column, values);
  } else {
    load_floats<T>(static_cast<const T*>(parameter) + column, values);
  }
}

// To global memory, in one access: a plain store is split into words where the compiler loses sight of the alignment.
template <class T, int V>
__device__ __forceinline__ void store_global(T* p, const Vec<T, V>& values) {
  if constexpr (sizeof(T) * V == 16) {
    Held<T, V> held;
    held.set(values);
    __stcg(reinterpret_cast<uint4*>(p), held.word);
  } else {
    store_vec<T, V>(p, values);
  }
}

// This thread's first column of an item within a tile.
template <int kLanes, int V>
__device__ __forceinline__ int item_column(int item, int lane) {
  return (item * kLanes + lane) * V;
}

// Which of a thread's elements of a tile dropout keeps: element j of item i by bit i V + j. `start` is the tile's first
// element, counted over the whole matrix. The loop is not unrolled, since the interleaved rounds of several Philox
// would double the kernel's registers; it runs while the tile's loads are in flight.
template <int kLanes, int V, int kItems, class Params>
__device__ __forceinline__ uint32_t kept_elements(const Params& p, int64_t start, int lane, int cols) {
  static_assert(V == 1 || V % 4 == 0, "single elements, or whole groups of four");
  static_assert(kItems * V <= 32, "a bit each");
  if (p.philox == nullptr) return ~0u;
  const uint64_t seed = p.philox[0], offset = p.philox[1];
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column >= cols) break;
    const uint64_t element = start + column;
#pragma unroll
    for (int j = 0; j < V; j += 4) {  // V > 1 divides cols, so that a vector starts a group of four
      const uint4 words = philox4x32_10(seed, (element + j) / 4, offset);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      if constexpr (V == 1) {
        const int which = static_cast<int>(element % 4);
        const uint32_t own = which == 0 ? word[0] : which == 1 ? word[1] : which == 2 ? word[2] : word[3];
        kept |= uint32_t{uniform(own) > p.dropout_p} << i;
      } else {
#pragma unroll
        for (int k = 0; k < 4; k++) kept |= uint32_t{uniform(word[k]) > p.dropout_p} << (i * V + j + k);
      }
    }
  }
  return kept;
}

// kReadAgain: a second kernel reads the same and shall find it in L2, from where a streaming load would go first.
template <int kLanes, bool kReadAgain = false, class T, int V, int kItems>
__device__ __forceinline__ void load_tile(const T* tile_start, int lane, int cols, Held<T, V> (&tile)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if constexpr (kReadAgain) {
      if (column < cols) tile[i].set(load_vec<T, V>(tile_start + column));
    } else {
      if (column < cols) tile[i].set(load_vec_streaming<T, V>(tile_start + column));
    }
  }
}

// ---- Forward ----

// Loads the tile of `cols` columns from column `first` of a row; with a residual, forms the sum and stores it.
template <int kLanes, bool kReadAgain = false, class T, int V, int kItems>
__device__ __forceinline__ void load_summed(const LayerNormForwardParams& p, int64_t row, int64_t first, int lane,
                                            int cols, Held<T, V> (&tile)[kItems]) {
  load_tile<kLanes, kReadAgain>(static_cast<const T*>(p.input) + row * p.input_stride + first, lane, cols, tile);
  if (p.residual == nullptr) return;
  Held<T, V> residual[kItems];
  load_tile<kLanes>(static_cast<const T*>(p.residual) + row * p.residual_stride + first, lane, cols, residual);
  const int64_t start = row * p.cols + first;
  const uint32_t kept = kept_elements<kLanes, V, kItems>(p, start, lane, cols);
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column < cols) {
      Vec<T, V> sum = tile[i].get();
      const Vec<T, V> addend = residual[i].get();
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float dropped = kept >> (i * V + j) & 1 ? to_float(sum.v[j]) * p.dropout_scale : 0.0f;
        sum.v[j] = from_float<T>(dropped + to_float(addend.v[j]));
      }
      tile[i].set(sum);
      store_global<T, V>(static_cast<T*>(p.summed) + start + column, sum);
    }
  }
}

// The mean is center + correction, kept apart so that (x - center) - correction rounds only small numbers.
struct Moments {
  float center, correction;
  float squares;  // sum of (x - mean)^2
};

// From the row's differences to a center: their sum, and the sum of their squares. The clamp keeps NaN.
__device__ __forceinline__ Moments corrected_moments(float center, const float (&sums)[2], float count, bool rms) {
  if (rms) return {0.0f, 0.0f, sums[1]};
  const float correction = sums[0] / count;
  const float squares = sums[1] - sums[0] * correction;
  return {center, correction, squares < 0.0f ? 0.0f : squares};
}

template <int kLanes, int kThreads, class T, int V, int kItems>
__device__ __forceinline__ Moments tile_moments(const Held<T, V> (&tile)[kItems], int lane, int cols, bool rms) {
  float center = 0.0f;
  if (!rms) {
    float sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      if (item_column<kLanes, V>(i, lane) < cols) {
        const Vec<T, V> x = tile[i].get();
#pragma unroll
        for (int j = 0; j < V; j++) sum[0] += to_float(x.v[j]);
      }
    }
    row_sum<kLanes, kThreads>(sum);
    center = sum[0] / cols;
  }
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    if (item_column<kLanes, V>(i, lane) < cols) {
      const Vec<T, V> x = tile[i].get();
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float difference = to_float(x.v[j]) - center;
        sums[0] += difference;
        sums[1] += difference * difference;
      }
    }
  }
  row_sum<kLanes, kThreads>(sums);
  return corrected_moments(center, sums, static_cast<float>(cols), rms);
}

template <class T, int V>
__device__ __forceinline__ void store_normalised(const LayerNormForwardParams& p, int64_t row, int64_t first,
                                                 int column, const Vec<T, V>& x, const Moments& m, float rstd) {
  float weight[V], bias[V];
  load_parameter<T>(p.weight, p.float_parameters, first + column, 1.0f, weight);
  load_parameter<T>(p.bias, p.float_parameters, first + column, 0.0f, bias);
  Vec<T, V> out;
#pragma unroll
  for (int j = 0; j < V; j++) {
    out.v[j] = from_float<T>(((to_float(x.v[j]) - m.center) - m.correction) * rstd * weight[j] + bias[j]);
  }
  store_global<T, V>(static_cast<T*>(p.output) + row * p.cols + first + column, out);
}

__device__ __forceinline__ void store_statistics(const LayerNormForwardParams& p, int64_t row, const Moments& m,
                                                 float rstd) {
  if (p.mean != nullptr) p.mean[row] = m.center + m.correction;
  p.rstd[row] = rstd;
}

__device__ __forceinline__ float reciprocal_deviation(const LayerNormForwardParams& p, const Moments& m) {
  return rsqrtf(m.squares / static_cast<float>(p.cols) + p.eps);
}

}  // namespace layer_norm

// kThreads / kLanes rows a block, each held in registers.
template <class T, int V, int kLanes, int kThreads>
__global__ void __launch_bounds__(kThreads) layer_norm_forward_kernel(const LayerNormForwardParams p) {
  using namespace layer_norm;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  // A group past the last row has no columns; it only takes part in its warp's shuffles.
  const int cols = row < p.rows ? static_cast<int>(p.cols) : 0;
  Held<T, V> tile[kForwardItems<V>];
  load_summed<kLanes>(p, row, 0, lane, cols, tile);
  const Moments moments = tile_moments<kLanes, kThreads>(tile, lane, cols, p.rms);
  const float rstd = reciprocal_deviation(p, moments);
#pragma unroll
  for (int i = 0; i < kForwardItems<V>; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column < cols) store_normalised(p, row, 0, column, tile[i].get(), moments, rstd);
  }
  if (lane == 0 && cols > 0) store_statistics(p, row, moments, rstd);
}

// A row a block, held in dynamic shared memory. Each thread reads back only what it wrote.
template <class T, int V, int kThreads>
__global__ void __launch_bounds__(kThreads) layer_norm_forward_shared_kernel(const LayerNormForwardParams p) {
  using namespace layer_norm;
  constexpr int kItems = kForwardItems<V>, kTileCols = kThreads * kItems * V, kStep = kThreads * V;
  const int lane = threadIdx.x, cols = static_cast<int>(p.cols);
  const int64_t row = blockIdx.x;
  SharedMemory shared;
  T* held = shared.take<T>(cols);

  float sum[1] = {0.0f};
  for (int first = 0; first < cols; first += kTileCols) {
    const int tile_cols = min(cols - first, kTileCols);
    Held<T, V> tile[kItems];
    load_summed<kThreads>(p, row, first, lane, tile_cols, tile);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int column = item_column<kThreads, V>(i, lane);
      if (column < tile_cols) {
        const Vec<T, V> x = tile[i].get();
        store_vec<T, V>(held + first + column, x);
#pragma unroll
        for (int j = 0; j < V; j++) sum[0] += to_float(x.v[j]);
      }
    }
  }
  row_sum<kThreads, kThreads>(sum);
  const float center = p.rms ? 0.0f : sum[0] / cols;

  float sums[2] = {0.0f, 0.0f};
  for (int column = lane * V; column < cols; column += kStep) {
    const Vec<T, V> x = load_vec<T, V>(held + column);
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float difference = to_float(x.v[j]) - center;
      sums[0] += difference;
      sums[1] += difference * difference;
    }
  }
  row_sum<kThreads, kThreads>(sums);
  const Moments moments = corrected_moments(center, sums, static_cast<float>(cols), p.rms);
  const float rstd = reciprocal_deviation(p, moments);
  // Unrolled, one element at a time spills on sm_100.
#pragma unroll 1
  for (int column = lane * V; column < cols; column += kStep) {
    store_normalised(p, row, 0, column, load_vec<T, V>(held + column), moments, rstd);
  }
  if (lane == 0) store_statistics(p, row, moments, rstd);
}

namespace layer_norm {

// Rows begin .. begin + rows of the matrix, cut into chunks of a block's tile; block b has chunk b % chunks of row
// b / chunks.
struct Chunks {
  int64_t begin, chunks;
};

template <int kTileCols>
__device__ __forceinline__ int chunk_cols(int64_t cols, int64_t chunk) {
  const int64_t left = cols - chunk * kTileCols;
  return static_cast<int>(left < kTileCols ? left : kTileCols);
}

}  // namespace layer_norm

// First half of a wide row: each chunk's mean and sum of squares about it, into partial[block]. Forms the sum with the
// residual.
template <class T, int V, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    layer_norm_forward_moments_kernel(const LayerNormForwardParams p, layer_norm::Chunks chunks, float2* partial) {
  using namespace layer_norm;
  constexpr int kItems = kForwardItems<V>, kTileCols = kThreads * kItems * V;
  const int64_t row = chunks.begin + blockIdx.x / chunks.chunks, chunk = blockIdx.x % chunks.chunks;
  const int cols = chunk_cols<kTileCols>(p.cols, chunk);
  Held<T, V> tile[kItems];
  load_summed<kThreads, true>(p, row, chunk * kTileCols, threadIdx.x, cols, tile);
  const Moments moments = tile_moments<kThreads, kThreads>(tile, threadIdx.x, cols, p.rms);
  if (threadIdx.x == 0) partial[blockIdx.x] = make_float2(moments.center + moments.correction, moments.squares);
}

// Second half: combines the row's chunks (the same sums in each block of the row) and normalises one.
template <class T, int V, int kThreads>
__global__ void __launch_bounds__(kThreads)
    layer_norm_forward_apply_kernel(const LayerNormForwardParams p, layer_norm::Chunks chunks, const float2* partial) {
  using namespace layer_norm;
  constexpr int kItems = kForwardItems<V>, kTileCols = kThreads * kItems * V;
  const int64_t row = chunks.begin + blockIdx.x / chunks.chunks, chunk = blockIdx.x % chunks.chunks;
  const int lane = threadIdx.x, cols = chunk_cols<kTileCols>(p.cols, chunk);
  const T* source = p.residual == nullptr ? static_cast<const T*>(p.input) + row * p.input_stride
                                          : static_cast<const T*>(p.summed) + row * p.cols;
  Held<T, V> tile[kItems];
  load_tile<kThreads>(source + chunk * kTileCols, lane, cols, tile);

  const float2* parts = partial + (blockIdx.x - chunk);
  const float center = parts[0].x;
  float sum[1] = {0.0f};
  for (int64_t i = lane; i < chunks.chunks; i += kThreads) {
    sum[0] += (parts[i].x - center) * chunk_cols<kTileCols>(p.cols, i);
  }
  row_sum<kThreads, kThreads>(sum);
  const float correction = sum[0] / static_cast<float>(p.cols);
  float squares[1] = {0.0f};
  for (int64_t i = lane; i < chunks.chunks; i += kThreads) {
    const float difference = (parts[i].x - center) - correction;
    squares[0] += parts[i].y + difference * difference * chunk_cols<kTileCols>(p.cols, i);
  }
  row_sum<kThreads, kThreads>(squares, 1);
  const Moments moments = {center, correction, squares[0]};
  const float rstd = reciprocal_deviation(p, moments);
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kThreads, V>(i, lane);
    if (column < cols) store_normalised(p, row, chunk * kTileCols, column, tile[i].get(), moments, rstd);
  }
  if (lane == 0 && chunk == 0) store_statistics(p, row, moments, rstd);
}

namespace layer_norm {

// Null counts as aligned.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// Rows that one pair of launches over a wide matrix takes, and the chunks of each.
struct WidePlan {
  int64_t chunks, rows;
};

inline WidePlan plan_wide(int64_t rows, int64_t cols, int64_t tile_cols, int64_t row_bytes) {
  return {ceil_div(cols, tile_cols), std::min(rows, std::max<int64_t>(1, kWideBytes / row_bytes))};
}

inline LaunchConfig grid_of(int64_t blocks, int threads, size_t shared_bytes, Stream stream) {
  // A grid of no blocks is refused by the launch, where a wrapped count would leave rows unwritten.
  return {dim3(blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0), dim3(threads), shared_bytes, stream};
}

// layer_norm_cluster.cuh: nothing where the device has no clusters, or none that holds a row.
template <class T, int V>
std::optional<int> launch_forward_cluster(const LayerNormForwardParams& p, Stream stream);

template <class T, int V>
int launch_forward_wide(const LayerNormForwardParams& p, Stream stream, const Allocate& allocate) {
  if (const std::optional<int> done = launch_forward_cluster<T, V>(p, stream)) return *done;
  constexpr int kThreads = 256, kTileCols = kThreads * kForwardItems<V> * V;
  const WidePlan plan = plan_wide(p.rows, p.cols, kTileCols, p.cols * static_cast<int64_t>(sizeof(T)));
  float2* partial = static_cast<float2*>(allocate(plan.rows * plan.chunks * sizeof(float2)));
  for (int64_t begin = 0; begin < p.rows; begin += plan.rows) {
    const Chunks chunks = {begin, plan.chunks};
    const LaunchConfig config = grid_of(std::min(plan.rows, p.rows - begin) * plan.chunks, kThreads, 0, stream);
    if (int error = launch(layer_norm_forward_moments_kernel<T, V, kThreads>, config, p, chunks, partial)) return error;
    if (int error = launch(layer_norm_forward_apply_kernel<T, V, kThreads>, config, p, chunks, partial)) return error;
  }
  return 0;
}

template <class T, int V>
int launch_forward_beyond_registers(const LayerNormForwardParams& p, Stream stream, const Allocate& allocate) {
  constexpr int kThreads = 512;
  const int64_t shared_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  if (2 * shared_bytes > max_shared_bytes() || p.rows < multiprocessor_count()) {
    return launch_forward_wide<T, V>(p, stream, allocate);
  }
  return launch(layer_norm_forward_shared_kernel<T, V, kThreads>, grid_of(p.rows, kThreads, shared_bytes, stream), p);
}

// The first of the lane counts that holds the row in registers.
template <class T, int V, int kLanes, int... kMore>
int launch_forward(const LayerNormForwardParams& p, Stream stream, const Allocate& allocate) {
  if (p.cols <= kLanes * kForwardItems<V> * V) {
    constexpr int kThreads = kLanes < 128 ? 128 : kLanes;
    return launch(layer_norm_forward_kernel<T, V, kLanes, kThreads>,
                  grid_of(ceil_div<int64_t>(p.rows, kThreads / kLanes), kThreads, 0, stream), p);
  }
  if constexpr (sizeof...(kMore) > 0) {
    return launch_forward<T, V, kMore...>(p, stream, allocate);
  } else {
    return launch_forward_beyond_registers<T, V>(p, stream, allocate);
  }
}

}  // namespace layer_norm

template <class T>
int layer_norm_forward(const LayerNormForwardParams& p, Stream stream, const Allocate& allocate) {
  using namespace layer_norm;
  constexpr int kWide = kVecElements<T>;
  const bool vectors = p.cols % kWide == 0 && p.input_stride % kWide == 0 && p.residual_stride % kWide == 0 &&
                       aligned({p.input, p.residual, p.weight, p.bias, p.output, p.summed});
  return vectors ? launch_forward<T, kWide, 4, 16, 32, 128, 256, 512>(p, stream, allocate)
                 : launch_forward<T, 1, 8, 32, 256, 1024>(p, stream, allocate);
}

// ---- Backward ----

namespace layer_norm {

// What a thread holds of a row of the backward pass.
template <class T, int V, int kItems>
struct BackwardTile {
  Held<T, V> x[kItems], grad[kItems];
  float mean, rstd;
};

// The tile of `cols` columns from column `first` of a row; nothing when cols is 0.
template <int kLanes, bool kReadAgain = false, class T, int V, int kItems>
__device__ __forceinline__ void load_backward(const LayerNormBackwardParams& p, int64_t row, int64_t first, int lane,
                                              int cols, BackwardTile<T, V, kItems>& tile) {
  load_tile<kLanes, kReadAgain>(static_cast<const T*>(p.summed) + row * p.summed_stride + first, lane, cols, tile.x);
  load_tile<kLanes, kReadAgain>(static_cast<const T*>(p.grad_output) + row * p.grad_output_stride + first, lane, cols,
                                tile.grad);
  if (cols > 0) {
    tile.mean = p.mean == nullptr ? 0.0f : p.mean[row];
    tile.rstd = p.rstd[row];
  }
}

// This thread's sums over the columns it holds: of g = grad weight, and of g h.
template <int kLanes, class T, int V, int kItems>
__device__ __forceinline__ void sum_tile(const LayerNormBackwardParams& p, int64_t first, int lane, int cols,
                                         const BackwardTile<T, V, kItems>& tile, float (&sums)[2]) {
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column < cols) {
      float weight[V];
      load_parameter<T>(p.weight, p.float_parameters, first + column, 1.0f, weight);
      const Vec<T, V> x = tile.x[i].get(), grad = tile.grad[i].get();
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float g = to_float(grad.v[j]) * weight[j];
        sums[0] += g;
        sums[1] += g * ((to_float(x.v[j]) - tile.mean) * tile.rstd);
      }
    }
  }
}

// Sums over rows of grad h and of grad for each column a thread holds, in its registers.
template <int V, int kItems>
struct RegisterSums {
  float weight[kItems][V] = {}, bias[kItems][V] = {};

  __device__ __forceinline__ void add(int item, const float (&grad_h)[V], const float (&grad)[V]) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      weight[item][j] += grad_h[j];
      bias[item][j] += grad[j];
    }
  }
};

// The same in shared memory: kItems x V floats a thread for each parameter that is wanted, laid out so that a warp's
// 16-byte accesses are consecutive.
template <int V, int kItems, int kThreads>
struct SharedSums {
  using Four = Vec<float, 4>;
  float *weight, *bias;  // null: not wanted

  static constexpr int kFloats = kItems * V * kThreads;

  __device__ __forceinline__ static float* slot(float* sums, int item, int j) {
    return sums + ((item * V + j) / 4 * kThreads + threadIdx.x) * 4;
  }
  __device__ __forceinline__ static void add_to(float* sums, int item, const float (&values)[V]) {
    if (sums == nullptr) return;
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      Four sum = load_vec<float, 4>(slot(sums, item, j));
#pragma unroll
      for (int k = 0; k < 4; k++) sum.v[k] += values[j + k];
      store_vec<float, 4>(slot(sums, item, j), sum);
    }
  }
  __device__ __forceinline__ static void clear(float* sums) {
    if (sums == nullptr) return;
#pragma unroll
    for (int j = 0; j < kItems * V; j += 4) store_vec<float, 4>(slot(sums, 0, j), Four{});
  }
  __device__ __forceinline__ void add(int item, const float (&grad_h)[V], const float (&grad)[V]) {
    add_to(weight, item, grad_h);
    add_to(bias, item, grad);
  }
};

// grad_summed's tile is loaded ahead, with the row, unless the tile is so large that its registers would spill; then
// each item as it is needed.
template <int V, int kItems>
constexpr bool kLoadsAhead = kItems <= kBackwardItems<V>;

template <int kLanes, class T, int V, int kItems>
__device__ __forceinline__ void load_grad_summed(const LayerNormBackwardParams& p, int64_t row, int64_t first, int lane,
                                                 int cols, Held<T, V> (&tile)[kItems]) {
  if (p.grad_summed == nullptr) return;
  load_tile<kLanes>(static_cast<const T*>(p.grad_summed) + row * p.grad_summed_stride + first, lane, cols, tile);
}

// Given the row's means of g and g h: stores the tile's gradients and adds to the parameters' sums.
template <int kLanes, class T, int V, int kItems, class Sums>
__device__ __forceinline__ void store_gradients(const LayerNormBackwardParams& p, int64_t row, int64_t first, int lane,
                                                int cols, const BackwardTile<T, V, kItems>& tile,
                                                const Held<T, V> (&grad_summed)[kItems], uint32_t kept, float mean_g,
                                                float mean_gh, Sums& sums) {
  const int64_t start = row * p.cols + first;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column < cols) {
      float weight[V], grad[V], grad_h[V], result[V];
      load_parameter<T>(p.weight, p.float_parameters, first + column, 1.0f, weight);
      const Vec<T, V> x = tile.x[i].get(), grad_output = tile.grad[i].get();
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float h = (to_float(x.v[j]) - tile.mean) * tile.rstd;
        grad[j] = to_float(grad_output.v[j]);
        grad_h[j] = grad[j] * h;
        result[j] = (grad[j] * weight[j] - mean_g - h * mean_gh) * tile.rstd;
      }
      if (p.grad_summed != nullptr) {
        Vec<T, V> addend;
        if constexpr (kLoadsAhead<V, kItems>) {
          addend = grad_summed[i].get();
        } else {
          addend = load_vec_streaming<T, V>(static_cast<const T*>(p.grad_summed) + row * p.grad_summed_stride + first +
                                            column);
        }
#pragma unroll
        for (int j = 0; j < V; j++) result[j] += to_float(addend.v[j]);
      }
      sums.add(i, grad_h, grad);
      Vec<T, V> out;
      if (p.grad_residual != nullptr) {
#pragma unroll
        for (int j = 0; j < V; j++) out.v[j] = from_float<T>(result[j]);
        store_global<T, V>(static_cast<T*>(p.grad_residual) + start + column, out);
#pragma unroll
        for (int j = 0; j < V; j++) result[j] = kept >> (i * V + j) & 1 ? result[j] * p.dropout_scale : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < V; j++) out.v[j] = from_float<T>(result[j]);
      store_global<T, V>(static_cast<T*>(p.grad_input) + start + column, out);
    }
  }
}

// Adds the register sums of the block's threads that hold the same columns and stores them as one row of partial sums.
template <int kLanes, int kThreads, int V, int kItems>
__device__ __forceinline__ void store_block_sums(float (&sums)[kItems][V], int cols, float* partial) {
  constexpr int kTileCols = kLanes * kItems * V, kWarpLanes = kLanes < 32 ? kLanes : 32;
  constexpr int kParts = kThreads / (kLanes < 32 ? 32 : kLanes);
  constexpr int kStep = V < 4 ? V : 4;
  const int lane = threadIdx.x % kLanes;
  BK_SHARED(float, block_sums, [kParts * kTileCols]);
  float* own = block_sums + threadIdx.x / (kThreads / kParts) * kTileCols;
  __syncthreads();  // an earlier call's readers are done
#pragma unroll
  for (int i = 0; i < kItems; i++) {
#pragma unroll
    for (int j = 0; j < V; j++) {
#pragma unroll
      for (int offset = 16; offset >= kWarpLanes; offset /= 2) {
        sums[i][j] += __shfl_xor_sync(0xffffffffu, sums[i][j], offset);
      }
    }
    if (threadIdx.x % 32 < kWarpLanes) {
#pragma unroll
      for (int j = 0; j < V; j += kStep) {
        Vec<float, kStep> part;
#pragma unroll
        for (int k = 0; k < kStep; k++) part.v[k] = sums[i][j + k];
        store_vec<float, kStep>(own + item_column<kLanes, V>(i, lane) + j, part);
      }
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < cols; column += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; part++) sum += block_sums[part * kTileCols + column];
    partial[column] = sum;
  }
}

// Each thread's register sums to the tile's columns of a row of partial sums, or onto what is there.
template <int kLanes, int V, int kItems>
__device__ __forceinline__ void store_thread_sums(const float (&sums)[kItems][V], int lane, int cols, bool add,
                                                  float* partial) {
  constexpr int kStep = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kLanes, V>(i, lane);
    if (column < cols) {
#pragma unroll
      for (int j = 0; j < V; j += kStep) {
        Vec<float, kStep> part{};
        if (add) part = load_vec<float, kStep>(partial + column + j);
#pragma unroll
        for (int k = 0; k < kStep; k++) part.v[k] += sums[i][j + k];
        store_global<float, kStep>(partial + column + j, part);
      }
    }
  }
}

// Rows a group of threads works on: first, first + step, ... of those below end. `block_first` is the first row of the
// block's first group: loops count by it, so that all groups of a block meet at its barriers.
struct GroupRows {
  int64_t block_first, first, step, end;
};

// The gradients of a group's rows, in the columns first_column .. + tile_cols, and their parameter sums. The next row's
// loads are in flight while one is worked on. row_means(tile, row, cols) gives the row's means of g and g h.
template <class T, int V, int kItems, int kLanes, class Sums, class RowMeans>
__device__ __forceinline__ void backward_rows(const LayerNormBackwardParams& p, const GroupRows& rows,
                                              int64_t first_column, int tile_cols, int lane, Sums& sums,
                                              RowMeans row_means) {
  int64_t row = rows.first;
  BackwardTile<T, V, kItems> next;
  int next_cols = row < rows.end ? tile_cols : 0;
  load_backward<kLanes>(p, row, first_column, lane, next_cols, next);
  for (int64_t count = rows.block_first; count < rows.end; count += rows.step, row += rows.step) {
    const BackwardTile<T, V, kItems> tile = next;
    const int cols = next_cols;
    next_cols = row + rows.step < rows.end ? tile_cols : 0;
    load_backward<kLanes>(p, row + rows.step, first_column, lane, next_cols, next);
    Held<T, V> grad_summed[kItems];
    if constexpr (kLoadsAhead<V, kItems>) load_grad_summed<kLanes>(p, row, first_column, lane, cols, grad_summed);
    const uint32_t kept = kept_elements<kLanes, V, kItems>(p, row * p.cols + first_column, lane, cols);
    const float2 means = row_means(tile, row, cols);
    store_gradients<kLanes>(p, row, first_column, lane, cols, tile, grad_summed, kept, p.rms ? 0.0f : means.x, means.y,
                            sums);
  }
}

// Row means by reducing the tile over its group of threads.
template <int kLanes, int kThreads>
struct ReduceTile {
  const LayerNormBackwardParams& p;
  int lane, buffer = 0;

  template <class Tile>
  __device__ __forceinline__ float2 operator()(const Tile& tile, int64_t, int cols) {
    float sums[2];
    sum_tile<kLanes>(p, 0, lane, cols, tile, sums);
    row_sum<kLanes, kThreads>(sums, buffer);
    buffer ^= 1;
    const float count = static_cast<float>(p.cols);
    return make_float2(sums[0] / count, sums[1] / count);
  }
};

// Row means by adding the sums of the row's chunks, the same additions in each warp.
struct AddChunks {
  const LayerNormBackwardParams& p;
  const float2* partial;
  Chunks chunks;

  template <class Tile>
  __device__ __forceinline__ float2 operator()(const Tile&, int64_t row, int) const {
    float2 sums = make_float2(0.0f, 0.0f);
    for (int64_t i = threadIdx.x % 32; i < chunks.chunks; i += 32) {
      const float2 part = partial[(row - chunks.begin) * chunks.chunks + i];
      sums.x += part.x;
      sums.y += part.y;
    }
    const float count = static_cast<float>(p.cols);
    return make_float2(warp_sum(sums.x) / count, warp_sum(sums.y) / count);
  }
};

// Where the blocks' partial parameter sums go: rows of cols floats; null: not wanted.
struct PartialSums {
  float *weight, *bias;
};

}  // namespace layer_norm

// A persistent grid; kThreads / kLanes rows a block at a time, parameter sums in registers.
template <class T, int V, int kLanes, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    layer_norm_backward_kernel(const LayerNormBackwardParams p, layer_norm::PartialSums partial) {
  using namespace layer_norm;
  constexpr int kItems = kBackwardItems<V>, kRows = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, cols = static_cast<int>(p.cols);
  const int64_t first = int64_t{blockIdx.x} * kRows;
  RegisterSums<V, kItems> sums;
  backward_rows<T, V, kItems, kLanes>(p, {first, first + threadIdx.x / kLanes, int64_t{gridDim.x} * kRows, p.rows}, 0,
                                      cols, lane, sums, ReduceTile<kLanes, kThreads>{p, lane});
  const int64_t start = blockIdx.x * p.cols;
  if (partial.weight != nullptr) store_block_sums<kLanes, kThreads>(sums.weight, cols, partial.weight + start);
  if (partial.bias != nullptr) store_block_sums<kLanes, kThreads>(sums.bias, cols, partial.bias + start);
}

// A persistent grid, a row a block at a time, parameter sums in dynamic shared memory.
template <class T, int V, int kItems, int kThreads>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_shared_kernel(const LayerNormBackwardParams p, layer_norm::PartialSums partial) {
  using namespace layer_norm;
  using Sums = SharedSums<V, kItems, kThreads>;
  const int lane = threadIdx.x, cols = static_cast<int>(p.cols);
  SharedMemory shared;
  Sums sums;
  sums.weight = partial.weight == nullptr ? nullptr : shared.take<float>(Sums::kFloats);
  sums.bias = partial.bias == nullptr ? nullptr : shared.take<float>(Sums::kFloats);
  Sums::clear(sums.weight);
  Sums::clear(sums.bias);
  backward_rows<T, V, kItems, kThreads>(p, {blockIdx.x, blockIdx.x, gridDim.x, p.rows}, 0, cols, lane, sums,
                                        ReduceTile<kThreads, kThreads>{p, lane});
  const int64_t start = blockIdx.x * p.cols;
  for (int i = 0; i < kItems; i++) {
    const int column = item_column<kThreads, V>(i, lane);
    if (column >= cols) break;
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      if (partial.weight != nullptr) {
        store_global<float, 4>(partial.weight + start + column + j, load_vec<float, 4>(Sums::slot(sums.weight, i, j)));
      }
      if (partial.bias != nullptr) {
        store_global<float, 4>(partial.bias + start + column + j, load_vec<float, 4>(Sums::slot(sums.bias, i, j)));
      }
    }
  }
}

// First half of a wide row: each chunk's sums of g and g h, into partial[block].
template <class T, int V, int kThreads>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_sums_kernel(const LayerNormBackwardParams p, layer_norm::Chunks chunks, float2* partial) {
  using namespace layer_norm;
  constexpr int kItems = kBackwardItems<V>, kTileCols = kThreads * kItems * V;
  const int64_t row = chunks.begin + blockIdx.x / chunks.chunks, chunk = blockIdx.x % chunks.chunks;
  const int cols = chunk_cols<kTileCols>(p.cols, chunk);
  BackwardTile<T, V, kItems> tile;
  load_backward<kThreads, true>(p, row, chunk * kTileCols, threadIdx.x, cols, tile);
  float sums[2];
  sum_tile<kThreads>(p, chunk * kTileCols, threadIdx.x, cols, tile, sums);
  row_sum<kThreads, kThreads>(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = make_float2(sums[0], sums[1]);
}

// Second half: block b takes chunk b % chunks of every slices-th row from chunks.begin to end. Its parameter sums go to
// row b / chunks of the partial sums, or onto what an earlier launch left there.
template <class T, int V, int kThreads>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_apply_kernel(const LayerNormBackwardParams p, layer_norm::Chunks chunks, int64_t end,
                                     int64_t slices, const float2* chunk_sums, layer_norm::PartialSums partial) {
  using namespace layer_norm;
  constexpr int kItems = kBackwardItems<V>, kTileCols = kThreads * kItems * V;
  const int64_t slice = blockIdx.x / chunks.chunks, chunk = blockIdx.x % chunks.chunks;
  const int lane = threadIdx.x, cols = chunk_cols<kTileCols>(p.cols, chunk);
  const int64_t first = chunks.begin + slice;
  RegisterSums<V, kItems> sums;
  backward_rows<T, V, kItems, kThreads>(p, {first, first, slices, end}, chunk * kTileCols, cols, lane, sums,
                                        AddChunks{p, chunk_sums, chunks});
  const int64_t start = slice * p.cols + chunk * kTileCols;
  const bool add = chunks.begin > 0;
  if (partial.weight != nullptr) store_thread_sums<kThreads>(sums.weight, lane, cols, add, partial.weight + start);
  if (partial.bias != nullptr) store_thread_sums<kThreads>(sums.bias, lane, cols, add, partial.bias + start);
}

// Adds the `parts` rows of partial sums into the gradients. blockIdx.y is the parameter; a block takes 32 columns, each
// of its 8 warps every eighth part.
template <class T>
__global__ void __launch_bounds__(256)
    layer_norm_parameter_gradients_kernel(layer_norm::PartialSums partial, int64_t parts, int64_t cols,
                                          void* grad_weight, void* grad_bias, bool float_parameters) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const bool is_weight = blockIdx.y == 0 && grad_weight != nullptr;
  const float* sums = is_weight ? partial.weight : partial.bias;
  void* grad = is_weight ? grad_weight : grad_bias;
  float sum = 0.0f;
  if (column < cols) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += 8) sum += sums[part * cols + column];
  }
  BK_SHARED(float, warp_sums, [8][32]);
  warp_sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < cols) {
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += warp_sums[i][lane];
    if (float_parameters) {
      static_cast<float*>(grad)[column] = sum;
    } else {
      static_cast<T*>(grad)[column] = from_float<T>(sum);
    }
  }
}

namespace layer_norm {

// Float rows for the partial sums of the parameters that are wanted.
inline PartialSums allocate_partial_sums(const LayerNormBackwardParams& p, int64_t parts, const Allocate& allocate) {
  const bool weight = p.grad_weight != nullptr, bias = p.grad_bias != nullptr;
  if (!weight && !bias) return {nullptr, nullptr};
  float* sums = static_cast<float*>(allocate((weight + bias) * parts * p.cols * sizeof(float)));
  return {weight ? sums : nullptr, bias ? sums + weight * parts * p.cols : nullptr};
}

template <class T>
int launch_parameter_gradients(const LayerNormBackwardParams& p, const PartialSums& partial, int64_t parts,
                               Stream stream) {
  const unsigned wanted = (p.grad_weight != nullptr) + (p.grad_bias != nullptr);
  if (wanted == 0) return 0;
  LaunchConfig config = grid_of(ceil_div<int64_t>(p.cols, 32), 256, 0, stream);
  config.grid.y = wanted;
  return launch(layer_norm_parameter_gradients_kernel<T>, config, partial, parts, p.cols, p.grad_weight, p.grad_bias,
                p.float_parameters);
}

// Blocks that fill the GPU once, each with the same number of turns: no more partial sums than that takes.
inline int64_t persistent_blocks(int64_t turns, int64_t resident) {
  return ceil_div(turns, ceil_div(turns, std::max<int64_t>(1, resident)));
}

template <class T>
int launch_backward_persistent(void (*kernel)(LayerNormBackwardParams, PartialSums), int rows_a_block, int threads,
                               size_t shared_bytes, const LayerNormBackwardParams& p, Stream stream,
                               const Allocate& allocate) {
  const int64_t resident = int64_t{multiprocessor_count()} * occupancy(kernel, threads, shared_bytes);
  const int64_t blocks = persistent_blocks(ceil_div<int64_t>(p.rows, rows_a_block), resident);
  const PartialSums partial = allocate_partial_sums(p, blocks, allocate);
  if (int error = launch(kernel, grid_of(blocks, threads, shared_bytes, stream), p, partial)) return error;
  return launch_parameter_gradients<T>(p, partial, blocks, stream);
}

template <class T, int V>
std::optional<int> launch_backward_cluster(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate);

template <class T, int V>
int launch_backward_wide(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate) {
  if (const std::optional<int> done = launch_backward_cluster<T, V>(p, stream, allocate)) return *done;
  constexpr int kThreads = 256, kTileCols = kThreads * kBackwardItems<V> * V;
  const auto apply = layer_norm_backward_apply_kernel<T, V, kThreads>;
  const WidePlan plan = plan_wide(p.rows, p.cols, kTileCols, 2 * p.cols * static_cast<int64_t>(sizeof(T)));
  const int64_t resident = int64_t{multiprocessor_count()} * occupancy(apply, kThreads, 0);
  const int64_t slices = std::min(plan.rows, std::max<int64_t>(1, resident / plan.chunks));
  float2* chunk_sums = static_cast<float2*>(allocate(plan.rows * plan.chunks * sizeof(float2)));
  const PartialSums partial = allocate_partial_sums(p, slices, allocate);
  for (int64_t begin = 0; begin < p.rows; begin += plan.rows) {
    const Chunks chunks = {begin, plan.chunks};
    const int64_t end = std::min(begin + plan.rows, p.rows);
    if (int error = launch(layer_norm_backward_sums_kernel<T, V, kThreads>,
                           grid_of((end - begin) * plan.chunks, kThreads, 0, stream), p, chunks, chunk_sums)) {
      return error;
    }
    if (int error = launch(apply, grid_of(slices * plan.chunks, kThreads, 0, stream), p, chunks, end, slices,
                           chunk_sums, partial)) {
      return error;
    }
  }
  return launch_parameter_gradients<T>(p, partial, slices, stream);
}

template <class T, int V>
int launch_backward_beyond_registers(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate) {
  if constexpr (V > 1) {
    constexpr int kItems = 4, kThreads = 512;
    constexpr int64_t kSumBytes = SharedSums<V, kItems, kThreads>::kFloats * sizeof(float);
    const int64_t shared_bytes = ((p.grad_weight != nullptr) + (p.grad_bias != nullptr)) * kSumBytes;
    if (p.cols <= kThreads * kItems * V && shared_bytes <= max_shared_bytes() && p.rows >= multiprocessor_count()) {
      return launch_backward_persistent<T>(layer_norm_backward_shared_kernel<T, V, kItems, kThreads>, 1, kThreads,
                                           shared_bytes, p, stream, allocate);
    }
  }
  return launch_backward_wide<T, V>(p, stream, allocate);
}

// The first of the lane counts that holds the row in registers.
template <class T, int V, int kLanes, int... kMore>
int launch_backward(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate) {
  if (p.cols <= kLanes * kBackwardItems<V> * V) {
    constexpr int kThreads = kLanes <= 32 ? 256 : 512;
    return launch_backward_persistent<T>(layer_norm_backward_kernel<T, V, kLanes, kThreads>, kThreads / kLanes,
                                         kThreads, 0, p, stream, allocate);
  }
  if constexpr (sizeof...(kMore) > 0) {
    return launch_backward<T, V, kMore...>(p, stream, allocate);
  } else {
    return launch_backward_beyond_registers<T, V>(p, stream, allocate);
  }
}

}  // namespace layer_norm

template <class T>
int layer_norm_backward(const LayerNormBackwardParams& p, Stream stream, const Allocate& allocate) {
  using namespace layer_norm;
  constexpr int kWide = kVecElements<T>;
  const bool vectors = p.cols % kWide == 0 && p.grad_output_stride % kWide == 0 && p.grad_summed_stride % kWide == 0 &&
                       p.summed_stride % kWide == 0 &&
                       aligned({p.grad_output, p.grad_summed, p.summed, p.weight, p.grad_input, p.grad_residual});
  return vectors ? launch_backward<T, kWide, 4, 16, 32, 128, 256, 512>(p, stream, allocate)
                 : launch_backward<T, 1, 8, 32, 512>(p, stream, allocate);
}

}  // namespace bigkern

#include "kernels/layer_norm_cluster.cuh"
