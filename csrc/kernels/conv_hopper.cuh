// Implicit GEMM of a convolution on sm_90a: images and filters by TMA, products by wgmma. It takes conv_gemm.cuh's
// parameters and epilogue; conv_hopper_plan.cuh says what it serves and how its tiles are chosen.
//
//   block     persistent over tiles of rows x filters; 256 consumer threads in two warpgroups, one producer thread in a
//             third, which gives its registers back: 40 for it, 232 for them, of which 128 hold a 256 x 128 tile's sums
//   slab      the pixels that a tile's places meet in one image phase and 64 channels, loaded once, one TMA a line
//   step      one filter tap of the slab: 64 channels of the tile's filters by TMA, 4 x (rows / 128) wgmma a warpgroup
//
//   producer  for every slab:  wait until its place in the ring is empty -> lines of pixels
//                 for every tap: wait until the stage is empty -> filters
//   consumers for every slab:  wait for the pixels
//                 for every tap: ldmatrix the pixels under the tap -> wait for the filters -> wgmma, A in registers
//             their rows' results from registers to memory
//
// The end of a tile. Each warpgroup has half of the tile's rows and stores them on its own, without a barrier or shared
// memory, while the other multiplies: four lanes exchange their sums so that each stores 16 bytes, 64 of a place. The
// second warpgroup starts as many steps behind the first as the rings hold (4 of a 256 x 128 tile: 2,048 cycles of it
// alone, which gets all of the tensor cores), and equal work keeps it there. So while the first stores, 2,700 cycles by
// the plan's model, the second still multiplies those steps, and then stores beside the first one's next tile;
// the producer is ahead of both. Two warpgroups by turns at tiles of their own would hide all of it, but at 128 x 128,
// which is what registers hold, would ask L2 for 32 bytes of filters a cycle, of the 30 there are.
//
// Clusters. Two blocks with the same places and neighbouring filters share the pixels: each loads every other line into
// both (multicast), so that L2 is asked half as often. Before a slab's lines are issued, each producer grants the other
// its own place in the ring, which its consumers have left, and waits for the same; lines count on either block's
// barrier of that slab. A block needs no barrier to end: it has waited for every grant and every line that the other
// sends it. It pays where L2 binds, by the model of conv_hopper_plan.cuh: 1 x 1 and strides.
//
// A tile's rows are a raster run of output places, over lines and images, so that no product is wasted on a border: the
// pixels are addressed by ldmatrix, row by row, and any order of places will do, pooling windows too. All taps of a
// slab read the same pixels, so L2 is asked for every pixel once and a little for the borders, where a copy for each
// tap would ask R S times (modelled on 3 x 3 of 256 channels: 21 bytes a cycle of the 30 there are, instead of 48).
// What TMA fills with zeros beyond an image is the padding.
//
// Strides. A forward pass of stride s meets, through each of its taps, pixels of one phase of the image only (every
// s-th line and column); phase by phase it is a convolution of stride 1 whose slabs are a subsampled image, by a tensor
// map that steps s pixels. The input gradient is one of stride 1 for each parity of the result, as conv_gemm.cuh has
// it, with the same filters, their channels exchanged. Both load each pixel once, as stride 1 does.
//
// Shared memory, 227 KiB: stages of filters (80 KiB of a 256 x 128 tile), the rest slabs, at least two; where results
// are staged, for pooling, places side by side (NCHW) or single elements, 40 KiB less, which hold 32 filters in fp32 at
// a time for conv_epilogue.cuh; both warpgroups then end the tile together. Pixel i of a slab is 128 bytes at 128 i,
// whose 16-byte chunk c the swizzle puts at c ^ (i % 8). Slabs start at multiples of 1,024 bytes but lines do not: this
// holds if TMA swizzles by shared memory's own address bits also for tiles that start within a swizzle atom, which
// tests/device checks on a GPU. Eight lanes of ldmatrix read eight pixels in a row: every bank once; where the run
// breaks at a line's end, a few meet.
//
// A tile's places are found by products with what the host prepared (HopperDivisor), not divisions.
//
// Numerics: as conv_gemm.cuh, fp32 sums in one order: phases, channels by 64, taps.
#pragma once

