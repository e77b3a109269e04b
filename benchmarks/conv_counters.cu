// Records what convolution's launchers launch instead of (or besides) running it: benchmarks/conv_counters.py turns the
// records into its table, and tests/benchmarks/test_conv_counters.py holds them against what the emulator counts.
#include "device/device.cuh"

#include <atomic>
#include <memory>
#include <vector>

namespace bigkern {

static std::atomic<uint64_t> products{0};
static bool runs = false;

inline void counted_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  products += threadIdx.x % 32 == 0;  // once a warp
  mma_m16n8k16_bf16(d, a, b);
}

template <class... Params, class... Args>
int recorded_launch(void (*kernel)(Params...), const LaunchConfig& config, Args... args);

}  // namespace bigkern

#define mma_m16n8k16_bf16 counted_product
#define launch recorded_launch
#include "kernels/conv.cuh"
#undef launch
#undef mma_m16n8k16_bf16

namespace bigkern {

using namespace conv;
using T = __nv_bfloat16;

// Counted is what GPUs other than Hopper run.
template <>
int conv::launch_hopper<T>(const HopperPlan&, const StoreOutput<T>&, Stream) {
  return 1;
}
template <>
int conv::launch_hopper_weight<T>(const HopperWeightPlan&, Stream) {
  return 1;
}

// What the kernels of one call ask of the machine: products of 16 x 8 x 16 issued by warps, bytes of global memory
// loaded and stored by the kernels' instructions (what the caches serve included), launches.
struct Record {
  int64_t products, loads, stores, launches;
  int64_t uncounted;  // launches of kernels that are not counted here
};
static Record record{};

// Of an axis: how many of its places' taps lie inside the operand.
inline int64_t taps_inside(const Axis& axis, int operand, int place) {
  int64_t count = 0;
  for (int j = 0; j < axis.taps; j++) count += within(place * axis.stride + axis.origin + j * axis.step, operand);
  return count;
}

inline int64_t taps_inside(const Axis& axis, int operand) {
  int64_t count = 0;
  for (int i = 0; i < axis.places; i++) count += taps_inside(axis, operand, i);
  return count;
}

// The same over boxes of pooling windows, whose places overlap.
inline int64_t taps_in_boxes(const Axis& axis, int operand, int boxes, int windows, int kernel, int stride,
                             int padding) {
  int64_t count = 0;
  for (int box = 0; box < boxes; box++) {
    for (int i = 0; i < (windows - 1) * stride + kernel; i++) {
      const int place = box * windows * stride - padding + i;
      if (within(place, axis.places)) count += taps_inside(axis, operand, place);
    }
  }
  return count;
}

struct TileSize {
  int m, n, k;
};

inline TileSize tile_of(const LaunchConfig& config) {
  const int k = TileLarge<T>::kK;
  if (config.block.x == TileSmall<T>::kThreads) return {64, 64, k};
  if (config.shared_bytes == gemm_shared_bytes<T, TileLarge<T>, ChunkLoader>()) return {128, 128, k};
  return {128, 64, k};
}

inline void count(const LaunchConfig& config, const GemmParams& p, const StoreOutput<T>& store) {
  const TileSize tile = tile_of(config);
  const int classes_h = p.transposed ? p.height.stride : 1, classes_w = p.transposed ? p.width.stride : 1;
  for (int i = 0; i < classes_h * classes_w; i++) {
    const Axis h = p.transposed ? transposed_axis(p.height, i / classes_w) : forward_axis(p.height);
    const Axis w = p.transposed ? transposed_axis(p.width, i % classes_w) : forward_axis(p.width);
    const int64_t places = p.images * h.places * w.places;
    const int64_t tiles_m = p.transposed ? ceil_div<int64_t>(places, tile.m) : p.tiles_m;
    const int depth = p.channels * h.taps * w.taps;
    const int64_t steps = ceil_div(depth, tile.k);
    record.products += p.groups * tiles_m * p.tiles_n * steps * (tile.m / 16) * (tile.n / 8) * (tile.k / 16);
    int64_t pairs = taps_inside(h, p.height.operand) * taps_inside(w, p.width.operand);
    if (p.pool_tile == PoolTile::kWindows) {
      pairs = 0;
      for (int y = 0; y < p.pool.out_h * p.pool.kernel_h; y++) {
        const int place = y / p.pool.kernel_h * p.pool.stride_h + y % p.pool.kernel_h;
        int64_t line = 0;
        for (int x = 0; x < p.pool.out_w * p.pool.kernel_w; x++) {
          line += taps_inside(w, p.width.operand, x / p.pool.kernel_w * p.pool.stride_w + x % p.pool.kernel_w);
        }
        pairs += line * taps_inside(h, p.height.operand, place);
      }
    } else if (p.pool_tile == PoolTile::kBox) {
      pairs =
          taps_in_boxes(h, p.height.operand, p.boxes_h, p.tile_h, p.pool.kernel_h, p.pool.stride_h, p.pool.padding_h) *
          taps_in_boxes(w, p.width.operand, p.boxes_w, p.tile_w, p.pool.kernel_w, p.pool.stride_w, p.pool.padding_w);
    }
    record.loads += p.groups * p.images * pairs * p.channels * p.tiles_n * sizeof(T);
    record.loads += p.groups * tiles_m * int64_t{p.filters} * depth * sizeof(T);
    if (store.bias != nullptr) {  // every thread of the epilogue loads its columns'
      const int64_t threads = config.block.x, column_threads = tile.n / 8;
      record.loads += p.groups * tiles_m * p.filters * (threads / column_threads) * sizeof(T);
    }
    const int64_t outputs = p.pool_tile == PoolTile::kNone ? places : p.images * p.pool.out_h * p.pool.out_w;
    const int bytes = sizeof(T) * (1 + (store.preactivation != nullptr)) + (store.argmax != nullptr);
    record.stores += outputs * p.groups * p.filters * bytes;
  }
}

inline void count(const LaunchConfig& config, const StemParams& p) {
  const int kn = p.filters > kStemFiltersFew ? kStemFilters : kStemFiltersFew;
  record.products += p.tiles * p.tiles_n * p.k_steps * (kStemPlaces / 16) * (kn / 8);
  // Lines of a box by what of them is the image's, in chunks or elements.
  const int unit = p.copies ? 8 : 1;
  int64_t rows = 0, units = 0;
  for (int box = 0; box < p.boxes_h; box++) {
    const int top = (box * p.tile_h * p.pool.stride_h - p.pool.padding_h) * p.stride_h - p.padding_h;
    for (int row = 0; row < p.rows; row++) rows += within(top + row, p.height);
  }
  for (int box = 0; box < p.boxes_w; box++) {
    const int start = (box * p.tile_w * p.pool.stride_w - p.pool.padding_w) * p.step - p.padding;
    for (int i = 0; i < p.chunks * 8; i += unit) units += within(start - (start & 7) + i, p.line);
  }
  record.loads += p.images * p.tiles_n * p.planes * rows * units * unit * sizeof(T);
  const int64_t blocks = config.grid.x / p.tiles_n, taps = int64_t{p.planes} * p.kernel_h * p.run;
  record.loads += blocks * p.filters * (taps + (p.bias != nullptr)) * sizeof(T);
  const int bytes = sizeof(T) * (1 + (p.preactivation != nullptr)) + (p.argmax != nullptr);
  record.stores += p.images * p.pool.out_h * p.pool.out_w * p.filters * bytes;
}

inline void count(const LaunchConfig&, const WeightParams& p) {
  using Shape = TileWeight<T>;
  int64_t pairs = taps_inside(Axis{p.out_h, p.stride_h, -p.padding_h, p.dilation_h, p.kernel_h}, p.height) *
                  taps_inside(Axis{p.out_w, p.stride_w, -p.padding_w, p.dilation_w, p.kernel_w}, p.width);
  const int64_t images = p.places / p.out_h / p.out_w, cols = int64_t{p.kernel_h} * p.kernel_w * p.channels;
  for (int64_t part = 0; part < p.parts; part++) {
    const int64_t places = std::min(p.part_places, p.places - part * p.part_places);
    record.products += p.groups * p.tiles_m * p.tiles_n * ceil_div<int64_t>(places, Shape::kK) * (Shape::kM / 16) *
                       (Shape::kN / 8) * (Shape::kK / 16);
  }
  record.loads += p.groups * images * pairs * p.channels * p.tiles_m * sizeof(T);
  record.loads += p.places * p.groups * p.filters * p.tiles_n * sizeof(T);
  record.stores += p.parts * p.groups * p.filters * (cols + (p.bias_sums != nullptr)) * sizeof(float);
}

inline void count(const LaunchConfig&, const SumParams<T>& p) {
  record.loads += p.parts * p.elements * sizeof(float);
  record.stores += p.elements * sizeof(T);
}

inline void count(const LaunchConfig&, const PermuteParams& p) {
  const int64_t bytes = p.outer[0] * p.outer[1] * p.outer[2] * p.rows * p.cols * sizeof(T);
  record.loads += bytes;
  record.stores += bytes;
}

template <class... Other>
void count(const LaunchConfig&, const Other&...) {
  record.uncounted++;
}

template <class... Params, class... Args>
int recorded_launch(void (*kernel)(Params...), const LaunchConfig& config, Args... args) {
  record.launches++;
  count(config, args...);
  return runs ? launch(kernel, config, args...) : 0;
}

}  // namespace bigkern

