// Implicit GEMM: out[m, n] = sum over k of a[m, k] b[n, k], where m runs over places of the output, n over filters of a
// group, and k over (filter row, filter column, channel). a is gathered from the images while it is copied into shared
// memory; b is the filters. Forward pass and input gradient are this one loop, with different axes (see Axis).
//
//   block: one kM x kN tile            shared: stages of [a: kM rows of 64 bytes][b: kN rows of 64 bytes]
//
//   k step t:   wait for stage t -> barrier -> start copies of stage t + kStages - 1 -> multiply stage t
//
// One barrier a step: it says both that stage t has landed and that everyone has left stage t - 1, which the new copies
// overwrite. Afterwards the same shared memory holds the tile's results in fp32, rows of kN + 8 words: the fragments'
// float2 stores (half a warp: rows g, columns 2 t) then fall on 8 g + 2 t, every bank once. The epilogue reads them
// back in the order of the output, so bias, activation and pooling are written once, for every product and shape.
#pragma once

#include "kernels/conv.h"
#include "kernels/conv_tile.cuh"

#include <algorithm>
#include <climits>

namespace bigkern {
namespace conv {

// ---- The traversal ----

// How places of the output meet places of the operand along one axis: output place i meets operand place
// i * stride + origin + j * step through filter tap first_tap + j * tap_step, for 0 <= j < taps, and is written to
// first_place + i * place_step of the result.
struct Axis {
  int places, stride, origin, step;
  int taps, first_tap, tap_step;
  int first_place, place_step;
};

// The two ways of using a convolution's axis.
//
// Forward: place i of the output meets i * stride - padding + r * dilation.
// Transposed, for the input gradient: input place h meets output place (h + padding - r * dilation) / stride wherever
// that is whole. For the places h = parity + stride * i the taps that qualify are every stride / gcd(stride,
// dilation)-th, and the next of them meets the output place dilation / gcd before: a dense convolution of its own,
// without atomics.
struct AxisShape {
  int operand, result;  // sizes
  int stride, padding, dilation, taps;
  int common;  // gcd(stride, dilation)
};

__host__ __device__ __forceinline__ Axis forward_axis(const AxisShape& shape) {
  return {shape.result, shape.stride, -shape.padding, shape.dilation, shape.taps, 0, 1, 0, 1};
}

__host__ __device__ __forceinline__ Axis transposed_axis(const AxisShape& shape, int parity) {
  const int every = shape.stride / shape.common;
  int tap = 0;
  while (tap < every && (parity + shape.padding - tap * shape.dilation) % shape.stride != 0) tap++;
  const int places = parity < shape.result ? (shape.result - parity - 1) / shape.stride + 1 : 0;
  if (tap >= every || tap >= shape.taps) return {places, 1, 0, 1, 0, 0, 1, parity, shape.stride};
  // The last tap first, so that the operand's places ascend.
  const int taps = (shape.taps - tap - 1) / every + 1, step = shape.dilation / shape.common;
  const int origin = (parity + shape.padding - tap * shape.dilation) / shape.stride - (taps - 1) * step;
  return {places, 1, origin, step, taps, tap + (taps - 1) * every, -every, parity, shape.stride};
}

// How a tile's rows lie on the output when it is pooled in the epilogue.
enum class PoolTile : int {
  kNone,     // rows are places of the output, one after the other
  kWindows,  // windows that do not overlap: kernel_h * kernel_w rows each
  kBox,  // a box of one image that holds tile_h x tile_w windows with all their places, computed again by neighbours
};

struct GemmParams {
  const void* a;                               // images x operand_h x operand_w x channels
  int64_t a_image, a_row, a_pixel, a_channel;  // strides in elements; chunks want contiguous channels
  const void* b;                               // filters; channels contiguous
  int64_t b_filter, b_row, b_tap;
  AxisShape height, width;
  bool transposed;
  int64_t images;
  int groups, channels, filters;  // channels and filters of a group
  int64_t tiles_m;
  int tiles_n;

  PoolTile pool_tile;
  ConvPool pool;
  int windows;           // of a tile
  int tile_h, tile_w;    // kBox: windows along each axis
  int box_w;             // columns of places in a box
  int boxes_h, boxes_w;  // of an image
};

// Which tile the block of this number has. Filters run fastest, so that neighbours read the same places of the images.
struct TilePlace {
  int64_t m;
  int n, group;
  Axis height, width;

