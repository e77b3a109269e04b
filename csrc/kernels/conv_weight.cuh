// The weight's gradient: out[filter, (r, s, c)] = sum over places of grad[place, filter] input[place moved by (r, s),
// c]. Both operands are read as they lie, with the reduced axis in rows ("mn-major"); ldmatrix transposes.
//
//   block: kM filters x kN columns of (r, s, c), over one part of the places; shared: stages of
//          [grad: kK rows of kM][input: kK rows of kN], and where the next rows lie in memory
//
// The places are cut into parts until the GPU is full. Every part writes fp32 sums into a workspace, and a second
// kernel adds the parts in their order: equal inputs give equal bits. The bias' gradient is the sum of the grad
// operand's rows, taken from shared memory by the blocks of the first column tile.
//
// Floor: 2 N P Q K C R S FLOP; grad and input read once, weights written once, plus 8 bytes a weight and part.
#pragma once

#include "kernels/conv_gemm.cuh"

#include <algorithm>

namespace bigkern {
namespace conv {

struct WeightParams {
  const void* grad;  // images x out_h x out_w x filters, channels contiguous; strides in elements
  int64_t grad_image, grad_row, grad_pixel;
  const void* input;  // images x height x width x channels; chunks want contiguous channels
  int64_t input_image, input_row, input_pixel, input_channel;
  int64_t places;  // images * out_h * out_w
  int out_h, out_w, height, width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int kernel_h, kernel_w;
  int groups, channels, filters;  // of a group
  int tiles_m, tiles_n;
  int64_t parts, part_places;
  float* sums;       // parts x groups x filters x (r, s, c)
  float* bias_sums;  // parts x groups x filters, or null
};

// Where a place's rows of the operands lie, and the input's coordinates under tap (0, 0).
struct PlaceStart {
  int64_t grad, input;
  int h, w;
  bool valid;
};

// A thread's place, moved by a step without division.
class PlaceWalk {
 public:
  __device__ __forceinline__ PlaceWalk(const WeightParams& p, int64_t place, int64_t end, int step)
      : place_(place), end_(end), step_(step) {
    const int64_t line = place / p.out_w;
    w_ = static_cast<int>(place - line * p.out_w);
    image_ = line / p.out_h;
    h_ = static_cast<int>(line - image_ * p.out_h);
    step_w_ = step % p.out_w;
    step_h_ = step / p.out_w % p.out_h;
    step_image_ = step / p.out_w / p.out_h;
  }

  __device__ __forceinline__ PlaceStart next(const WeightParams& p) {
    const int h = h_ * p.stride_h - p.padding_h, w = w_ * p.stride_w - p.padding_w;
    const PlaceStart start = {image_ * p.grad_image + h_ * p.grad_row + w_ * p.grad_pixel,
                              image_ * p.input_image + h * p.input_row + w * p.input_pixel, h, w, place_ < end_};
    place_ += step_;
    w_ += step_w_;
    h_ += step_h_;
    image_ += step_image_;
    if (w_ >= p.out_w) {
      w_ -= p.out_w;
      h_++;
    }
    if (h_ >= p.out_h) {
      h_ -= p.out_h;
      image_++;
    }
    return start;
  }

 private:
  int64_t place_, end_, image_;
  int w_, h_, step_, step_w_, step_h_, step_image_;
};

struct WeightTile {
  int m, n, group;
  int64_t part;

  __device__ __forceinline__ explicit WeightTile(const WeightParams& p) {
    int64_t rest = blockIdx.x;
    m = static_cast<int>(rest % p.tiles_m);
    rest /= p.tiles_m;
    n = static_cast<int>(rest % p.tiles_n);
    rest /= p.tiles_n;
    group = static_cast<int>(rest % p.groups);
    part = rest / p.groups;
  }
};

// The filters and the column of (r, s, c) that a thread loads, V neighbours at once, of every row.
template <class T, class Shape, int V>
struct WeightColumns {
  static constexpr int kColsA = Shape::kM / V, kColsB = Shape::kN / V;
  static constexpr int kRowsAtOnceA = Shape::kThreads / kColsA, kRowsAtOnceB = Shape::kThreads / kColsB;
  static constexpr int kRowsA = Shape::kK / kRowsAtOnceA, kRowsB = Shape::kK / kRowsAtOnceB;
  static_assert(Shape::kK % kRowsAtOnceA == 0 && Shape::kK % kRowsAtOnceB == 0, "whole rounds");