// Direction 0 is forward with bias, ReLU and, where pool_kernel > 0, a max pool; 1 the input's gradient, 2 the
// gradients of weight and bias. bf16, channels_last. With `run` the kernels run, on zeros, and the products are counted
// as well.
extern "C" int conv_counters(const bigkern::ConvShape* shape, int pool_kernel, int pool_stride, int pool_padding,
                             int direction, int run, bigkern::Record* out, int64_t* counted) {
  using namespace bigkern;
  const ConvShape& s = *shape;
  std::vector<std::unique_ptr<char[]>> memory;
  const Allocate allocate = [&](size_t bytes) -> void* {
    if (!run) return nullptr;  // as aligned as any
    memory.push_back(std::make_unique<char[]>(bytes + 16));
    const auto address = reinterpret_cast<uintptr_t>(memory.back().get());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  };
  auto tensor = [&](int64_t images, int channels, int height, int width) {
    ConvTensor t = dense_channels_last(nullptr, channels, height, width);
    t.data = allocate(images * t.image * sizeof(T));
    return t;
  };
  record = {};
  products = 0;
  runs = run;
  const ConvTensor input = tensor(s.images, s.channels, s.height, s.width);
  const ConvTensor weight = tensor(s.filters, s.channels / s.groups, s.kernel_h, s.kernel_w);
  const ConvTensor conv = tensor(s.images, s.filters, s.out_h, s.out_w);
  void* const bias = allocate(s.filters * sizeof(T));
  int code = 0;
  if (direction == 0) {
    ConvForwardParams p{};
    p.shape = s;
    if (pool_kernel > 0) {
      auto places = [&](int extent) { return (extent + 2 * pool_padding - pool_kernel) / pool_stride + 1; };
      p.pool = {pool_kernel,  pool_kernel,  pool_stride,     pool_stride,
                pool_padding, pool_padding, places(s.out_h), places(s.out_w)};
    }
    p.activation = ConvActivation::kRelu;
    p.input = input, p.weight = weight;
    p.bias = run ? bias : &record;  // there is one
    p.output = const_cast<void*>(conv.data);
    p.channels_last = true;
    code = conv_forward<T>(p, nullptr, allocate);
  } else if (direction == 1) {
    code = conv_backward_input<T>({s, conv, weight, const_cast<void*>(input.data), true, false}, nullptr, allocate);
  } else {
    void* const grad_weight = const_cast<void*>(weight.data);
    code = conv_backward_weight<T>({s, conv, input, grad_weight, run ? bias : &record, true, false}, nullptr, allocate);
  }
  *out = record;
  *counted = static_cast<int64_t>(products);
  return code;
}