  // In int, where a caller knows that all tiles can be counted in it, divisions cost a fraction.
  template <class Index>
  __device__ __forceinline__ TilePlace(const GemmParams& p, Index block) {
    const Index rest = block / p.tiles_n, tiles_m = static_cast<Index>(p.tiles_m);
    n = static_cast<int>(block - rest * p.tiles_n);
    int z = static_cast<int>(rest / tiles_m);
    m = rest - z * tiles_m;
    if (p.transposed) {
      const int parity_w = z % p.width.stride;
      z /= p.width.stride;
      const int parity_h = z % p.height.stride;
      z /= p.height.stride;
      height = transposed_axis(p.height, parity_h);
      width = transposed_axis(p.width, parity_w);
    } else {
      height = forward_axis(p.height);
      width = forward_axis(p.width);
    }
    group = z;
  }
};

// A row of the tile: a place of the output.
struct Place {
  int64_t image;
  int h, w;
  bool valid;
};

template <class Shape>
__device__ __forceinline__ Place locate(const GemmParams& p, const TilePlace& tile, int row) {
  const int rows = tile.height.places, cols = tile.width.places;
  Place place{};
  if (p.pool_tile == PoolTile::kNone) {
    const int64_t index = tile.m * Shape::kM + row, line = index / cols;
    place.image = line / rows;
    place.h = static_cast<int>(line - place.image * rows);
    place.w = static_cast<int>(index - line * cols);
    place.valid = place.image < p.images;
  } else if (p.pool_tile == PoolTile::kWindows) {
    const int area = p.pool.kernel_h * p.pool.kernel_w, window = row / area, element = row % area;
    const int64_t index = tile.m * p.windows + window, line = index / p.pool.out_w;
    place.image = line / p.pool.out_h;
    place.h = static_cast<int>(line - place.image * p.pool.out_h) * p.pool.stride_h + element / p.pool.kernel_w;
    place.w = static_cast<int>(index - line * p.pool.out_w) * p.pool.stride_w + element % p.pool.kernel_w;
    place.valid = window < p.windows && place.image < p.images;
  } else {
    const int64_t line = tile.m / p.boxes_w;
    place.image = line / p.boxes_h;
    const int box_h = static_cast<int>(line - place.image * p.boxes_h);
    const int box_w = static_cast<int>(tile.m - line * p.boxes_w);
    place.h = box_h * p.tile_h * p.pool.stride_h - p.pool.padding_h + row / p.box_w;
    place.w = box_w * p.tile_w * p.pool.stride_w - p.pool.padding_w + row % p.box_w;
    place.valid = row < ((p.tile_h - 1) * p.pool.stride_h + p.pool.kernel_h) * p.box_w && place.h >= 0 &&
                  place.h < rows && place.w >= 0 && place.w < cols;
  }
  return place;
}

// Boxes of at most `places` places, with all places of the windows in them: the fewest that cover an image.
struct PoolBoxes {
  int tile_h, tile_w;  // windows of a box
  int64_t count;       // of an image; 0 where no window fits
};

inline PoolBoxes fit_boxes(const ConvPool& pool, int places) {
  PoolBoxes best{};
  for (int tile_h = 1; tile_h <= pool.out_h; tile_h++) {
    const int box_h = (tile_h - 1) * pool.stride_h + pool.kernel_h;
    const int fitting = (places / box_h - pool.kernel_w) / pool.stride_w + 1;
    if (places / box_h < pool.kernel_w) break;
    const int tile_w = std::min(fitting, pool.out_w);
    const int64_t boxes = int64_t{ceil_div(pool.out_h, tile_h)} * ceil_div(pool.out_w, tile_w);
    if (best.count == 0 || boxes < best.count) best = {tile_h, tile_w, boxes};
  }
  return best;
}

// Lays the tile's rows over pooling windows; false where too few of them would be of use, and the pool is a pass of its
// own.
inline bool plan_pool(const ConvPool& pool, int tile_m, GemmParams& p) {
  p.pool = pool;
  const int64_t outputs = p.images * pool.out_h * pool.out_w;
  const int area = pool.kernel_h * pool.kernel_w;
  const bool apart =
      pool.stride_h >= pool.kernel_h && pool.stride_w >= pool.kernel_w && pool.padding_h == 0 && pool.padding_w == 0;
  if (apart && area <= tile_m) {
    p.pool_tile = PoolTile::kWindows;
    p.windows = tile_m / area;
    p.tiles_m = ceil_div<int64_t>(outputs, p.windows);
    return p.windows * area * 2 >= tile_m;
  }
  const PoolBoxes boxes = fit_boxes(pool, tile_m);
  if (boxes.count == 0) return false;
  p.pool_tile = PoolTile::kBox;
  p.tile_h = boxes.tile_h, p.tile_w = boxes.tile_w;
  p.windows = p.tile_h * p.tile_w;
  p.box_w = (p.tile_w - 1) * pool.stride_w + pool.kernel_w;
  p.boxes_h = ceil_div(pool.out_h, p.tile_h);
  p.boxes_w = ceil_div(pool.out_w, p.tile_w);
  p.tiles_m = p.images * boxes.count;
  return boxes.count * tile_m <= 2 * int64_t{p.height.result} * p.width.result;
}

// Where a row's operand lies: under tap (0, 0), which may be outside the image; rows without a place are outside for
// every tap.
struct RowStart {
  int64_t offset;
  int h, w;
};
constexpr int kOutside = INT_MIN / 2;

// A place on the k axis, moved by kStep without division: (tap row, tap column, channel).
template <int kStep>
class Walk {
 public:
  __device__ __forceinline__ Walk(int k, int channels, int taps_h, int taps_w) : channels_(channels), taps_w_(taps_w) {
    end_ = channels * taps_h * taps_w;
    if (end_ == 0) return;
    c = k % channels;
    s = k / channels % taps_w;
    r = k / channels / taps_w;
    k_ = k;
    step_c_ = kStep % channels;
    step_s_ = kStep / channels % taps_w;
    step_r_ = kStep / channels / taps_w;
  }

