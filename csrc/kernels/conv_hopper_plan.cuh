// Which convolutions the kernel of conv_hopper.cuh serves, and how it cuts them into tiles: what conv.cuh sees of it.
//
// Tiles are chosen by modelled cycles. Of a multiprocessor and cycle: 4,096 FLOP of wgmma, 128 bytes of shared memory,
// 30 bytes of L2 (assumed: 6.3 TB/s at 1.6 GHz over 132). A step is one filter tap of 64 channels:
//
//   tile       wgmma  shared memory: fragments of pixels, filters for each 64 rows, TMA's writes   L2, 3 x 3 of 28^2
//   256 x 128  1,024  (256 + 4 * 128 + 128) * 128 / 128 = 896 cycles                               745 cycles
//   256 x 64     512  (256 + 4 * 64 + 64) * 128 / 128   = 576                                      470
//   128 x 64     256  (128 + 2 * 64 + 64) * 128 / 128   = 320                                      415
//
// and a slab's pixels are written once for all its taps; blocks that share them ask L2 for half each. A warpgroup ends
// its half of a tile in 300 cycles and 300 for each 64 places of 32 filters (some 220 instructions a warp, and their
// exchanges), hidden by the other's products as far as that lags behind; results cross L2 beside the loads. Where they
// are staged, nothing is multiplied for 1,500 cycles and their way to L2. In % of 4,096 FLOP a cycle, of 132
// multiprocessors, 4.3 TB/s of HBM:
//
//   images   3 x 3: 64 of 56^2, 128 of 28^2, 256 of 14^2, 512 of 7^2    by stride 2, to the last three
//     256           75          93           95           79            75  93  70
//      32           70          63           57           52            51  49  40
//   1 x 1, 256 images: 64 -> 256 and back of 56^2 25 (HBM), 128 -> 512 and back of 28^2 45 and 51 (HBM), 256 -> 1024
//   and back of 14^2 60 and 79, 512 -> 2048 and back of 7^2 71 and 63
//
// (with every tile's end exposed and no clusters: 55 82 90 76, 71 77 59; 55 62 55 45, 54 37 29; 19 and 25, 29 and 48,
// 40 and 54, 48 and 43). 3 x 3 of 64 channels is bound by shared memory, those of few images by whole waves. No GPU has
// been asked yet.
#pragma once

#include "kernels/conv_epilogue.cuh"

#include <algorithm>
#include <numeric>