// What the weight gradient's kernel of sm_90a asks for, of the same tensors, with the bias' gradient.
struct HopperWeightRecord {
  int64_t tile;  // of kHopperWeightTiles; -1: the kernels above serve
  int64_t filters, columns;
  int64_t box_w, box_h, box_images, steps, parts, cluster;
  int64_t products;             // wgmmas of 64 x a warpgroup's columns, and those of the bias' 8
  int64_t flop, loads, stores;  // loads: whole boxes of TMA, and the sum's of parts
  int64_t cycles;               // modelled
};

extern "C" void conv_hopper_weight_counters(const bigkern::ConvShape* shape, HopperWeightRecord* out) {
  using namespace bigkern;
  const ConvShape& s = *shape;
  const auto tensor = [](int channels, int height, int width) {
    return dense_channels_last(nullptr, channels, height, width);
  };
  const HopperWeightPlan plan =
      plan_hopper_weight(weight_params(s, tensor(s.filters, s.out_h, s.out_w), tensor(s.channels, s.height, s.width)));
  const WeightParams& p = plan.params;
  const HopperWeightLayout& layout = plan.layout;
  *out = {plan.tile};
  if (plan.tile < 0) return;
  const HopperWeightTile tile = kHopperWeightTiles[plan.tile];
  const int64_t places = layout.box_w * layout.box_h * layout.box_images, tiles = int64_t{p.tiles_m} * p.tiles_n;
  const int64_t weights = int64_t{s.filters} * s.kernel_h * s.kernel_w * s.channels;
  const int width = hopper_weight_columns(tile);
  const int64_t fragments = tile.filters / 64 * (tile.columns / width), depths = layout.steps * (kHopperPlaces / 16);
  *out = {plan.tile,         tile.filters, tile.columns, layout.box_w,  layout.box_h,
          layout.box_images, layout.steps, p.parts,      layout.cluster};
  out->products = depths * fragments * (tiles + p.tiles_m);
  out->flop = depths * fragments * 64 * 16 * 2 * (tiles * width + p.tiles_m * 8);
  out->loads = tiles * layout.steps * (tile.filters / layout.cluster + tile.columns) * places * sizeof(T);
  out->stores = p.parts * (weights + s.filters) * sizeof(float);
  out->cycles = static_cast<int64_t>(hopper_weight_cycles(p, tile, layout));
}
