// Which weight gradients the kernel of conv_hopper_weight.cuh serves, and how it cuts them: what conv.cuh sees of it.
//
// Tiles and parts are chosen by modelled cycles, of the same machine as conv_hopper_plan.cuh's: of a multiprocessor and
// cycle 4,096 FLOP of wgmma, 128 bytes of shared memory, 30 of L2 and 20 of device memory (assumed). Of a step of 64
// places, in cycles:
//
//   tile       wgmma  shared memory: both operands of every wgmma, TMA's writes   L2     shared by two
//   256 x 192  1,536  4 * 4 * (2,048 + 6,144) / 128 + 57,344 / 128 = 1,472        1,911  1,365
//   256 x 128  1,024  4 * 4 * (2,048 + 4,096) / 128 + 49,152 / 128 = 1,152        1,638  1,092
//   128 x 192    768  2 * 4 * (2,048 + 6,144) / 128 + 40,960 / 128 =   832        1,365  1,092
//    64 x 256    512  2 * 4 * (2,048 + 4,096) / 128 + 40,960 / 128 =   704        1,365
//
// where two blocks of a cluster, with the same filters and part, each load half of the gradient for both. A block's end
// costs 1,500 cycles and its sums' way to L2, the ordered sum a read of all parts. Of 4,096 FLOP a cycle that makes,
// for 256 images on 132 multiprocessors: 3 x 3 convolutions of 64 channels on 56^2 34 %, 128 on 28^2 66 %, 256 on 14^2
// 85 %, 512 on 7^2 70 %, by stride 2 to the last three sizes the same; 1 x 1 71 to 79 % where memory does not bind. Of
// 32 images 30, 47, 48 and 37 %: a part's end weighs more. With 64 filters L2 binds, as every tap reads its pixels
// anew. No GPU has been asked yet.
#pragma once

#include "kernels/conv_hopper_plan.cuh"
#include "kernels/conv_weight.cuh"

#include <algorithm>
#include <climits>

