// The weight's gradient on sm_90a: conv_weight.cuh's sums by TMA and wgmma. It takes that file's parameters, parts and
// ordered sum; conv_hopper_weight_plan.cuh says what it serves and how its tiles and parts are chosen.
//
//   block     filters x columns of (r, s, c), over one part of the steps; 256 consumer threads in two warpgroups, one
//             producer thread in a third, which gives its registers back: 40 for it, 232 for them, of which 192 hold a
//             256 x 192 tile's sums
//   step      64 places, a box of the output: [gradient: filters / 64 chunks][pixels: columns / 64 chunks], a chunk 64
//             filters or 64 channels under one tap of every place, 8 KiB by one TMA
//
//   producer  for every step: wait until the stage is empty -> chunks
//   consumers for every step: wait for the chunks -> 4 x (filters / 64) wgmma -> the step before is empty
//
// Two blocks of a cluster share filters, part and with it the gradient: each loads half of it into both. A stage is
// empty when the warps of both have left it.
//
// Both operands lie as channels_last has them, a place a row of 128 bytes, so that filters and channels run along
// memory: wgmma takes them so ("mn-major") by its transpose bits. 64 of them are one swizzle atom wide, 8 places one
// high: atoms of 8 places follow one another at 1,024 bytes, chunks of 64 at 8 KiB. What TMA fills with zeros beyond
// an image is the padding; what it fills beyond the images, filters and channels adds zero. Where a box has less than
// 64 places the rest of each chunk is zero from the start and stays so.
//
// Strides. A tap meets, through places one after another, every s-th line and column of one phase of the image: for
// each phase there is a tensor map that steps s pixels, of at most 4 x 4. A phase beyond a tiny image is all padding.
//
// Floor: 2 N P Q K C R S FLOP; gradient and pixels read once from memory, from L2 (filters / cluster + columns) 2
// bytes a place and tile; 4 bytes a weight and part written, and read once more by the sum.
//
// The bias' gradient is the product with a column of ones, in the blocks of the first column tile.
//
// Numerics: fp32 sums over a part's places in one order, parts added in theirs: equal inputs give equal bits.
#pragma once

#include "device/hopper.cuh"
#include "kernels/conv_hopper.cuh"
#include "kernels/conv_hopper_weight_plan.cuh"

#include <exception>

namespace bigkern {
namespace conv {

template <int kTile>
struct HopperWeightShape {
  static constexpr HopperWeightTile kSizes = kHopperWeightTiles[kTile];
  static constexpr int kM = kSizes.filters, kN = kSizes.columns, kStages = kSizes.stages;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr bool kSharesColumns = kM == 64;
  static constexpr int kFragments = kSharesColumns ? 1 : kM / 128;  // 64 filters each, of a warpgroup
  static constexpr int kColumns = hopper_weight_columns(kSizes);    // of a warpgroup
  static constexpr int kFilterChunks = kM / 64, kPixelChunks = kN / kHopperChannels;
  static constexpr int kChunks = kFilterChunks + kPixelChunks;
  static constexpr int kChunkBytes = kHopperPlaces * kHopperChannelBytes;
  static_assert(kStages * (kChunks * kChunkBytes + 2 * static_cast<int>(sizeof(Mbarrier))) + 1280 <= kHopperSharedBytes,
                "stages, their barriers, the column of ones, and what aligning them takes");
  static_assert((kM == 64 || kM % 128 == 0) && kColumns % kHopperChannels == 0 && kColumns <= 256, "whole chunks");
};

struct HopperWeightMaps {
  TensorMap grad;
  TensorMap input[kHopperMostStride * kHopperMostStride];  // by phases along height and width
};

// What a tap along an axis adds to a place: it meets the operand's place `stride * (place + first) + phase`.
struct HopperTap {
  int first, phase;

  __device__ __forceinline__ HopperTap(int tap, int stride, int padding, int dilation) {
    const int offset = tap * dilation - padding;
    first = (offset - (offset < 0 ? stride - 1 : 0)) / stride;
    phase = offset - first * stride;
  }
};

// As WeightTile, with the blocks of a cluster along the columns.
struct HopperWeightPlace {
  int m, n;
  int part;