  static __device__ __forceinline__ int col_a() { return threadIdx.x % kColsA * V; }
  static __device__ __forceinline__ int col_b() { return threadIdx.x % kColsB * V; }
  static __device__ __forceinline__ int row_a(int i) { return threadIdx.x / kColsA + i * kRowsAtOnceA; }
  static __device__ __forceinline__ int row_b(int i) { return threadIdx.x / kColsB + i * kRowsAtOnceB; }

  __device__ __forceinline__ WeightColumns(const WeightParams& p, const WeightTile& tile) {
    const int filter = tile.m * Shape::kM + col_a();
    inside_a = filter < p.filters;
    grad = static_cast<const T*>(p.grad) + int64_t{tile.group} * p.filters + (inside_a ? filter : 0);
    const int column = tile.n * Shape::kN + col_b(), tap = column / p.channels;
    inside_b = tap < p.kernel_h * p.kernel_w;
    tap_h = inside_b ? tap / p.kernel_w * p.dilation_h : 0;
    tap_w = inside_b ? tap % p.kernel_w * p.dilation_w : 0;
    input = static_cast<const T*>(p.input) + int64_t{tile.group} * p.channels * p.input_channel;
    if (inside_b) input += tap_h * p.input_row + tap_w * p.input_pixel + column % p.channels * p.input_channel;
  }

  __device__ __forceinline__ bool covers(const WeightParams& p, const PlaceStart& start) const {
    return inside_b && start.valid && within(start.h + tap_h, p.height) && within(start.w + tap_w, p.width);
  }

  const T* grad;
  const T* input;
  bool inside_a, inside_b;
  int tap_h, tap_w;
};

// Loaders as in conv_gemm.cuh: chunks by cp.async, single elements through registers.
template <class T, class Shape>
class WeightChunkLoader {
 public:
  static constexpr int kStages = 4, kBlocks = 2;

  __device__ __forceinline__ WeightChunkLoader(const WeightParams& p, const WeightTile& tile)
      : p_(p), columns_(p, tile) {}

  __device__ __forceinline__ void start(T* stage, const PlaceStart* starts) {
#pragma unroll
    for (int i = 0; i < Columns::kRowsA; i++) {
      const int row = Columns::row_a(i);
      const PlaceStart at = starts[row];
      const bool valid = columns_.inside_a && at.valid;
      cp_async16(mn_major<Shape::kM>(stage, row, Columns::col_a() / V),
                 valid ? columns_.grad + at.grad : static_cast<const T*>(p_.grad), valid);
    }
#pragma unroll
    for (int i = 0; i < Columns::kRowsB; i++) {
      const int row = Columns::row_b(i);
      const PlaceStart at = starts[row];
      const bool valid = columns_.covers(p_, at);
      cp_async16(mn_major<Shape::kN>(stage + Shape::kM * Shape::kK, row, Columns::col_b() / V),
                 valid ? columns_.input + at.input : static_cast<const T*>(p_.input), valid);
    }
  }

  __device__ __forceinline__ void finish(T*) {}

 private:
  static constexpr int V = Shape::kVector;
  using Columns = WeightColumns<T, Shape, V>;
  const WeightParams& p_;
  Columns columns_;
};

template <class T, class Shape>
class WeightElementLoader {
 public:
  // One block a multiprocessor, as with fused multiply-adds: with 24 elements on their way to shared memory, 128
  // registers a thread would spill.
  static constexpr int kStages = 2, kBlocks = 1;