  __device__ __forceinline__ bool inside() const { return k_ < end_; }

  __device__ __forceinline__ void next() {
    k_ += kStep;
    c += step_c_;
    s += step_s_;
    r += step_r_;
    if (c >= channels_) {
      c -= channels_;
      s++;
    }
    if (s >= taps_w_) {
      s -= taps_w_;
      r++;
    }
  }

  int c = 0, s = 0, r = 0;

 private:
  int k_ = 0, end_, channels_, taps_w_, step_c_ = 0, step_s_ = 0, step_r_ = 0;
};

__device__ __forceinline__ bool within(int place, int size) {
  return static_cast<unsigned>(place) < static_cast<unsigned>(size);
}

// ---- Loaders: how (row, k) maps to memory ----

// Chunks of channels by cp.async: channels, strides and addresses are multiples of 16 bytes.
template <class T, class Shape>
class ChunkLoader {
 public:
  static constexpr int kStages = 4;

  __device__ __forceinline__ ChunkLoader(const GemmParams& p, const TilePlace& tile, const RowStart* rows)
      : p_(p),
        tile_(tile),
        walk_(chunk() * Shape::kVector, p.channels, tile.height.taps, tile.width.taps),
        base_(static_cast<const T*>(p.a) + int64_t{tile.group} * p.channels) {
#pragma unroll
    for (int i = 0; i < kRowsA; i++) starts_[i] = rows[row(i)];
    const int64_t filter = int64_t{tile.group} * p.filters + tile.n * Shape::kN + row(0);
    filters_ = static_cast<const T*>(p.b) + filter * p.b_filter;
  }

  __device__ __forceinline__ void start(T* stage) {
    const int tap_h = walk_.r * tile_.height.step, tap_w = walk_.s * tile_.width.step;
    const bool inside = walk_.inside();
    const T* const tap = base_ + tap_h * p_.a_row + tap_w * p_.a_pixel + walk_.c;
#pragma unroll
    for (int i = 0; i < kRowsA; i++) {
      const bool valid =
          inside && within(starts_[i].h + tap_h, p_.height.operand) && within(starts_[i].w + tap_w, p_.width.operand);
      cp_async16(k_major(stage, row(i), chunk()), valid ? tap + starts_[i].offset : base_, valid);
    }
    const T* const filter = filters_ + (tile_.height.first_tap + walk_.r * tile_.height.tap_step) * p_.b_row +
                            (tile_.width.first_tap + walk_.s * tile_.width.tap_step) * p_.b_tap + walk_.c;
#pragma unroll
    for (int i = 0; i < kRowsB; i++) {
      const bool valid = inside && tile_.n * Shape::kN + row(i) < p_.filters;
      cp_async16(k_major(stage + Shape::kM * Shape::kK, row(i), chunk()),
                 valid ? filter + i * kRowsAtOnce * p_.b_filter : static_cast<const T*>(p_.b), valid);
    }
    walk_.next();
  }