  __device__ __forceinline__ HopperWeightPlace(const WeightParams& p, const HopperWeightLayout& layout) {
    const int block = static_cast<int>(blockIdx.x), tiles_n = p.tiles_n / layout.cluster;
    const int cluster = block / layout.cluster, row = cluster / p.tiles_m;
    m = cluster - row * p.tiles_m;
    part = row / tiles_n;
    n = (row - part * tiles_n) * layout.cluster + block - cluster * layout.cluster;
  }
};

// The columns of a chunk: 64 channels, from the first one, under one tap.
struct HopperWeightChunk {
  int tap, channel;

  __device__ __forceinline__ HopperWeightChunk(const HopperWeightLayout& layout, int chunk) {
    tap = chunk / layout.channel_steps;
    channel = (chunk - tap * layout.channel_steps) * kHopperChannels;
  }
};

}  // namespace conv

template <class T, int kTile>
__global__ void __launch_bounds__(conv::HopperWeightShape<kTile>::kThreads, 1)
    conv_hopper_weight_kernel(const __grid_constant__ conv::HopperWeightMaps maps, const conv::WeightParams p,
                              const conv::HopperWeightLayout layout) {
  if constexpr (kHopper) {
    using namespace conv;
    using Shape = HopperWeightShape<kTile>;
    constexpr int kM = Shape::kM, kStages = Shape::kStages, kFragments = Shape::kFragments;
    constexpr int kColumns = Shape::kColumns, kChunkElements = Shape::kChunkBytes / static_cast<int>(sizeof(T));
    constexpr int kProducerRegisters = 40, kConsumerRegisters = 232, kConsumerWarps = Shape::kConsumers / 32;
    constexpr int kDepth = 16;         // places of a wgmma
    constexpr int kOnes = kDepth * 8;  // 8 columns of them
    constexpr int V = kVecElements<T>;
    SharedMemory shared;
    T* const stages = shared.take<T>(kStages * Shape::kChunks * kChunkElements, 1024);
    T* const ones = shared.take<T>(kOnes, 128);
    Mbarrier* const full = shared.take<Mbarrier>(kStages);
    Mbarrier* const empty = shared.take<Mbarrier>(kStages);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; i++) {
        mbarrier_init(full + i, 1);
        mbarrier_init(empty + i, kConsumerWarps * layout.cluster);
      }
      fence_barrier_init();
    }
    if (threadIdx.x < kOnes) ones[threadIdx.x] = from_float<T>(1.0f);
    const int places = layout.box_w * layout.box_h * layout.box_images;
    const int rest = (kHopperPlaces - places) * (kHopperChannels / V);  // vectors of a chunk that no place fills
    for (int i = threadIdx.x; i < kStages * Shape::kChunks * rest; i += Shape::kThreads) {
      Vec<T, V> zeros{};
      store_vec(stages + (i / rest + 1) * kChunkElements - (i % rest + 1) * V, zeros);
    }
    fence_proxy_async();
    cluster_sync();  // the other block's barriers are there as well
    const HopperWeightPlace tile(p, layout);
    const int begin = tile.part * layout.part_steps;
    const int steps = min(layout.part_steps, layout.steps - begin);
    RingPlace stage;