  __device__ __forceinline__ WeightElementLoader(const WeightParams& p, const WeightTile& tile)
      : p_(p), columns_(p, tile) {}

  __device__ __forceinline__ void start(T*, const PlaceStart* starts) {
#pragma unroll
    for (int i = 0; i < Columns::kRowsA; i++) {
      const PlaceStart at = starts[Columns::row_a(i)];
      a_[i] = columns_.inside_a && at.valid ? columns_.grad[at.grad] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < Columns::kRowsB; i++) {
      const PlaceStart at = starts[Columns::row_b(i)];
      b_[i] = columns_.covers(p_, at) ? columns_.input[at.input] : from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ void finish(T* stage) {
    constexpr int V = Shape::kVector;
    const int a = Columns::col_a(), b = Columns::col_b();
#pragma unroll
    for (int i = 0; i < Columns::kRowsA; i++) mn_major<Shape::kM>(stage, Columns::row_a(i), a / V)[a % V] = a_[i];
    T* const input = stage + Shape::kM * Shape::kK;
#pragma unroll
    for (int i = 0; i < Columns::kRowsB; i++) mn_major<Shape::kN>(input, Columns::row_b(i), b / V)[b % V] = b_[i];
  }

 private:
  using Columns = WeightColumns<T, Shape, 1>;
  const WeightParams& p_;
  Columns columns_;
  T a_[Columns::kRowsA], b_[Columns::kRowsB];
};

template <class T, class Shape, template <class, class> class Loader>
__host__ __device__ constexpr size_t weight_shared_bytes() {
  return Loader<T, Shape>::kStages * (Shape::kM + Shape::kN) * Shape::kK * sizeof(T);
}

// Accumulators into a part's sums.
struct PutSums {
  float* sums;
  int filters, cols;  // that are left from here on
  int pitch;

  __device__ __forceinline__ void operator()(int row, int col, float value) const {
    if (row < filters && col < cols) sums[int64_t{row} * pitch + col] = value;
  }
  __device__ __forceinline__ void operator()(int row, int col, float first, float second) const {
    (*this)(row, col, first);
    (*this)(row, col + 1, second);
  }
};

}  // namespace conv

template <class T, class Shape, class Product, template <class, class> class Loader>
__global__ void __launch_bounds__(Shape::kThreads,
                                  std::is_same_v<Product, conv::FusedMultiplyAdd> ? 1 : Loader<T, Shape>::kBlocks)
    conv_backward_weight_kernel(const conv::WeightParams p) {
  using namespace conv;
  constexpr int kStages = Loader<T, Shape>::kStages, kStageElements = (Shape::kM + Shape::kN) * Shape::kK;
  constexpr int kQuarters = Shape::kThreads / Shape::kM;
  SharedMemory shared;
  T* const stages = shared.take<T>(kStages * kStageElements, 128);
  BK_SHARED(PlaceStart, starts, [kStages][Shape::kK]);
  BK_SHARED(float, bias_parts, [kQuarters][Shape::kM]);

  const WeightTile tile(p);
  const int64_t begin = tile.part * p.part_places;
  const int64_t end = begin + p.part_places < p.places ? begin + p.part_places : p.places;
  const int steps = static_cast<int>(ceil_div<int64_t>(end - begin, Shape::kK));
  PlaceWalk walk(p, begin + threadIdx.x, end, Shape::kK);
  const bool locates = threadIdx.x < Shape::kK;
#pragma unroll
  for (int i = 0; i < kStages; i++) {
    if (locates) starts[i][threadIdx.x] = walk.next(p);
  }
  __syncthreads();

  Accumulators<T, Shape, Product> sums;
  Loader<T, Shape> loader(p, tile);
  const bool sums_bias = p.bias_sums != nullptr && tile.n == 0;
  const int bias_row = threadIdx.x % Shape::kM, quarter = threadIdx.x / Shape::kM;
  float bias_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) {
    if (i < steps) {
      loader.start(stages + i * kStageElements, starts[i]);
      loader.finish(stages + i * kStageElements);
    }
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all have left the one before
    const bool more = step + kStages - 1 < steps;
    const int next = (step + kStages - 1) % kStages;
    T* const ahead = stages + next * kStageElements;
    if (more) loader.start(ahead, starts[next]);
    cp_async_commit();
    // The places of step + kStages take those of this step, which were read before the barrier.
    if (locates) starts[step % kStages][threadIdx.x] = walk.next(p);
    const T* const stage = stages + step % kStages * kStageElements;
    sums.add_mn_major(stage, stage + Shape::kM * Shape::kK);
    if (sums_bias) {
      constexpr int V = Shape::kVector;
#pragma unroll
      for (int k = 0; k < Shape::kK / kQuarters; k++) {
        const int row = quarter * (Shape::kK / kQuarters) + k;
        bias_sum += to_float(mn_major<Shape::kM>(stage, row, bias_row / V)[bias_row % V]);
      }
    }
    if (more) loader.finish(ahead);
  }
  cp_async_wait<0>();