namespace bigkern {
namespace conv {

// ---- What a measured run may choose from ----

// Filters and columns of (r, s, c) of a tile, and steps of places that are on their way at once. Two warpgroups share
// the filters, of 64 the columns.
struct HopperWeightTile {
  int filters, columns, stages;
};
constexpr HopperWeightTile kHopperWeightTiles[] = {{256, 192, 4}, {256, 128, 4}, {128, 192, 5}, {64, 256, 5}};
constexpr int kHopperWeightTileCount = sizeof(kHopperWeightTiles) / sizeof(kHopperWeightTiles[0]);

// Most blocks for each multiprocessor that the places are cut into parts for.
constexpr int kHopperWeightWaves = 4;
// Of what is multiplied, that which must be real: the sm_80 path multiplies at about half of this one's rate.
constexpr double kHopperWeightLeastUse = 0.5;

// ---- The plan ----

constexpr int kHopperPlaces = 64;  // of a step

// The places of a step are a box of the output, of several images where one has too few or no divisor that fits. Boxes
// leave an axis only where both operands end there: what is zero in one may be NaN in the other.
struct HopperWeightLayout {
  int64_t images;
  int box_w, box_h, box_images;
  int steps, part_steps;
  int channel_steps;  // of 64 channels, the last one filled up with zeros
  int cluster;        // blocks that load one gradient for all, 1 or 2
};

struct HopperWeightPlan {
  int tile;  // of kHopperWeightTiles; -1: none serves
  WeightParams params;
  HopperWeightLayout layout;
};

// Strides as tensor maps want them, as order_strides of conv_hopper_plan.cuh has it.
inline bool order_strides(WeightParams& p, int64_t images) {
  const auto along = [](int64_t& stride, int64_t length, int64_t inner) {
    if (length == 1) stride = inner;
    return stride >= inner;
  };
  constexpr int64_t kMost = int64_t{1} << 37;  // elements: 2^40 bytes for lines of four
  return along(p.grad_pixel, p.out_w, p.filters) && along(p.grad_row, p.out_h, p.out_w * p.grad_pixel) &&
         along(p.grad_image, images, p.out_h * p.grad_row) && along(p.input_pixel, p.width, p.channels) &&
         along(p.input_row, p.height, p.width * p.input_pixel) &&
         along(p.input_image, images, p.height * p.input_row) && p.grad_image < kMost && p.input_image < kMost;
}

// A 1 x 1 convolution of dense images is a matrix product: one line of all places.
inline bool flatten(WeightParams& p) {
  const int64_t grad_line = p.out_w * p.grad_pixel, input_line = p.width * p.input_pixel;
  if (p.kernel_h * p.kernel_w * p.stride_h * p.stride_w != 1 || p.padding_h + p.padding_w != 0 ||
      p.places > INT_MAX / 2 || p.grad_row != grad_line || p.grad_image != p.out_h * grad_line ||
      p.input_row != input_line || p.input_image != p.height * input_line) {
    return false;
  }
  p.out_w = p.width = static_cast<int>(p.places);
  p.out_h = p.height = 1;
  p.grad_row = p.grad_image = p.places * p.grad_pixel;
  p.input_row = p.input_image = p.places * p.input_pixel;
  return true;
}

// The boxes that need the fewest steps, of those the widest.
inline void plan_boxes(const WeightParams& p, HopperWeightLayout& layout) {
  const auto fits = [](int box, int places, int stride, int padding, int operand) {
    return places % box == 0 || int64_t{places} * stride - padding >= operand;
  };
  int64_t least = 0;
  for (int w = std::min(kHopperPlaces, p.out_w); w >= 1; w--) {
    if (!fits(w, p.out_w, p.stride_w, p.padding_w, p.width)) continue;
    for (int h = std::min(kHopperPlaces / w, p.out_h); h >= 1; h--) {
      if (!fits(h, p.out_h, p.stride_h, p.padding_h, p.height)) continue;
      const int images = static_cast<int>(std::min<int64_t>(kHopperPlaces / (w * h), layout.images));
      const int64_t steps =
          int64_t{ceil_div(p.out_w, w)} * ceil_div(p.out_h, h) * ceil_div<int64_t>(layout.images, images);
      if (least > 0 && steps >= least) continue;
      least = steps;
      layout.box_w = w, layout.box_h = h, layout.box_images = images;
      layout.steps = static_cast<int>(std::min<int64_t>(steps, INT_MAX / 2));
    }
  }
}

// Columns of a wgmma: a warpgroup's of the tile.
constexpr int hopper_weight_columns(const HopperWeightTile& tile) {
  return tile.filters == 64 ? tile.columns / 2 : tile.columns;
}

constexpr int hopper_weight_stage_bytes(const HopperWeightTile& tile) {
  return (tile.filters + tile.columns) * kHopperPlaces * 2;
}

inline double hopper_weight_cycles(const WeightParams& p, const HopperWeightTile& tile,
                                   const HopperWeightLayout& layout) {
  constexpr double kFlop = 4096, kSharedBytes = 128, kL2Bytes = 30, kMemoryBytes = 20, kEnd = 1500;
  const double columns = double(p.kernel_h) * p.kernel_w * p.channels;
  const double multiply = 2.0 * tile.filters * tile.columns * kHopperPlaces / kFlop;
  const int width = hopper_weight_columns(tile);
  const double products = double(tile.filters) * tile.columns / 64 / width * (kHopperPlaces / 16);
  const double shared = (products * (64 + width) * 32 + hopper_weight_stage_bytes(tile)) / kSharedBytes;
  // What lies beyond filters and columns is not asked for.
  const double rows = double(p.filters) / p.tiles_m / layout.cluster + columns / p.tiles_n;
  const double step =
      std::max({multiply, shared, rows * layout.box_w * layout.box_h * layout.box_images * 2 / kL2Bytes});
  const double end = kEnd + 4.0 * tile.filters * tile.columns / kL2Bytes;
  const double machine = std::max(1, multiprocessor_count());
  const double waves = ceil_div<int64_t>(p.parts * p.tiles_m * p.tiles_n, static_cast<int64_t>(machine));
  return waves * (layout.part_steps * step + end) + p.parts * columns * p.filters * 4 / (kMemoryBytes * machine);
}

// p as weight_params has it, of 16-bit elements in whole chunks.
inline HopperWeightPlan plan_hopper_weight(const WeightParams& given) {
  HopperWeightPlan best{-1, given, {}};
  WeightParams p = given;
  HopperWeightLayout layout{};
  layout.images = p.places / p.out_h / p.out_w;
  if (p.groups != 1 || p.stride_h > kHopperMostStride || p.stride_w > kHopperMostStride ||
      !order_strides(p, layout.images)) {
    return best;
  }
  if (flatten(p)) layout.images = 1;
  plan_boxes(p, layout);
  layout.channel_steps = ceil_div(p.channels, kHopperChannels);
  const int chunks = p.kernel_h * p.kernel_w * layout.channel_steps;
  const double use = double(p.channels) / (layout.channel_steps * kHopperChannels) * p.filters /
                     round_up(p.filters, 64) * p.places / (double(layout.steps) * kHopperPlaces);
  if (use < kHopperWeightLeastUse || layout.images > INT_MAX / 2) return best;
  const int64_t machine = std::max(1, multiprocessor_count());
  double least = 0;
  for (int i = 0; i < kHopperWeightTileCount; i++) {
    const HopperWeightTile& tile = kHopperWeightTiles[i];
    for (layout.cluster = 1; layout.cluster <= std::min<int64_t>(tile.filters / 64, std::min<int64_t>(2, machine));
         layout.cluster++) {
      p.tiles_m = ceil_div(p.filters, tile.filters);
      p.tiles_n = round_up(ceil_div(chunks, tile.columns / kHopperChannels), layout.cluster);
      const int64_t tiles = int64_t{p.tiles_m} * p.tiles_n;
      for (int64_t wave = 1; wave <= kHopperWeightWaves; wave++) {
        const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(wave * machine / tiles, layout.steps));
        layout.part_steps = static_cast<int>(ceil_div<int64_t>(layout.steps, parts));
        p.parts = ceil_div(layout.steps, layout.part_steps);
        if (p.parts * tiles > INT_MAX / 2) continue;
        const double cycles = hopper_weight_cycles(p, tile, layout);
        if (best.tile < 0 || cycles < least) {
          best = {i, p, layout};
          least = cycles;
        }
      }
    }
  }
  return best;
}

// T is __nv_bfloat16 or __half. 0, or an error code for error_string.
template <class T>
int launch_hopper_weight(const HopperWeightPlan& plan, Stream stream);

}  // namespace conv
}  // namespace bigkern