    if (threadIdx.x >= Shape::kConsumers) {
      set_max_registers_dec<kProducerRegisters>();
      if (threadIdx.x > Shape::kConsumers) {
        cluster_sync();
        return;
      }
      // Of the places under each chunk's tap: the map that has them, and where they lie in it.
      int map[Shape::kPixelChunks], channel[Shape::kPixelChunks];
      int pixel_w[Shape::kPixelChunks], pixel_h[Shape::kPixelChunks], pixel_image[Shape::kPixelChunks];
#pragma unroll
      for (int i = 0; i < Shape::kPixelChunks; i++) {
        const HopperWeightChunk chunk(layout, tile.n * Shape::kPixelChunks + i);
        const int r = chunk.tap / p.kernel_w;
        const HopperTap h(r, p.stride_h, p.padding_h, p.dilation_h);
        const HopperTap w(chunk.tap - r * p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
        const bool inside = r < p.kernel_h && h.phase < p.height && w.phase < p.width;
        map[i] = inside ? h.phase * kHopperMostStride + w.phase : 0;
        channel[i] = chunk.channel;
        pixel_h[i] = h.first, pixel_w[i] = w.first;
        pixel_image[i] = inside ? 0 : static_cast<int>(layout.images);  // zeros
      }
      const int boxes_w = ceil_div(p.out_w, layout.box_w), boxes_h = ceil_div(p.out_h, layout.box_h);
      const int line = begin / boxes_w, images = line / boxes_h;
      int w = (begin - line * boxes_w) * layout.box_w, h = (line - images * boxes_h) * layout.box_h;
      int image = images * layout.box_images;
      for (int step = 0; step < steps; step++) {
        mbarrier_wait_cluster(empty + stage.index, stage.parity ^ 1);
        mbarrier_arrive_expect_tx(full + stage.index, Shape::kChunks * places * kHopperChannelBytes);
        T* const chunks = stages + stage.index * Shape::kChunks * kChunkElements;
#pragma unroll
        for (int i = 0; i < Shape::kFilterChunks; i++) {
          T* const to = chunks + i * kChunkElements;
          const int filter = tile.m * kM + i * 64;
          if (layout.cluster == 1) {
            tma_load(to, maps.grad, full + stage.index, {filter, w, h, image});
          } else if (i % 2 == tile.n % 2) {
            tma_load_multicast(to, maps.grad, full + stage.index, {filter, w, h, image}, 3);
          }
        }
#pragma unroll
        for (int i = 0; i < Shape::kPixelChunks; i++) {
          tma_load(chunks + (Shape::kFilterChunks + i) * kChunkElements, maps.input[map[i]], full + stage.index,
                   {channel[i], w + pixel_w[i], h + pixel_h[i], image + pixel_image[i]});
        }
        stage.next(kStages);
        w += layout.box_w;
        if (w >= p.out_w) {
          w = 0;
          h += layout.box_h;
        }
        if (h >= p.out_h) {
          h = 0;
          image += layout.box_images;
        }
      }
      cluster_sync();
      return;
    }

    set_max_registers_inc<kConsumerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int first_fragment = Shape::kSharesColumns ? 0 : group * kFragments;
    const int first_chunk = Shape::kSharesColumns ? group * (kColumns / kHopperChannels) : 0;
    const uint64_t grad = wgmma_descriptor(stages + first_fragment * kChunkElements, Shape::kChunkBytes, 1024, 128);
    const uint64_t pixels =
        wgmma_descriptor(stages + (Shape::kFilterChunks + first_chunk) * kChunkElements, Shape::kChunkBytes, 1024, 128);
    const uint64_t column = wgmma_descriptor(ones, 128, 128, 0);
    float sums[kFragments][kColumns / 2], bias[kFragments][4];
#pragma unroll
    for (int i = 0; i < kFragments; i++) {
#pragma unroll
      for (int j = 0; j < kColumns / 2; j++) sums[i][j] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) bias[i][j] = 0.0f;
    }
    const auto multiply = [&](auto sums_bias) {
      int held = -1;  // the stage that products in flight may still read
      for (int step = 0; step < steps; step++) {
        mbarrier_wait(full + stage.index, stage.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kHopperPlaces / kDepth; k++) {
          const int offset = stage.index * Shape::kChunks * Shape::kChunkBytes + k * kDepth * kHopperChannelBytes;
#pragma unroll
          for (int i = 0; i < kFragments; i++) {
            const uint64_t filters = grad + (offset + i * Shape::kChunkBytes) / 16;
            wgmma_ss<T, kColumns, true, true>(sums[i], filters, pixels + offset / 16, true);
            if constexpr (decltype(sums_bias)::value) wgmma_ss<T, 8, true, false>(bias[i], filters, column, true);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (held >= 0 && lane < layout.cluster) mbarrier_arrive_cluster(empty + held, lane);
        held = stage.index;
        stage.next(kStages);
      }
#pragma unroll
      for (int i = 0; i < kFragments; i++) {
        wgmma_wait<0>(sums[i]);
        wgmma_wait<0>(bias[i]);
      }
      cluster_arrive();  // nothing is asked of the other block any more
    };
    const bool sums_bias = p.bias_sums != nullptr && tile.n == 0;
    if (sums_bias) {
      multiply(std::true_type{});
    } else {
      multiply(std::false_type{});
    }

    const int taps = p.kernel_h * p.kernel_w;
#pragma unroll
    for (int i = 0; i < kFragments; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int filter = tile.m * kM + (first_fragment + i) * 64 + warp % 4 * 16 + half * 8 + lane / 4;
        if (filter >= p.filters) continue;
        const int64_t row = int64_t{tile.part} * p.filters + filter;
        if (sums_bias && first_chunk == 0 && lane % 4 == 0) p.bias_sums[row] = bias[i][half * 2];
#pragma unroll
        for (int c = 0; c < kColumns / kHopperChannels; c++) {
          const HopperWeightChunk chunk(layout, tile.n * Shape::kPixelChunks + first_chunk + c);
          if (chunk.tap >= taps) continue;
          float* const to = p.sums + (row * taps + chunk.tap) * p.channels + chunk.channel;
#pragma unroll
          for (int j = 0; j < kHopperChannels / 8; j++) {
            const int at = j * 8 + lane % 4 * 2;
            const float* const pair = sums[i] + (c * 8 + j) * 4 + half * 2;
            if (chunk.channel + at < p.channels) store_vec(to + at, Vec<float, 2>{pair[0], pair[1]});
          }
        }
      }
    }
    cluster_wait();  // it may still arrive here
  }
}