namespace bigkern {
namespace conv {

// ---- What a measured run may choose from ----

// Output places and filters of a tile, steps of filters that are on their way at once, and the most blocks that may
// share their pixels (1 or 2). Slabs of pixels take what shared memory is left.
struct HopperTile {
  int rows, filters, stages, cluster;
};
constexpr HopperTile kHopperTiles[] = {{256, 128, 5, 2}, {256, 64, 8, 2}, {128, 64, 8, 2}};
constexpr int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

// Lines of a slab start at multiples of this many pixels: 1, or 8 if a GPU should swizzle tiles that start within an
// atom of 1,024 bytes otherwise than conv_hopper.cuh takes it.
constexpr int kHopperPitch = 1;
constexpr int kHopperSlice = 32;  // filters whose results are staged, or stored, at once
// What must be saved before blocks share pixels: a share of the cycles, for walking in step (assumed).
constexpr double kHopperClusterGain = 0.03;
// Of the channels that are multiplied, those that must be real: the sm_80 path multiplies at about 0.6 of wgmma's rate.
constexpr double kHopperLeastUse = 0.6;

// ---- Sizes ----

constexpr int kHopperChannels = 64;  // of a step: the 128 bytes of a swizzled row
constexpr int kHopperChannelBytes = 2 * kHopperChannels;
constexpr int kHopperMostSlabs = 8;
constexpr int kHopperMostStride = 4;        // of the forward pass along the width: a tensor map for each phase
constexpr int kHopperSharedBytes = 232448;  // of a block, at most: 227 KiB
constexpr int kHopperMostBox = 256;         // of a tensor map, along one dimension

constexpr int hopper_result_bytes(const HopperTile& tile) {
  return tile.rows * (kHopperSlice + 8) * static_cast<int>(sizeof(float));
}

// Pixels in the ring of slabs: whole swizzle atoms. Staged: results leave by way of shared memory.
__host__ __device__ constexpr int hopper_ring_pixels(const HopperTile& tile, bool staged) {
  const int filters = tile.stages * tile.filters * kHopperChannelBytes, places = tile.rows * sizeof(int64_t);
  const int barriers = (3 * kHopperMostSlabs + 2 * tile.stages) * sizeof(uint64_t);
  const int small = (places + barriers + 1023) / 1024 * 1024;
  return (kHopperSharedBytes - filters - small - (staged ? hopper_result_bytes(tile) : 0)) / 1024 * 8;
}

// Divides by a positive number that the host knows: n / divisor, exact while n * divisor < 2^64.
struct HopperDivisor {
  uint64_t factor;  // 2^64 / divisor, rounded up; 0 for 1

  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return factor == 0 ? n : static_cast<int64_t>(__umul64hi(n, factor));
  }
};

inline HopperDivisor hopper_divisor(int64_t divisor) {
  return {divisor > 1 ? UINT64_MAX / divisor + 1 : 0};
}

struct HopperLayout {
  int strips, strip_width;  // an image's columns are cut into strips, whose places are counted one after another
  int pitch;                // pixels of a slab's rows
  int slab;                 // pixels from a slab to the next, a multiple of 8
  int slabs;                // in the ring
  int tiles;
  int cluster;  // blocks that have the same places and neighbouring filters, and load half of the pixels each, or 1
  bool staged;  // results leave by way of shared memory: to pooling windows, places side by side, single elements
  HopperDivisor by_strips, by_width;
  HopperDivisor by_height, by_rest;  // an image's lines, or its windows'; those of a parity that has one less
};

struct HopperPlan {
  int tile;  // of kHopperTiles; -1: none serves
  GemmParams params;
  HopperLayout layout;
};

// ---- Phases ----

// Taps of an axis that meet the operand's places `place + stride * i` only. On those places they are a convolution of
// stride 1: output place i meets the one of index i + origin + j * step through filter tap first_tap + j * tap_step,
// for 0 <= j < taps. The forward pass has stride phases, a parity of the input gradient one.
struct HopperPhase {
  int taps, first_tap, tap_step;
  int origin, step;
  int place, stride;
};

__host__ __device__ __forceinline__ HopperPhase hopper_phase(const AxisShape& shape, bool transposed, int phase) {
  if (transposed) {
    const Axis axis = transposed_axis(shape, phase);
    return {axis.taps, axis.first_tap, axis.tap_step, axis.origin, axis.step, 0, 1};
  }
  const int every = shape.stride / shape.common;
  int tap = 0;
  while (tap < every && (tap * shape.dilation - shape.padding - phase) % shape.stride != 0) tap++;
  // A phase beyond the operand is all padding.
  if (tap >= every || tap >= shape.taps || phase >= shape.operand) return {0, 0, 1, 0, 1, 0, 1};
  const int origin = (tap * shape.dilation - shape.padding - phase) / shape.stride;
  return {(shape.taps - tap - 1) / every + 1, tap, every, origin, shape.dilation / shape.common, phase, shape.stride};
}

// Places that the taps of a phase reach beyond those of one tap: the most, over phases or parities.
inline int hopper_reach(const AxisShape& shape, bool transposed) {
  int most = 0;
  for (int i = 0; i < shape.stride; i++) {
    const HopperPhase phase = hopper_phase(shape, transposed, i);
    most = std::max(most, (phase.taps - 1) * phase.step);
  }
  return most;
}

// ---- The plan ----

// Strides as a tensor map wants them, also along axes of length one, where they mean nothing; false where it takes none
// like them: images in memory one after another, lines within, pixels within.
inline bool order_strides(GemmParams& p) {
  const auto along = [](int64_t& stride, int64_t length, int64_t inner) {
    if (length == 1) stride = inner;
    return stride >= inner;
  };
  constexpr int64_t kMost = int64_t{1} << 38;  // elements, of 2^40 bytes for four pixels
  return along(p.a_pixel, p.width.operand, p.channels) &&
         along(p.a_row, p.height.operand, p.width.operand * p.a_pixel) &&
         along(p.a_image, p.images, p.height.operand * p.a_row) && along(p.b_tap, p.width.taps, p.channels) &&
         along(p.b_row, p.height.taps, p.width.taps * p.b_tap) &&
         along(p.b_filter, p.filters, p.height.taps * p.b_row) && p.a_image < kMost && p.b_filter < kMost;
}

// A 1 x 1 convolution of dense images is a matrix product: one line of all places.
inline bool flatten(GemmParams& p) {
  const auto plain = [](const AxisShape& axis) { return axis.taps == 1 && axis.stride == 1 && axis.padding == 0; };
  const int64_t line = p.width.operand * p.a_pixel, places = p.images * p.height.operand * p.width.operand;
  if (!plain(p.height) || !plain(p.width) || p.pool_tile != PoolTile::kNone || places > INT_MAX / 2 ||
      p.a_row != line || p.a_image != p.height.operand * line) {
    return false;
  }
  p.images = p.height.operand = p.height.result = 1;
  p.width.operand = p.width.result = static_cast<int>(places);
  p.a_row = p.a_image = places * p.a_pixel;
  return true;
}

// Rows of a slab: the most over all tiles of `count` windows, or places where there is no pool.
inline int hopper_rows(const GemmParams& p, int count, int strips, int width, int reach) {
  if (p.pool_tile == PoolTile::kBox) return (p.tile_h - 1) * p.pool.stride_h + p.pool.kernel_h + reach;
  const bool pooled = p.pool_tile == PoolTile::kWindows;
  const int height = pooled         ? p.pool.out_h
                     : p.transposed ? ceil_div(p.height.result, p.height.stride)
                                    : p.height.result;
  const int unit = pooled ? p.pool.stride_h : 1, cover = pooled ? p.pool.kernel_h : 1;
  // A run of `count` that starts at a multiple of count touches this many groups of `size`, of which `all` exist.
  const auto touched = [&](int64_t size, int64_t all) {
    return std::min((size - std::gcd<int64_t>(size, count) + count - 1) / size + 1, all);
  };
  // Parities of other sizes start elsewhere.
  const bool alike = !p.transposed || p.height.stride * p.width.stride == 1;
  const auto most = [&](int64_t size, int64_t all) {
    return alike ? touched(size, all) : std::min((size + count - 2) / size + 1, all);
  };
  const int least_height = alike ? height : std::max(1, p.height.result / p.height.stride);
  const int64_t lines = most(width, p.images * strips * height);
  const int64_t images = most(int64_t{least_height} * width, p.images * strips);
  return static_cast<int>(lines * unit + images * std::max(0, cover - unit + reach));
}

// The places of the tile's rows in slabs of pixels; false where no ring of two slabs holds them.
inline bool plan_slabs(const GemmParams& p, const HopperTile& tile, bool flat, HopperLayout& layout) {
  const int reach_h = hopper_reach(p.height, p.transposed), reach_w = hopper_reach(p.width, p.transposed);
  const int ring = hopper_ring_pixels(tile, layout.staged);
  const bool pooled = p.pool_tile != PoolTile::kNone;
  const int columns = p.transposed ? ceil_div(p.width.result, p.width.stride) : p.width.result;
  constexpr int kLeastWidth = 8;
  for (int strips = ceil_div(columns, std::max(1, kHopperMostBox - reach_w));; strips += ceil_div(strips, 8)) {
    int width = flat ? tile.rows / layout.cluster : ceil_div(columns, strips), covered = width;
    if (p.pool_tile == PoolTile::kWindows) {
      width = p.pool.out_w;
      covered = (p.pool.out_w - 1) * p.pool.stride_w + p.pool.kernel_w;
    }
    if (p.pool_tile == PoolTile::kBox) width = covered = p.box_w;
    const int cut = pooled ? 1 : ceil_div(columns, width);
    const int rows = hopper_rows(p, pooled ? p.windows : tile.rows, cut, width, reach_h);
    const int64_t pitch = round_up<int64_t>(int64_t{covered} + reach_w, kHopperPitch);
    const int64_t slab = round_up<int64_t>(rows * pitch, 8);
    if (pitch <= kHopperMostBox && 2 * slab <= ring) {
      layout.strips = cut;
      layout.strip_width = width;
      layout.pitch = static_cast<int>(pitch);
      layout.slab = static_cast<int>(slab);
      layout.slabs = static_cast<int>(std::min<int64_t>(kHopperMostSlabs, ring / slab));
      return true;
    }
    if (pooled || flat || width <= kLeastWidth) return false;
  }
}

inline void plan_divisors(const GemmParams& p, HopperLayout& layout) {
  const int height = p.height.result, stride = p.transposed ? p.height.stride : 1;
  const bool windows = p.pool_tile == PoolTile::kWindows;
  layout.by_strips = hopper_divisor(layout.strips);
  layout.by_width = hopper_divisor(layout.strip_width);
  layout.by_height = hopper_divisor(windows ? p.pool.out_h : ceil_div(height, stride));
  layout.by_rest = hopper_divisor(windows ? p.pool.out_h : height / stride);
}

inline double hopper_cycles(const GemmParams& p, const HopperTile& tile, const HopperLayout& layout) {
  constexpr double kFlop = 4096, kSharedBytes = 128, kL2Bytes = 30, kStagedEnd = 1500, kEnd = 300, kTurn = 300;
  const double classes = p.transposed ? p.height.stride * p.width.stride : 1;
  const double taps = p.height.taps * p.width.taps / classes;
  const double phases =
      p.transposed ? 1 : std::min(p.height.stride, p.height.taps) * std::min(p.width.stride, p.width.taps);
  const double chunks = ceil_div(p.channels, kHopperChannels), results = double(tile.rows) * tile.filters;
  const double pixels = phases * layout.slab, filters = taps * tile.filters;
  const double fragments = taps * (tile.rows + tile.rows / 64 * tile.filters);
  const double step = 2 * results * kHopperChannels / kFlop;
  double multiply = chunks * taps * step;
  double l2 = chunks * kHopperChannelBytes * (pixels / layout.cluster + filters) / kL2Bytes;
  double shared = chunks * kHopperChannelBytes * (fragments + pixels + filters) / kSharedBytes;
  const double leave = 2 * results / kL2Bytes;
  double end = kStagedEnd + leave, tile_cycles = std::max({multiply, l2, shared}) + end;
  if (!layout.staged) {
    end = kEnd + kTurn * results / (128 * kHopperSlice);
    const double ahead = std::min<double>(tile.stages - 1, (layout.slabs - 1) * taps / phases);
    tile_cycles =
        std::max({multiply + std::max(0.0, end - ahead * step / 2), l2 + leave, shared + 2 * results / kSharedBytes});
  }
  const int64_t waves = ceil_div<int64_t>(layout.tiles, std::max(1, multiprocessor_count()));
  return waves * tile_cycles + end;
}

// p as gemm_params has it, with its pool planned for the sm_80 tile or none. vectors: each place's results are whole
// vectors, one filter beside the other.
inline HopperPlan plan_hopper(const GemmParams& given, bool vectors) {
  HopperPlan best{-1, given, {}};
  GemmParams p = given;
  const bool stride = p.transposed || (p.width.stride <= kHopperMostStride && p.height.stride <= kHopperMostStride);
  const double use = double(p.channels) / round_up(p.channels, kHopperChannels / 2);
  if (p.groups != 1 || !stride || use < kHopperLeastUse || !order_strides(p)) return best;
  const bool flat = flatten(p);
  double least = 0;
  for (int i = 0; i < kHopperTileCount; i++) {
    const HopperTile& tile = kHopperTiles[i];
    for (int cluster = 1; cluster <= tile.cluster; cluster++) {
      HopperPlan plan{i, p, {}};
      GemmParams& q = plan.params;
      plan.layout.cluster = cluster;
      plan.layout.staged = !vectors || q.pool_tile != PoolTile::kNone;
      if (q.pool_tile != PoolTile::kNone && !plan_pool(q.pool, tile.rows, q)) continue;
      if (!plan_slabs(q, tile, flat, plan.layout)) continue;
      const int classes = q.transposed ? q.height.stride * q.width.stride : 1;
      q.tiles_n = ceil_div(q.filters, tile.filters);
      if (q.tiles_n % cluster != 0) continue;
      if (q.pool_tile == PoolTile::kNone) {
        const int rows = q.transposed ? ceil_div(q.height.result, q.height.stride) : q.height.result;
        const int64_t places = q.images * rows * plan.layout.strips * plan.layout.strip_width;
        q.tiles_m = ceil_div<int64_t>(places, tile.rows);
      }
      const int64_t tiles = q.tiles_m * q.tiles_n * classes;
      if (tiles > INT_MAX / 2 || q.images * plan.layout.strips > INT_MAX / 2) continue;
      // What is divided, fewer than 2^38 places, by this stays exact.
      if (std::max(q.height.result, plan.layout.strip_width) >= 1 << 26) continue;
      plan.layout.tiles = static_cast<int>(tiles);
      plan_divisors(q, plan.layout);
      const double gain = cluster > 1 ? kHopperClusterGain : 0.0;
      const double cycles = hopper_cycles(q, tile, plan.layout) / (1 - gain);
      if (best.tile < 0 || cycles < least) {
        best = plan;
        least = cycles;
      }
    }
  }
  return best;
}

// T is __nv_bfloat16 or __half. 0, or an error code for error_string.
template <class T>
int launch_hopper(const HopperPlan& plan, const StoreOutput<T>& epilogue, Stream stream);

}  // namespace conv
}  // namespace bigkern
