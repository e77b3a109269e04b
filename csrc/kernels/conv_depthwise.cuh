// Depthwise convolution: one filter a channel. Bound by memory (2 R S FLOP for 2 elements moved), so it has no tiles: a
// thread has V neighbouring channels of a strip of the output and holds its sums and the rows under it in registers.
//
//   forward and input gradient (axes as in conv_gemm.cuh): strips of kRows x 4 places. An input row is loaded once for
//     the kRows rows of the strip and their taps; what strips share comes from the caches. With 3 x 3 taps a place
//     costs 4.5 loads in strips of one row, 3 in strips of two.
//   weight gradient: a thread adds up 3 x 3 taps over its places, a block its threads, conv_sum_parts_kernel the parts,
//     each in a fixed order.
//
// Floor: input read once and output written once (forward, input gradient); both read once (weight gradient).
#pragma once

#include "kernels/conv_epilogue.cuh"
#include "kernels/conv_layout.cuh"
#include "kernels/conv_weight.cuh"

namespace bigkern {
namespace conv {

constexpr int kStrip = 4, kDepthwiseThreads = 256;

template <class T>
struct DepthwiseParams {
  const T* operand;  // images x height.operand x width.operand x channels; strides in elements
  int64_t operand_image, operand_row, operand_pixel;
  const T* weight;  // taps x channels
  AxisShape height, width;
  bool transposed;
  int64_t images;
  int channels;
  const T* bias;      // or null
  const T* residual;  // as output, aligned as the launcher's V, or null
  ConvActivation activation;
  T* output;         // images x height.result x width.result x channels
  T* preactivation;  // or null
  int strips_h, strips_w;
};

// V elements as they lie in memory: as values of 16 bits that live through a loop they would take a register each.
template <class T, int V>
struct Packed {
  using Word = typename bigkern::detail::Word<sizeof(T) * V>::type;
  Word word{};

  __device__ __forceinline__ void load(const T* p) { word = *reinterpret_cast<const Word*>(p); }
  __device__ __forceinline__ float operator[](int j) const { return to_float(reinterpret_cast<const T*>(&word)[j]); }
};

}  // namespace conv

// kTaps: 3 for at most 3 taps a row, one pixel apart, whose columns are loaded once a strip; 0 for any. kStride: along
// the width, with kTaps. kRows > 1 wants neighbouring taps and rows one pixel apart too.
template <class T, int V, int kTaps, int kStride, int kRows>
__global__ void __launch_bounds__(conv::kDepthwiseThreads, 2) conv_depthwise_kernel(const conv::DepthwiseParams<T> p) {
  using namespace conv;
  const int vectors = p.channels / V;
  const int64_t index = int64_t{blockIdx.x} * kDepthwiseThreads + threadIdx.x;
  int64_t rest = index / vectors;
  const int channel = static_cast<int>(index - rest * vectors) * V;
  const int strip_w = static_cast<int>(rest % p.strips_w) * kStrip;
  rest /= p.strips_w;
  const int strip_h = static_cast<int>(rest % p.strips_h) * kRows;
  rest /= p.strips_h;
  const int64_t image = rest % p.images;
  const int parity = static_cast<int>(rest / p.images);
  const int classes = p.transposed ? p.height.stride * p.width.stride : 1;
  if (parity >= classes) return;
  const Axis height = p.transposed ? transposed_axis(p.height, parity / p.width.stride) : forward_axis(p.height);
  const Axis width = p.transposed ? transposed_axis(p.width, parity % p.width.stride) : forward_axis(p.width);
  if (strip_h >= height.places || strip_w >= width.places) return;

  const T* const operand = p.operand + image * p.operand_image + channel;
  const int h0 = strip_h * height.stride + height.origin, w0 = strip_w * width.stride + width.origin;
  auto load = [&](int h, int w) {
    Packed<T, V> values;
    if (within(h, p.height.operand) && within(w, p.width.operand)) {
      values.load(operand + h * p.operand_row + w * p.operand_pixel);
    }
    return values;
  };
  float sums[kRows][kStrip][V] = {};
  auto add = [&](int row, int i, const Packed<T, V>& weight, const Packed<T, V>& values) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      sums[row][i][j] = fmaf(weight[j], values[j], sums[row][i][j]);
    }
  };
  auto weight_at = [&](int r, int s) {
    const int tap_h = height.first_tap + r * height.tap_step, tap_w = width.first_tap + s * width.tap_step;
    Packed<T, V> weight;
    weight.load(p.weight + (int64_t{tap_h} * p.width.taps + tap_w) * p.channels + channel);
    return weight;
  };
  // Row y of the operand meets row `row` of the strip at tap y - row * stride.
  const int lines = (kRows - 1) * height.stride + height.taps;