namespace conv {

template <class T, int kTile>
int launch_hopper_weight_tile(const HopperWeightPlan& plan, const HopperWeightMaps& maps, Stream stream) {
  using Shape = HopperWeightShape<kTile>;
  const WeightParams& p = plan.params;
  LaunchConfig config{dim3(static_cast<unsigned>(p.parts * p.tiles_m * p.tiles_n)), dim3(Shape::kThreads),
                      kHopperSharedBytes, stream};
  config.cluster = plan.layout.cluster;
  return launch(conv_hopper_weight_kernel<T, kTile>, config, maps, p, plan.layout);
}

// Throws where a tensor map cannot be made.
template <class T>
HopperWeightMaps hopper_weight_maps(const HopperWeightPlan& plan) {
  constexpr uint64_t kBytes = sizeof(T);
  constexpr uint32_t kOnes[4] = {1, 1, 1, 1};
  const WeightParams& p = plan.params;
  const HopperWeightLayout& layout = plan.layout;
  const uint32_t box[4] = {kHopperChannels, static_cast<uint32_t>(layout.box_w), static_cast<uint32_t>(layout.box_h),
                           static_cast<uint32_t>(layout.box_images)};
  HopperWeightMaps maps{};
  const uint64_t places[4] = {static_cast<uint64_t>(p.filters), static_cast<uint64_t>(p.out_w),
                              static_cast<uint64_t>(p.out_h), static_cast<uint64_t>(layout.images)};
  const uint64_t strides[3] = {p.grad_pixel * kBytes, p.grad_row * kBytes, p.grad_image * kBytes};
  maps.grad = make_tensor_map<T>(p.grad, 4, places, strides, box, kOnes, kHopperChannelBytes);
  for (int h = 0; h < std::min(p.stride_h, p.height); h++) {
    for (int w = 0; w < std::min(p.stride_w, p.width); w++) {
      const uint64_t pixels[4] = {
          static_cast<uint64_t>(p.channels), static_cast<uint64_t>(ceil_div(p.width - w, p.stride_w)),
          static_cast<uint64_t>(ceil_div(p.height - h, p.stride_h)), static_cast<uint64_t>(layout.images)};
      const uint64_t steps[3] = {p.stride_w * p.input_pixel * kBytes, p.stride_h * p.input_row * kBytes,
                                 p.input_image * kBytes};
      const T* const first = static_cast<const T*>(p.input) + h * p.input_row + w * p.input_pixel;
      maps.input[h * kHopperMostStride + w] =
          make_tensor_map<T>(first, 4, pixels, steps, box, kOnes, kHopperChannelBytes);
    }
  }
  return maps;
}

template <class T>
int launch_hopper_weight(const HopperWeightPlan& plan, Stream stream) {
  constexpr int kErrorInvalidValue = 1;  // cudaErrorInvalidValue
  HopperWeightMaps maps;
  try {
    maps = hopper_weight_maps<T>(plan);
  } catch (const std::exception&) {
    return kErrorInvalidValue;
  }
  switch (plan.tile) {
    case 0:
      return launch_hopper_weight_tile<T, 0>(plan, maps, stream);
    case 1:
      return launch_hopper_weight_tile<T, 1>(plan, maps, stream);
    case 2:
      return launch_hopper_weight_tile<T, 2>(plan, maps, stream);
    default:
      return launch_hopper_weight_tile<T, 3>(plan, maps, stream);
  }
}

}  // namespace conv
}  // namespace bigkern
