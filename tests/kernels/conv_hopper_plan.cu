// What convolution's Hopper kernel plans for a shape, and what its tiles then load, without running any.
#include "kernels/conv.cuh"
#include "kernels/conv_hopper.cuh"

using namespace bigkern;
using namespace bigkern::conv;

namespace {

template <int kTile>
int64_t most_pixels(const HopperPlan& plan) {
  const GemmParams& p = plan.params;
  int64_t most = 0;
  for (int block = 0; block < plan.layout.tiles; block++) {
    const TilePlace tile(p, block);
    if (!has_places<HopperShape<kTile>>(p, plan.layout, tile)) continue;
    const HopperRun run = HopperRun::of_tile<HopperShape<kTile>>(p, plan.layout, tile);
    for_each_slab(p, tile.height.first_place, tile.width.first_place,
                  [&](const HopperPhase& height, const HopperPhase&, int) {
                    most = std::max<int64_t>(most, run.lines((height.taps - 1) * height.step) * plan.layout.pitch);
                  });
  }
  return most;
}

}  // namespace

// found: tile, rows, pixels in the ring, strips, pitch, slab, slabs, tiles, the most pixels that a tile loads to a
// slab, blocks that share pixels.
extern "C" void conv_hopper_plan(const ConvShape* shape, const ConvPool* pool, int transposed, int64_t* found) {
  const void* const aligned = reinterpret_cast<const void*>(4096);
  const int channels = transposed ? shape->filters : shape->channels;
  const ConvTensor images = transposed ? dense_channels_last(aligned, channels, shape->out_h, shape->out_w)
                                       : dense_channels_last(aligned, channels, shape->height, shape->width);
  const ConvTensor weight = dense_channels_last(aligned, channels, shape->kernel_h, shape->kernel_w);
  GemmParams p = gemm_params(*shape, transposed, images, weight);
  if (pool->kernel_h > 0) plan_pool(*pool, kTileRows, p);
  const HopperPlan plan = plan_hopper(p, true);
  const HopperLayout& layout = plan.layout;
  if (plan.tile < 0) {
    found[0] = -1;
    return;
  }
  const HopperTile& tile = kHopperTiles[plan.tile];
  const int64_t most = plan.tile == 0   ? most_pixels<0>(plan)
                       : plan.tile == 1 ? most_pixels<1>(plan)
                                        : most_pixels<2>(plan);
  const int64_t values[] = {plan.tile,     tile.rows,    hopper_ring_pixels(tile, layout.staged),
                            layout.strips, layout.pitch, layout.slab,
                            layout.slabs,  layout.tiles, most,
                            layout.cluster};
  std::copy(std::begin(values), std::end(values), found);
}
