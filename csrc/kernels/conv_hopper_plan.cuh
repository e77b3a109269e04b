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
// and a slab's pixels are written once for all its taps. A tile's end, in which nothing is multiplied, costs 1,500
// cycles and its results' way to L2. Of 4,096 FLOP a cycle that makes, for 256 images on 132 multiprocessors: 3 x 3
// convolutions of 64 channels on 56^2 55 %, 128 on 28^2 82 %, 256 on 14^2 90 %, 512 on 7^2 76 %; by stride 2, to the
// last three sizes, 71, 77 and 59 %; 1 x 1, which memory binds, 19 to 54 %. No GPU has been asked yet.
#pragma once

#include "kernels/conv_epilogue.cuh"

#include <algorithm>
#include <numeric>

namespace bigkern {
namespace conv {

// ---- What a measured run may choose from ----

// Output places and filters of a tile, and steps of filters that are on their way at once. Slabs of pixels take what
// shared memory is left.
struct HopperTile {
  int rows, filters, stages;
};
constexpr HopperTile kHopperTiles[] = {{256, 128, 4}, {256, 64, 4}, {128, 64, 4}};
constexpr int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

// Lines of a slab start at multiples of this many pixels: 1, or 8 if a GPU should swizzle tiles that start within an
// atom of 1,024 bytes otherwise than conv_hopper.cuh takes it.
constexpr int kHopperPitch = 1;
constexpr int kHopperSlice = 32;  // filters whose results are stored at once
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

// Pixels in the ring of slabs: whole swizzle atoms.
constexpr int hopper_ring_pixels(const HopperTile& tile) {
  const int filters = tile.stages * tile.filters * kHopperChannelBytes, places = tile.rows * sizeof(int64_t);
  const int barriers = 2 * (kHopperMostSlabs + tile.stages) * sizeof(uint64_t);
  return (kHopperSharedBytes - filters - hopper_result_bytes(tile) - places - barriers) / 1024 * 8;
}

struct HopperLayout {
  int strips, strip_width;  // an image's columns are cut into strips, whose places are counted one after another
  int pitch;                // pixels of a slab's rows
  int slab;                 // pixels from a slab to the next, a multiple of 8
  int slabs;                // in the ring
  int tiles;
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
  const int ring = hopper_ring_pixels(tile);
  const bool pooled = p.pool_tile != PoolTile::kNone;
  const int columns = p.transposed ? ceil_div(p.width.result, p.width.stride) : p.width.result;
  constexpr int kLeastWidth = 8;
  for (int strips = ceil_div(columns, std::max(1, kHopperMostBox - reach_w));; strips += ceil_div(strips, 8)) {
    int width = flat ? tile.rows : ceil_div(columns, strips), covered = width;
    if (p.pool_tile == PoolTile::kWindows) {
      width = p.pool.out_w;
      covered = (p.pool.out_w - 1) * p.pool.stride_w + p.pool.kernel_w;
    }
    if (p.pool_tile == PoolTile::kBox) width = covered = p.box_w;
    const int rows = hopper_rows(p, pooled ? p.windows : tile.rows, pooled ? 1 : strips, width, reach_h);
    const int64_t pitch = round_up<int64_t>(int64_t{covered} + reach_w, kHopperPitch);
    const int64_t slab = round_up<int64_t>(rows * pitch, 8);
    if (pitch <= kHopperMostBox && 2 * slab <= ring) {
      layout.strips = pooled ? 1 : ceil_div(columns, width);
      layout.strip_width = width;
      layout.pitch = static_cast<int>(pitch);
      layout.slab = static_cast<int>(slab);
      layout.slabs = static_cast<int>(std::min<int64_t>(kHopperMostSlabs, ring / slab));
      return true;
    }
    if (pooled || flat || width <= kLeastWidth) return false;
  }
}

inline double hopper_cycles(const GemmParams& p, const HopperTile& tile, const HopperLayout& layout) {
  constexpr double kFlop = 4096, kSharedBytes = 128, kL2Bytes = 30, kEnd = 1500;
  const double classes = p.transposed ? p.height.stride * p.width.stride : 1;
  const double taps = p.height.taps * p.width.taps / classes;
  const double phases =
      p.transposed ? 1 : std::min(p.height.stride, p.height.taps) * std::min(p.width.stride, p.width.taps);
  const double multiply = 2.0 * tile.rows * tile.filters * kHopperChannels / kFlop;
  const double pixels = phases * layout.slab, filters = taps * tile.filters;
  const double fragments = taps * (tile.rows + tile.rows / 64 * tile.filters);
  const double chunk = std::max({taps * multiply, kHopperChannelBytes * (pixels + filters) / kL2Bytes,
                                 kHopperChannelBytes * (fragments + pixels + filters) / kSharedBytes});
  const double end = kEnd + 2.0 * tile.rows * tile.filters / kL2Bytes;
  const int64_t waves = ceil_div<int64_t>(layout.tiles, std::max(1, multiprocessor_count()));
  return waves * (ceil_div(p.channels, kHopperChannels) * chunk + end);
}

// p as gemm_params has it, with its pool planned for the sm_80 tile or none.
inline HopperPlan plan_hopper(const GemmParams& given) {
  HopperPlan best{-1, given, {}};
  GemmParams p = given;
  const bool stride = p.transposed || (p.width.stride <= kHopperMostStride && p.height.stride <= kHopperMostStride);
  const double use = double(p.channels) / round_up(p.channels, kHopperChannels / 2);
  if (p.groups != 1 || !stride || use < kHopperLeastUse || !order_strides(p)) return best;
  const bool flat = flatten(p);
  double least = 0;
  for (int i = 0; i < kHopperTileCount; i++) {
    const HopperTile& tile = kHopperTiles[i];
    HopperPlan plan{i, p, {}};
    GemmParams& q = plan.params;
    if (q.pool_tile != PoolTile::kNone && !plan_pool(q.pool, tile.rows, q)) continue;
    if (!plan_slabs(q, tile, flat, plan.layout)) continue;
    const int classes = q.transposed ? q.height.stride * q.width.stride : 1;
    q.tiles_n = ceil_div(q.filters, tile.filters);
    if (q.pool_tile == PoolTile::kNone) {
      const int rows = q.transposed ? ceil_div(q.height.result, q.height.stride) : q.height.result;
      const int64_t places = q.images * rows * plan.layout.strips * plan.layout.strip_width;
      q.tiles_m = ceil_div<int64_t>(places, tile.rows);
    }
    const int64_t tiles = q.tiles_m * q.tiles_n * classes;
    if (tiles > INT_MAX / 2 || q.images * plan.layout.strips > INT_MAX / 2) continue;
    plan.layout.tiles = static_cast<int>(tiles);
    const double cycles = hopper_cycles(q, tile, plan.layout);
    if (best.tile < 0 || cycles < least) {
      best = plan;
      least = cycles;
    }
  }
  return best;
}

// T is __nv_bfloat16 or __half. 0, or an error code for error_string.
template <class T>
int launch_hopper(const HopperPlan& plan, const StoreOutput<T>& epilogue, Stream stream);

}  // namespace conv
}  // namespace bigkern