  __device__ __forceinline__ void finish(T*) {}

 private:
  static constexpr int kRowsAtOnce = Shape::kThreads / 4;
  static constexpr int kRowsA = Shape::kM / kRowsAtOnce, kRowsB = Shape::kN / kRowsAtOnce;
  static_assert(Shape::kM % kRowsAtOnce == 0 && Shape::kN % kRowsAtOnce == 0, "whole rounds");

  static __device__ __forceinline__ int chunk() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 4 + i * kRowsAtOnce; }

  const GemmParams& p_;
  const TilePlace& tile_;
  Walk<Shape::kK> walk_;
  const T* base_;
  const T* filters_;
  RowStart starts_[kRowsA];
};

// Single elements through registers, for few channels and every other shape. k is dense over (row, column, channel):
// neighbouring lanes have neighbouring k, which in a filter row of a dense image are neighbours in memory, so a stem of
// 3 channels reads whole lines and pads its 147 values of k to 160 only.
template <class T, class Shape>
class ElementLoader {
 public:
  static constexpr int kStages = 2;

  __device__ __forceinline__ ElementLoader(const GemmParams& p, const TilePlace& tile, const RowStart* rows)
      : p_(p),
        tile_(tile),
        rows_(rows),
        walk_(k(), p.channels, tile.height.taps, tile.width.taps),
        base_(static_cast<const T*>(p.a) + int64_t{tile.group} * p.channels * p.a_channel) {
    const int64_t filter = int64_t{tile.group} * p.filters + tile.n * Shape::kN + row(0);
    filters_ = static_cast<const T*>(p.b) + filter * p.b_filter;
  }

  __device__ __forceinline__ void start(T*) {
    const int tap_h = walk_.r * tile_.height.step, tap_w = walk_.s * tile_.width.step;
    const bool inside = walk_.inside();
    const T* const tap = base_ + tap_h * p_.a_row + tap_w * p_.a_pixel + walk_.c * p_.a_channel;
#pragma unroll
    for (int i = 0; i < kRowsA; i++) {
      const RowStart at = rows_[row(i)];
      const bool valid = inside && within(at.h + tap_h, p_.height.operand) && within(at.w + tap_w, p_.width.operand);
      a_[i] = valid ? tap[at.offset] : from_float<T>(0.0f);
    }
    const T* const filter = filters_ + (tile_.height.first_tap + walk_.r * tile_.height.tap_step) * p_.b_row +
                            (tile_.width.first_tap + walk_.s * tile_.width.tap_step) * p_.b_tap + walk_.c;
#pragma unroll
    for (int i = 0; i < kRowsB; i++) {
      const bool valid = inside && tile_.n * Shape::kN + row(i) < p_.filters;
      b_[i] = valid ? filter[i * kRowsAtOnce * p_.b_filter] : from_float<T>(0.0f);
    }
    walk_.next();
  }

  __device__ __forceinline__ void finish(T* stage) {
    const int chunk = k() / Shape::kVector, element = k() % Shape::kVector;
#pragma unroll
    for (int i = 0; i < kRowsA; i++) k_major(stage, row(i), chunk)[element] = a_[i];
#pragma unroll
    for (int i = 0; i < kRowsB; i++) k_major(stage + Shape::kM * Shape::kK, row(i), chunk)[element] = b_[i];
  }

 private:
  static constexpr int kRowsAtOnce = Shape::kThreads / Shape::kK;
  static constexpr int kRowsA = Shape::kM / kRowsAtOnce, kRowsB = Shape::kN / kRowsAtOnce;

  static __device__ __forceinline__ int k() { return threadIdx.x % Shape::kK; }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / Shape::kK + i * kRowsAtOnce; }

  const GemmParams& p_;
  const TilePlace& tile_;
  const RowStart* rows_;
  Walk<Shape::kK> walk_;
  const T* base_;
  const T* filters_;
  T a_[kRowsA], b_[kRowsB];
};

// ---- The kernel ----

template <class Shape>
constexpr int kResultPitch = Shape::kN + 8;