  const int cols = p.kernel_h * p.kernel_w * p.channels;
  const int64_t first = (tile.part * p.groups + tile.group) * p.filters + tile.m * Shape::kM;
  const int filters = p.filters - tile.m * Shape::kM;
  sums.each(PutSums{p.sums + first * cols + tile.n * Shape::kN, filters, cols - tile.n * Shape::kN, cols});
  if (sums_bias) {  // the same for the whole block
    bias_parts[quarter][bias_row] = bias_sum;
    __syncthreads();
    if (quarter == 0 && bias_row < filters) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kQuarters; i++) sum += bias_parts[i][bias_row];
      p.bias_sums[first + bias_row] = sum;
    }
  }
}

namespace conv {

constexpr int kSumThreads = 256;

// out[filter, tap, channel] = the sum of parts x filters x taps x channels over the parts, stored with those strides.
template <class T>
struct SumParams {
  const float* sums;
  int64_t parts, elements;
  int taps, channels;
  T* out;
  int64_t out_filter, out_tap, out_channel;
};

}  // namespace conv

template <class T>
__global__ void __launch_bounds__(conv::kSumThreads) conv_sum_parts_kernel(const conv::SumParams<T> p) {
  const int64_t element = int64_t{blockIdx.x} * conv::kSumThreads + threadIdx.x;
  if (element >= p.elements) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t part = 0; part < p.parts; part++) sum += p.sums[part * p.elements + element];
  const int64_t tap = element / p.channels, filter = tap / p.taps;
  p.out[filter * p.out_filter + (tap - filter * p.taps) * p.out_tap + (element - tap * p.channels) * p.out_channel] =
      from_float<T>(sum);
}

namespace conv {

template <class T>
int launch_sum(const SumParams<T>& p, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(p.elements, kSumThreads))), dim3(kSumThreads),
                            0, stream};
  return launch(conv_sum_parts_kernel<T>, config, p);
}

template <class T>
using TileWeight = TileShape<T, 64, 128, 2, 4, true>;

template <class T, class Product, template <class, class> class Loader>
int launch_weight_tile(const WeightParams& p, Stream stream) {
  using Shape = TileWeight<T>;
  const int64_t blocks = p.parts * p.groups * p.tiles_n * p.tiles_m;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                            weight_shared_bytes<T, Shape, Loader>(), stream};
  return launch(conv_backward_weight_kernel<T, Shape, Product, Loader>, config, p);
}

// Parts of the places, where one part takes so many blocks: about two waves of blocks, but no part below 256 places,
// which is where reading them costs as much as the 8 bytes a weight that a part adds.
inline void plan_parts(WeightParams& p, int64_t blocks) {
  const int64_t wanted = ceil_div<int64_t>(4 * multiprocessor_count(), blocks);
  p.parts = std::max<int64_t>(1, std::min(wanted, p.places / 256));
  p.part_places = ceil_div(p.places, p.parts);
  p.parts = ceil_div(p.places, p.part_places);
}

}  // namespace conv
}  // namespace bigkern