#include "device/hopper.cuh"
#include "kernels/conv_hopper_plan.cuh"

#include <exception>

namespace bigkern {
namespace conv {

template <int kTile>
struct HopperShape {
  static constexpr HopperTile kSizes = kHopperTiles[kTile];
  static constexpr int kM = kSizes.rows, kN = kSizes.filters, kStages = kSizes.stages;
  static constexpr bool kClusters = kSizes.cluster > 1;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kFragments = kM / 128;  // 64 rows each, of a warpgroup
  static_assert(kM % 128 == 0 && kM <= kConsumers && kN % kHopperSlice == 0, "whole fragments, a thread a row");
};

// What the epilogue sees: all rows of a few filters.
template <class Shape>
struct HopperResults {
  static constexpr int kM = Shape::kM, kN = kHopperSlice, kThreads = Shape::kConsumers;
};

struct HopperMaps {
  TensorMap images[kHopperMostStride];  // by the phase along the width
  TensorMap filters;
};

// A place in a ring of shared memory and its turn.
struct RingPlace {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next(int size) {
    if (++index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ HopperDivisor height_divisor(const GemmParams& p, const HopperLayout& layout,
                                                        const TilePlace& tile) {
  const int result = p.pool_tile == PoolTile::kWindows ? 0 : p.height.result;
  return tile.height.places * tile.height.place_step < result ? layout.by_rest : layout.by_height;
}

// The output places of a tile: a run over lines of one image (or strip of one) after another.
struct HopperRun {
  int image;              // images * strips
  int line, column;       // that the slab starts with
  int start;              // places of the first line that are before the run; rows of pooled tiles do not go by it
  int following;          // images after the first
  int first, full, last;  // output lines of the first image, of one between, of the last

  template <class Shape>
  static __device__ __forceinline__ HopperRun of_tile(const GemmParams& p, const HopperLayout& layout,
                                                      const TilePlace& tile) {
    if (p.pool_tile == PoolTile::kBox) {
      const Place corner = locate<Shape>(p, tile, 0);
      const int lines = (p.tile_h - 1) * p.pool.stride_h + p.pool.kernel_h;
      return {static_cast<int>(corner.image), corner.h, corner.w, 0, 0, lines, lines, lines};
    }
    const bool pooled = p.pool_tile == PoolTile::kWindows;
    const int count = pooled ? p.windows : Shape::kM, width = layout.strip_width;
    const int height = pooled ? p.pool.out_h : tile.height.places;
    const int unit = pooled ? p.pool.stride_h : 1, cover = pooled ? p.pool.kernel_h : 1;
    const int64_t begin = tile.m * count, end = min(begin + count, p.images * layout.strips * height * width) - 1;
    const HopperDivisor by_height = height_divisor(p, layout, tile);
    const int64_t line0 = layout.by_width(begin), line1 = layout.by_width(end);
    const int64_t image0 = by_height(line0), image1 = by_height(line1);
    const int begins = static_cast<int>(line0 - image0 * height), ends = static_cast<int>(line1 - image1 * height);
    HopperRun run;
    run.image = static_cast<int>(image0);
    run.line = begins * unit;
    run.column = 0;
    run.start = static_cast<int>(begin - line0 * width);
    run.following = static_cast<int>(image1 - image0);
    run.first = ((run.following > 0 ? height - 1 : ends) - begins) * unit + cover;
    run.full = (height - 1) * unit + cover;
    run.last = ends * unit + cover;
    return run;
  }

  // Lines to be loaded: each image's, and those its last taps reach.
  __device__ __forceinline__ int lines(int reach) const {
    return following == 0 ? first + reach : first + last + (following - 1) * full + (following + 1) * reach;
  }
};

// A row of the tile: its place, and where the pixel that its first tap meets lies in a slab: `pixel`, and `images`
// times the lines that taps reach.
struct HopperRow {
  Place place;
  int pixel, images;
};

template <class Shape>
__device__ __forceinline__ HopperRow hopper_row(const GemmParams& p, const HopperLayout& layout, const TilePlace& tile,
                                                const HopperRun& run, int row) {
  if (p.pool_tile != PoolTile::kNone) {
    const Place place = locate<Shape>(p, tile, row);
    const int image = static_cast<int>(place.image - run.image);
    const int line = image == 0 ? place.h - run.line : run.first + (image - 1) * run.full + place.h;
    return {place, line * layout.pitch + place.w - run.column, image};
  }
  // From the run's first line on, so that all but the quotients is small.
  const int index = run.start + row, down = static_cast<int>(layout.by_width(index));
  const int column = index - down * layout.strip_width, line = run.line + down;
  const int image = static_cast<int>(height_divisor(p, layout, tile)(line)), strip = run.image + image;
  const int whole = static_cast<int>(layout.by_strips(strip));
  const int h = line - image * tile.height.places, w = (strip - whole * layout.strips) * layout.strip_width + column;
  const int from = image == 0 ? h - run.line : run.first + (image - 1) * run.full + h;
  return {{whole, h, w, whole < p.images && w < tile.width.places}, from * layout.pitch + column, image};
}

// The 16 sums that a lane stores in one of its turns, of two rows. By a jump: predicated, all would be moved each time.
template <int kFragments, int kSums>
__device__ __forceinline__ void select_turn(const float (&sums)[kFragments][kSums], int turn, float (&values)[2][8]) {
  const auto select = [&](auto c) {
    if constexpr (c.value < kFragments * kSums / 16) {
#pragma unroll
      for (int j = 0; j < 16; j++) {
        values[j / 2 % 2][j / 4 * 2 + j % 2] = sums[c.value % kFragments][c.value / kFragments * 16 + j];
      }
    }
  };
  static_assert(kFragments * kSums <= 8 * 16, "eight turns");
  switch (turn) {
    case 0:
      return select(std::integral_constant<int, 0>());
    case 1:
      return select(std::integral_constant<int, 1>());
    case 2:
      return select(std::integral_constant<int, 2>());
    case 3:
      return select(std::integral_constant<int, 3>());
    case 4:
      return select(std::integral_constant<int, 4>());
    case 5:
      return select(std::integral_constant<int, 5>());
    case 6:
      return select(std::integral_constant<int, 6>());
    default:
      return select(std::integral_constant<int, 7>());
  }
}

// Stores this warp's rows, 32 filters of 16 rows at a turn. places: those of the lane's rows.
template <class T, int kFragments, int kSums>
__device__ __forceinline__ void store_sums(const GemmParams& p, const StoreOutput<T>& epilogue,
                                           const float (&sums)[kFragments][kSums], const int64_t* places,
                                           int first_filter) {
  constexpr int kTurns = kFragments * kSums / 16;
  uint4 added[2], next[2];  // of the residual, a turn ahead
#pragma unroll
  for (int half = 0; half < 2; half++) next[half] = epilogue.load_quad(p, places[half * 8], first_filter);
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn++) {
    const int first = first_filter + turn / kFragments * kHopperSlice, at = turn % kFragments * 64;
    if (first >= p.filters) break;
    const int ahead = min(turn + 1, kTurns - 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      added[half] = next[half];
      next[half] = epilogue.load_quad(p, places[ahead % kFragments * 64 + half * 8],
                                      first_filter + ahead / kFragments * kHopperSlice);
    }
    float shift[8], values[2][8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int filter = first + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
      shift[j] = epilogue.bias != nullptr && filter < p.filters ? to_float(epilogue.bias[filter]) : 0.0f;
    }
    select_turn(sums, turn, values);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      epilogue.store_quad(p, places[at + half * 8], first, shift, added[half], values[half]);
    }
  }
}

// A parity may have no places, or fewer tiles than the largest one.
template <class Shape>
__device__ __forceinline__ bool has_places(const GemmParams& p, const HopperLayout& layout, const TilePlace& tile) {
  return !p.transposed || (tile.width.places > 0 &&
                           tile.m * Shape::kM < p.images * layout.strips * tile.height.places * layout.strip_width);
}

// visit(phase along the height, along the width, first channel) for every slab of a tile of these parities, in order.
template <class Visit>
__device__ __forceinline__ void for_each_slab(const GemmParams& p, int parity_h, int parity_w, Visit&& visit) {
  const int end_h = p.transposed ? parity_h + 1 : p.height.stride, end_w = p.transposed ? parity_w + 1 : p.width.stride;
  for (int h = parity_h; h < end_h; h++) {
    const HopperPhase phase_h = hopper_phase(p.height, p.transposed, h);
    if (phase_h.taps == 0) continue;
    for (int w = parity_w; w < end_w; w++) {
      const HopperPhase phase_w = hopper_phase(p.width, p.transposed, w);
      if (phase_w.taps == 0) continue;
      for (int channel = 0; channel < p.channels; channel += kHopperChannels) visit(phase_h, phase_w, channel);
    }
  }
}

}  // namespace conv

template <class T, int kTile>
__global__ void __launch_bounds__(conv::HopperShape<kTile>::kThreads, 1)
    conv_hopper_kernel(const __grid_constant__ conv::HopperMaps maps, const conv::GemmParams p,
                       const conv::HopperLayout layout, const conv::StoreOutput<T> epilogue) {
  if constexpr (kHopper) {
    using namespace conv;
    using Shape = HopperShape<kTile>;
    using Results = HopperResults<Shape>;
    constexpr int kFragments = Shape::kFragments, kN = Shape::kN, kStages = Shape::kStages;
    constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
    SharedMemory shared;
    T* const filters = shared.take<T>(kStages * kN * kHopperChannels, 1024);
    int64_t* const places = shared.take<int64_t>(Shape::kM);
    Mbarrier* const slab_full = shared.take<Mbarrier>(kHopperMostSlabs);
    Mbarrier* const slab_empty = shared.take<Mbarrier>(kHopperMostSlabs);
    Mbarrier* const slab_granted = shared.take<Mbarrier>(kHopperMostSlabs);
    Mbarrier* const stage_full = shared.take<Mbarrier>(kStages);
    Mbarrier* const stage_empty = shared.take<Mbarrier>(kStages);
    T* const slabs = shared.take<T>(hopper_ring_pixels(Shape::kSizes, true) * kHopperChannels, 1024);
    float* const results = shared.take<float>(Results::kM * kResultPitch<Results>);  // or slabs, where none is staged
    constexpr int kConsumerWarps = Shape::kConsumers / 32;
    const bool clustered = Shape::kClusters && layout.cluster > 1;
    if (threadIdx.x == 0) {
      for (int i = 0; i < layout.slabs; i++) {
        mbarrier_init(slab_full + i, 1);
        mbarrier_init(slab_empty + i, kConsumerWarps);
        mbarrier_init(slab_granted + i, 1);
      }
      for (int i = 0; i < kStages; i++) {
        mbarrier_init(stage_full + i, 1);
        mbarrier_init(stage_empty + i, kConsumerWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (clustered) cluster_sync();  // the other's barriers stand
    RingPlace slab, stage;

    if (threadIdx.x >= Shape::kConsumers) {
      set_max_registers_dec<kProducerRegisters>();
      if (threadIdx.x > Shape::kConsumers) return;
      constexpr uint16_t kBothBlocks = 3;
      const uint32_t partner = clustered ? cluster_rank() ^ 1 : 0;
      for (int block = blockIdx.x; block < layout.tiles; block += gridDim.x) {
        const TilePlace tile(p, block);
        if (!has_places<Shape>(p, layout, tile)) continue;
        const HopperRun run = HopperRun::of_tile<Shape>(p, layout, tile);
        for_each_slab(
            p, tile.height.first_place, tile.width.first_place,
            [&](const HopperPhase& height, const HopperPhase& width, int channel) {
              const int reach = (height.taps - 1) * height.step;
              mbarrier_wait(slab_empty + slab.index, slab.parity ^ 1);
              if (clustered) {  // each tells the other that it may write here, and waits to be told so
                mbarrier_arrive_cluster(slab_granted + slab.index, partner);
                mbarrier_wait_cluster(slab_granted + slab.index, slab.parity);
              }
              mbarrier_arrive_expect_tx(slab_full + slab.index, run.lines(reach) * layout.pitch * kHopperChannelBytes);
              T* line = slabs + slab.index * layout.slab * kHopperChannels;
              uint32_t turn = 0;  // of lines, which the two blocks load by turns
              for (int i = 0; i <= run.following; i++) {
                const int image = static_cast<int>(layout.by_strips(run.image + i));
                const int strip = run.image + i - image * layout.strips;
                const int column = run.column + strip * layout.strip_width + width.origin;
                const int begin = (i == 0 ? run.line : 0) + height.origin;
                const int end = begin + (i == 0 ? run.first : i == run.following ? run.last : run.full) + reach;
                for (int h = begin; h < end; h++) {
                  const int corner[4] = {channel, column, h * height.stride + height.place, image};
                  if (!clustered) {
                    tma_load(line, maps.images[width.place], slab_full + slab.index, corner);
                  } else if (turn++ % 2 == partner) {
                    tma_load_multicast(line, maps.images[width.place], slab_full + slab.index, corner, kBothBlocks);
                  }
                  line += layout.pitch * kHopperChannels;
                }
              }
              slab.next(layout.slabs);
              for (int r = 0; r < height.taps; r++) {
                for (int s = 0; s < width.taps; s++) {
                  mbarrier_wait(stage_empty + stage.index, stage.parity ^ 1);
                  mbarrier_arrive_expect_tx(stage_full + stage.index, kN * kHopperChannelBytes);
                  tma_load(filters + stage.index * kN * kHopperChannels, maps.filters, stage_full + stage.index,
                           {channel, width.first_tap + s * width.tap_step, height.first_tap + r * height.tap_step,
                            tile.n * kN});
                  stage.next(kStages);
                }
              }
            });
      }
      return;
    }

    set_max_registers_inc<kConsumerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp / 4 * kFragments * 64 + warp % 4 * 16;  // of this warp in the first fragment
    const uint64_t filters_descriptor = wgmma_descriptor(filters, 16, 1024, kHopperChannelBytes);
    float sums[kFragments][kN / 2];
    uint32_t pixels[2][kFragments][2][4];  // fragments of 32 channels, one half of the step multiplied, one loaded
    // The second warpgroup starts once the first is as far ahead as the rings let it, and so stays behind.
    constexpr int kStagedBarrier = 1, kLeadBarrier = 2;
    bool leads = !layout.staged && warp < 4;
    if (!layout.staged && warp >= 4) named_barrier(kLeadBarrier, Shape::kConsumers);
    for (int block = blockIdx.x; block < layout.tiles; block += gridDim.x) {
      const TilePlace tile(p, block);
      if (!has_places<Shape>(p, layout, tile)) continue;
      const HopperRun run = HopperRun::of_tile<Shape>(p, layout, tile);
      // Where the row that this lane gives ldmatrix lies in a slab, and how far on for each line that taps reach: an
      // image's lines are followed by those.
      int pixel[kFragments], per_reach[kFragments];
#pragma unroll
      for (int i = 0; i < kFragments; i++) {
        const int in_tile = first_row + i * 64 + lane % 16;
        const HopperRow row = hopper_row<Shape>(p, layout, tile, run, in_tile);
        const Place& place = row.place;
        pixel[i] = place.valid ? row.pixel : 0;
        per_reach[i] = place.valid ? row.images * layout.pitch : 0;
        if (lane < 16) {
          const int64_t line =
              place.image * p.height.result + tile.height.first_place + place.h * tile.height.place_step;
          places[in_tile] =
              place.valid ? line * p.width.result + tile.width.first_place + place.w * tile.width.place_step : -1;
        }
#pragma unroll
        for (int j = 0; j < kN / 2; j++) sums[i][j] = 0.0f;
      }

      int held = -1;  // the stage that products in flight may still read
      for_each_slab(
          p, tile.height.first_place, tile.width.first_place,
          [&](const HopperPhase& height, const HopperPhase& width, int channel) {
            const int reach = (height.taps - 1) * height.step;
            const bool halves = p.channels - channel > kHopperChannels / 2;
            mbarrier_wait(slab_full + slab.index, slab.parity);
            const T* const loaded = slabs + slab.index * layout.slab * kHopperChannels;
            for (int r = 0; r < height.taps; r++) {
              for (int s = 0; s < width.taps; s++) {
                const int tap = r * height.step * layout.pitch + s * width.step;
                if (leads && (stage.index == kStages - 1 || slab.index == layout.slabs - 1)) {
                  named_barrier_arrive(kLeadBarrier, Shape::kConsumers);
                  leads = false;
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                  if (half == 1 && !halves) {
                    wgmma_wait<0>();
                    continue;
                  }
#pragma unroll
                  for (int i = 0; i < kFragments; i++) {
                    const int at = pixel[i] + per_reach[i] * reach + tap;
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                      const int chunk = half * 4 + k * 2 + lane / 16;
                      ldmatrix_x4(pixels[half][i][k], loaded + at * kHopperChannels + ((chunk ^ (at & 7)) << 3));
                    }
                  }
                  if (half == 0) mbarrier_wait(stage_full + stage.index, stage.parity);
                  wgmma_fence();
#pragma unroll
                  for (int k = 0; k < 2; k++) {
                    const int offset = stage.index * kN * kHopperChannelBytes + (half * 2 + k) * 32;
#pragma unroll
                    for (int i = 0; i < kFragments; i++) {
                      wgmma_rs<T, kN>(sums[i], pixels[half][i][k], filters_descriptor + offset / 16, true);
                    }
                  }
                  wgmma_commit();
                  wgmma_wait<1>();  // of the half before, whose registers are loaded next, and so of the step before
                  if (half == 0) {
                    if (held >= 0 && lane == 0) mbarrier_arrive(stage_empty + held);
                    held = stage.index;
                  }
                }
                stage.next(kStages);
              }
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(slab_empty + slab.index);  // its pixels are in registers
            slab.next(layout.slabs);
          });
      wgmma_wait<0>();
      if (held >= 0 && lane == 0) mbarrier_arrive(stage_empty + held);

      TilePlace part(p, block);  // again, so that nobody holds it all the while
      const int first_filter = part.n * kN;
      if (!layout.staged) {
        __syncwarp();  // the warp's places are there
        store_sums(p, epilogue, sums, places + first_row + lane / 4, first_filter);
        __syncwarp();  // and may be overwritten
        continue;
      }
      part.n *= kN / kHopperSlice;
#pragma unroll 1
      for (int slice = 0; slice * kHopperSlice < min(kN, p.filters - first_filter); slice++, part.n++) {
#pragma unroll
        for (int j = 0; j < kN / 8; j++) {
          if (j / (kHopperSlice / 8) != slice) continue;
          const int col = j * 8 % kHopperSlice + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < kFragments; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int row = first_row + i * 64 + half * 8 + lane / 4;
              const float left = sums[i][j * 4 + half * 2], right = sums[i][j * 4 + half * 2 + 1];
              if (epilogue.plane > 0) {
                PutColumns<Results>{results}(row, col, left, right);
              } else {
                PutRows<Results>{results}(row, col, left, right);
              }
            }
          }
        }
        named_barrier(kStagedBarrier, Shape::kConsumers);  // all rows of the slice are there
        if (epilogue.plane > 0) {
          epilogue.template store_planes<Results>(p, part, results, places);
        } else {
          epilogue.template store<Results>(p, part, results, places);
        }
        named_barrier(kStagedBarrier, Shape::kConsumers);  // and may be overwritten, the places too
      }
    }
    if (leads) named_barrier_arrive(kLeadBarrier, Shape::kConsumers);
  }
}

namespace conv {

template <class T, int kTile>
int launch_hopper_tile(const HopperPlan& plan, const HopperMaps& maps, const StoreOutput<T>& epilogue, Stream stream) {
  using Shape = HopperShape<kTile>;
  const int cluster = plan.layout.cluster;
  const int most = std::max(cluster, multiprocessor_count() / cluster * cluster);
  const unsigned blocks = static_cast<unsigned>(std::min(plan.layout.tiles, most));
  LaunchConfig config{dim3(blocks), dim3(Shape::kThreads), kHopperSharedBytes, stream};
  config.cluster = static_cast<unsigned>(cluster);
  return launch(conv_hopper_kernel<T, kTile>, config, maps, plan.params, plan.layout, epilogue);
}

// Throws where a tensor map cannot be made.
template <class T>
HopperMaps hopper_maps(const HopperPlan& plan) {
  constexpr uint64_t kBytes = sizeof(T);
  constexpr uint32_t kOnes[4] = {1, 1, 1, 1};
  const GemmParams& p = plan.params;
  HopperMaps maps{};
  const int phases = p.transposed ? 1 : p.width.stride;
  for (int phase = 0; phase < std::min(phases, p.width.operand); phase++) {
    const uint64_t dims[4] = {static_cast<uint64_t>(p.channels),
                              static_cast<uint64_t>(ceil_div(p.width.operand - phase, phases)),
                              static_cast<uint64_t>(p.height.operand), static_cast<uint64_t>(p.images)};
    const uint64_t strides[3] = {phases * p.a_pixel * kBytes, p.a_row * kBytes, p.a_image * kBytes};
    const uint32_t box[4] = {kHopperChannels, static_cast<uint32_t>(plan.layout.pitch), 1, 1};
    const T* const image = static_cast<const T*>(p.a) + phase * p.a_pixel;
    maps.images[phase] = make_tensor_map<T>(image, 4, dims, strides, box, kOnes, kHopperChannelBytes);
  }
  const uint64_t dims[4] = {static_cast<uint64_t>(p.channels), static_cast<uint64_t>(p.width.taps),
                            static_cast<uint64_t>(p.height.taps), static_cast<uint64_t>(p.filters)};
  const uint64_t strides[3] = {p.b_tap * kBytes, p.b_row * kBytes, p.b_filter * kBytes};
  const uint32_t box[4] = {kHopperChannels, 1, 1, static_cast<uint32_t>(kHopperTiles[plan.tile].filters)};
  maps.filters = make_tensor_map<T>(p.b, 4, dims, strides, box, kOnes, kHopperChannelBytes);
  return maps;
}

template <class T>
int launch_hopper(const HopperPlan& plan, const StoreOutput<T>& epilogue, Stream stream) {
  constexpr int kErrorInvalidValue = 1;  // cudaErrorInvalidValue
  HopperMaps maps;
  try {
    maps = hopper_maps<T>(plan);
  } catch (const std::exception&) {
    return kErrorInvalidValue;
  }
  switch (plan.tile) {
    case 0:
      return launch_hopper_tile<T, 0>(plan, maps, epilogue, stream);
    case 1:
      return launch_hopper_tile<T, 1>(plan, maps, epilogue, stream);
    default:
      return launch_hopper_tile<T, 2>(plan, maps, epilogue, stream);
  }
}

}  // namespace conv
}  // namespace bigkern