template <class T, class Shape, template <class, class> class Loader>
__host__ __device__ constexpr size_t gemm_shared_bytes() {
  const size_t stages = Loader<T, Shape>::kStages * (Shape::kM + Shape::kN) * 64;
  const size_t results = Shape::kM * kResultPitch<Shape> * sizeof(float);
  static_assert(Shape::kN * (Shape::kM + 4) <= Shape::kM * kResultPitch<Shape>, "by columns they take no more");
  return stages > results ? stages : results;
}

// The results by columns, for outputs in NCHW: 4 mod 32 words a column, so that the fragments' rows g of columns 2 t
// fall on 8 t + g.
template <class Shape>
constexpr int kColumnPitch = Shape::kM + 4;

// Accumulators into the tile of results.
template <class Shape>
struct PutRows {
  float* results;

  __device__ __forceinline__ void operator()(int row, int col, float first, float second) const {
    *reinterpret_cast<float2*>(results + row * kResultPitch<Shape> + col) = make_float2(first, second);
  }
  __device__ __forceinline__ void operator()(int row, int col, float value) const {
    results[row * kResultPitch<Shape> + col] = value;
  }
};

template <class Shape>
struct PutColumns {
  float* results;

  __device__ __forceinline__ void operator()(int row, int col, float first, float second) const {
    (*this)(row, col, first);
    (*this)(row, col + 1, second);
  }
  __device__ __forceinline__ void operator()(int row, int col, float value) const {
    results[col * kColumnPitch<Shape> + row] = value;
  }
};

}  // namespace conv

// Epilogue: a functor that takes the tile's results, fp32 in shared memory; valid[row] is the row's place in the
// result, counted in places, or -1 where there is none.
template <class T, class Shape, class Product, template <class, class> class Loader, class Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, 512 / Shape::kThreads)
    conv_gemm_kernel(const conv::GemmParams p, const Epilogue epilogue) {
  using namespace conv;
  constexpr int kStages = Loader<T, Shape>::kStages, kStageElements = (Shape::kM + Shape::kN) * Shape::kK;
  SharedMemory shared;
  unsigned char* const memory = shared.take<unsigned char>(gemm_shared_bytes<T, Shape, Loader>(), 128);
  T* const stages = reinterpret_cast<T*>(memory);
  BK_SHARED(RowStart, starts, [Shape::kM]);
  BK_SHARED(int64_t, places, [Shape::kM]);

  const TilePlace tile(p, int64_t{blockIdx.x});
  // The parities of a transposed axis differ in places; some may have none.
  if (p.transposed && tile.m * Shape::kM >= p.images * tile.height.places * tile.width.places) return;
  for (int row = threadIdx.x; row < Shape::kM; row += Shape::kThreads) {
    const Place place = locate<Shape>(p, tile, row);
    const int h = place.h * tile.height.stride + tile.height.origin;
    const int w = place.w * tile.width.stride + tile.width.origin;
    starts[row] = {place.image * p.a_image + h * p.a_row + w * p.a_pixel, place.valid ? h : kOutside, w};
    const int64_t line = place.image * p.height.result + tile.height.first_place + place.h * tile.height.place_step;
    places[row] = place.valid ? line * p.width.result + tile.width.first_place + place.w * tile.width.place_step : -1;
  }
  __syncthreads();

  Accumulators<T, Shape, Product> sums;
  Loader<T, Shape> loader(p, tile, starts);
  const int steps = ceil_div(p.channels * tile.height.taps * tile.width.taps, Shape::kK);
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) {
    if (i < steps) {
      loader.start(stages + i * kStageElements);
      loader.finish(stages + i * kStageElements);
    }
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all have left the one before
    const bool more = step + kStages - 1 < steps;
    T* const ahead = stages + (step + kStages - 1) % kStages * kStageElements;
    if (more) loader.start(ahead);
    cp_async_commit();
    const T* const stage = stages + step % kStages * kStageElements;
    sums.add_k_major(stage, stage + Shape::kM * Shape::kK);
    if (more) loader.finish(ahead);
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages become the tile of results

  float* const results = reinterpret_cast<float*>(memory);
  if (epilogue.plane > 0) {
    sums.each(PutColumns<Shape>{results});
    __syncthreads();
    epilogue.template store_planes<Shape>(p, tile, results, places);
  } else {
    sums.each(PutRows<Shape>{results});
    __syncthreads();
    epilogue.template store<Shape>(p, tile, results, places);
  }
}

}  // namespace bigkern