#pragma unroll 1
  for (int y = 0; y < lines; y++) {
    const int h = h0 + y * height.step;
    if constexpr (kTaps > 0) {
      constexpr int kColumns = (kStrip - 1) * kStride + kTaps;
      Packed<T, V> columns[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; i++) columns[i] = load(h, w0 + i);
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        const int r = y - row * height.stride;
        if (!within(r, height.taps)) continue;
#pragma unroll
        for (int s = 0; s < kTaps; s++) {
          if (s >= width.taps) break;
          const Packed<T, V> weight = weight_at(r, s);
#pragma unroll
          for (int i = 0; i < kStrip; i++) add(row, i, weight, columns[i * kStride + s]);
        }
      }
    } else {
      for (int s = 0; s < width.taps; s++) {
        const Packed<T, V> weight = weight_at(y, s);
#pragma unroll
        for (int i = 0; i < kStrip; i++) add(0, i, weight, load(h, w0 + i * width.stride + s * width.step));
      }
    }
  }

  float shift[V];
#pragma unroll
  for (int j = 0; j < V; j++) shift[j] = p.bias != nullptr ? to_float(p.bias[channel + j]) : 0.0f;
#pragma unroll
  for (int row = 0; row < kRows; row++) {
#pragma unroll
    for (int i = 0; i < kStrip; i++) {
      if (strip_h + row >= height.places || strip_w + i >= width.places) continue;
      const int64_t h = height.first_place + (strip_h + row) * height.place_step;
      const int64_t w = width.first_place + (strip_w + i) * width.place_step;
      const int64_t offset = ((image * p.height.result + h) * p.width.result + w) * p.channels + channel;
      float values[V];
#pragma unroll
      for (int j = 0; j < V; j++) values[j] = sums[row][i][j] + shift[j];
      if (p.residual != nullptr) add_some(p.residual + offset, V, true, values);
      Vec<T, V> rounded;
      if (p.preactivation != nullptr) {
#pragma unroll
        for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(values[j]);
        store_some(p.preactivation + offset, rounded, V, true);
      }
#pragma unroll
      for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(activate(values[j], p.activation));
      store_some(p.output + offset, rounded, V, true);
    }
  }
}

namespace conv {

// A block of the weight gradient: 3 x 3 taps of up to 32 vectors of channels.
constexpr int kTapTile = 3;

}  // namespace conv

// V: 4 channels at once keep 9 sums of each in registers. `columns`, a power of two up to 32, threads have different
// channels, the others different places.
template <class T, int V>
__global__ void __launch_bounds__(conv::kDepthwiseThreads, 2)
    conv_depthwise_weight_kernel(const conv::WeightParams p, int columns, int channel_blocks) {
  using namespace conv;
  BK_SHARED(float, shared_sums, [V][kDepthwiseThreads]);
  const int channels = p.groups, tiles_w = ceil_div(p.kernel_w, kTapTile), tiles_h = ceil_div(p.kernel_h, kTapTile);
  int64_t rest = blockIdx.x;
  const int tap_tile = static_cast<int>(rest % (tiles_h * tiles_w));
  rest /= tiles_h * tiles_w;
  const int first_channel = static_cast<int>(rest % channel_blocks) * columns * V;
  const int64_t part = rest / channel_blocks;
  const int first_h = tap_tile / tiles_w * kTapTile, first_w = tap_tile % tiles_w * kTapTile;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns, rows = kDepthwiseThreads / columns;
  const int channel = first_channel + column * V;

  const int64_t begin = part * p.part_places;
  const int64_t end = begin + p.part_places < p.places ? begin + p.part_places : p.places;
  PlaceWalk walk(p, begin + row, end, rows);
  float sums[kTapTile][kTapTile][V] = {}, bias_sums[V] = {};
  if (channel < channels) {
    const T* const grad = static_cast<const T*>(p.grad) + channel;
    const T* const input = static_cast<const T*>(p.input) + channel;
    for (PlaceStart at = walk.next(p); at.valid; at = walk.next(p)) {
      float slope[V];
      load_floats<T, V>(grad + at.grad, slope);
#pragma unroll
      for (int j = 0; j < V; j++) bias_sums[j] += slope[j];
#pragma unroll
      for (int r = 0; r < kTapTile; r++) {
        const int tap_h = (first_h + r) * p.dilation_h;
        if (first_h + r >= p.kernel_h || !within(at.h + tap_h, p.height)) continue;
#pragma unroll
        for (int s = 0; s < kTapTile; s++) {
          const int tap_w = (first_w + s) * p.dilation_w;
          if (first_w + s >= p.kernel_w || !within(at.w + tap_w, p.width)) continue;
          float values[V];
          load_floats<T, V>(input + at.input + tap_h * p.input_row + tap_w * p.input_pixel, values);
#pragma unroll
          for (int j = 0; j < V; j++) sums[r][s][j] = fmaf(slope[j], values[j], sums[r][s][j]);
        }
      }
    }
  }

  // Adds the rows of threads up, in their order, and stores the columns' V sums.
  const bool stores = row == 0 && channel < channels;
  auto reduce = [&](const float (&values)[V], float* out, int64_t pitch, bool wanted) {
    __syncthreads();  // the sums before these have been read
#pragma unroll
    for (int j = 0; j < V; j++) shared_sums[j][threadIdx.x] = values[j];
    __syncthreads();
    if (!stores || !wanted) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
      float sum = 0.0f;
      for (int i = 0; i < rows; i++) sum += shared_sums[j][i * columns + column];
      out[(channel + j) * pitch] = sum;
    }
  };
  const int taps = p.kernel_h * p.kernel_w;
#pragma unroll
  for (int r = 0; r < kTapTile; r++) {
#pragma unroll
    for (int s = 0; s < kTapTile; s++) {
      const bool wanted = first_h + r < p.kernel_h && first_w + s < p.kernel_w;
      float* const out = p.sums + part * channels * taps + (first_h + r) * p.kernel_w + first_w + s;
      reduce(sums[r][s], out, taps, wanted);
    }
  }
  if (p.bias_sums != nullptr && tap_tile == 0) reduce(bias_sums, p.bias_sums + part * channels, 1, true);
}

namespace conv {

template <class T, int V, int kTaps, int kStride, int kRows>
int launch_depthwise_strips(DepthwiseParams<T> p, Stream stream) {
  const int step_h = p.transposed ? p.height.stride : 1, step_w = p.transposed ? p.width.stride : 1;
  p.strips_h = ceil_div(ceil_div(p.height.result, step_h), kRows);
  p.strips_w = ceil_div(ceil_div(p.width.result, step_w), kStrip);
  const int64_t threads = int64_t{step_h} * step_w * p.images * p.strips_h * p.strips_w * (p.channels / V);
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(threads, kDepthwiseThreads))),
                            dim3(kDepthwiseThreads), 0, stream};
  return launch(conv_depthwise_kernel<T, V, kTaps, kStride, kRows>, config, p);
}

template <class T>
int launch_depthwise(const DepthwiseParams<T>& p, Stream stream) {
  constexpr int V = kVecElements<T>;
  const ConvTensor operand = {p.operand, p.operand_image, 1, p.operand_row, p.operand_pixel};
  const ConvTensor residual = {p.residual, 0, 1, 0, 0};
  if (p.channels % V != 0 || !whole_vectors(operand, V, sizeof(T)) || !whole_vectors(residual, V, sizeof(T))) {
    return launch_depthwise_strips<T, 1, 0, 1, 1>(p, stream);
  }
  const int stride_w = p.transposed ? 1 : p.width.stride;
  const bool near = p.width.taps <= 3 && p.width.dilation == 1 && p.height.dilation == 1;
  const bool rows = (p.transposed ? 1 : p.height.stride) == 1;
  // Two rows of 8 channels would take more than 128 registers.
  if (near && stride_w == 1 && rows) return launch_depthwise_strips<T, V, 3, 1, V == 4 ? 2 : 1>(p, stream);
  if (near && stride_w == 2) return launch_depthwise_strips<T, V, 3, 2, 1>(p, stream);
  return launch_depthwise_strips<T, V, 0, 1, 1>(p, stream);
}

// Threads of a block that have different channels, and how many blocks the channels take.
struct DepthwiseWeightGrid {
  int vector, columns, channel_blocks;
  int64_t blocks;  // of one part
};

template <class T>
DepthwiseWeightGrid plan_depthwise_weight(const WeightParams& p) {
  const bool vectors = p.groups % 4 == 0 &&
                       whole_vectors({p.grad, p.grad_image, 1, p.grad_row, p.grad_pixel}, 4, sizeof(T)) &&
                       whole_vectors({p.input, p.input_image, 1, p.input_row, p.input_pixel}, 4, sizeof(T));
  DepthwiseWeightGrid grid{vectors ? 4 : 1, 1};
  while (grid.columns < 32 && grid.columns * grid.vector < p.groups) grid.columns *= 2;
  grid.channel_blocks = ceil_div(p.groups, grid.columns * grid.vector);
  grid.blocks = int64_t{ceil_div(p.kernel_h, kTapTile)} * ceil_div(p.kernel_w, kTapTile) * grid.channel_blocks;
  return grid;
}

template <class T>
int launch_depthwise_weight(const WeightParams& p, const DepthwiseWeightGrid& grid, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(p.parts * grid.blocks)), dim3(kDepthwiseThreads), 0, stream};
  return grid.vector == 4 ? launch(conv_depthwise_weight_kernel<T, 4>, config, p, grid.columns, grid.channel_blocks)
                          : launch(conv_depthwise_weight_kernel<T, 1>, config, p, grid.columns, grid.channel_blocks);
}

}  // namespace conv
}  // namespace bigkern
