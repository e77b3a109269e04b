// Convolution: forward with bias, activation and max pool in the epilogue, and its gradients, for sm_80 and up.
#pragma once

#include "kernels/conv.h"
#include "kernels/conv_epilogue.cuh"
#include "kernels/conv_gemm.cuh"
#include "kernels/conv_layout.cuh"
#include "kernels/conv_pool.cuh"
#include "kernels/conv_tile.cuh"
#include "kernels/conv_weight.cuh"

#include <algorithm>
#include <numeric>
#include <utility>

namespace bigkern {
namespace conv {

// ---- Layouts ----

inline ConvTensor dense_channels_last(const void* data, int channels, int height, int width) {
  return {data, int64_t{height} * width * channels, 1, int64_t{width} * channels, channels};
}

inline ConvTensor dense_contiguous(const void* data, int channels, int height, int width) {
  const int64_t plane = int64_t{height} * width;
  return {data, channels * plane, plane, width, 1};
}

// Copies a tensor to another of the same sizes; the destination's channels are contiguous, or its columns.
inline int copy_tensor(const ConvTensor& from, const ConvTensor& to, int64_t images, int channels, int height,
                       int width, size_t element_bytes, Stream stream) {
  PermuteParams p{};
  p.source = from.data;
  p.destination = const_cast<void*>(to.data);
  const bool flat = from.row == width * from.column && to.row == width * to.column;
  const int64_t lines = flat ? 1 : height, columns = flat ? int64_t{height} * width : width;
  p.outer[0] = images, p.source_outer[0] = from.image, p.destination_outer[0] = to.image;
  p.outer[1] = lines, p.source_outer[1] = from.row, p.destination_outer[1] = to.row;
  p.outer[2] = 1;
  p.rows = channels, p.source_row = from.channel, p.destination_row = to.channel;
  p.cols = columns, p.source_col = from.column, p.destination_col = to.column;
  if (to.channel != 1) {
    std::swap(p.rows, p.cols);
    std::swap(p.source_row, p.source_col);
    std::swap(p.destination_row, p.destination_col);
  }
  return launch_permute(p, element_bytes, stream);
}

// The tensor with contiguous channels: itself, or a copy. Strides of axes of length one become 0.
inline int channels_contiguous(ConvTensor& tensor, int64_t images, int channels, int height, int width,
                               size_t element_bytes, Stream stream, const Allocate& allocate) {
  if (tensor.channel != 1 && channels > 1) {
    void* copy = allocate(images * channels * height * width * element_bytes);
    const ConvTensor to = dense_channels_last(copy, channels, height, width);
    if (int error = copy_tensor(tensor, to, images, channels, height, width, element_bytes, stream)) return error;
    tensor = to;
  }
  tensor.channel = 1;
  if (images == 1) tensor.image = 0;
  if (height == 1) tensor.row = 0;
  if (width == 1) tensor.column = 0;
  return 0;
}

// Whether vectors of `count` channels are aligned in every place; an absent tensor is.
inline bool whole_vectors(const ConvTensor& tensor, int count, size_t element_bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data) % (count * element_bytes) == 0 && tensor.image % count == 0 &&
         tensor.row % count == 0 && tensor.column % count == 0;
}

// ---- The tile loop ----

// Lays the tile's rows over pooling windows; false where too few of them would be of use, and the pool is a pass of its
// own.
inline bool plan_pool(const ConvPool& pool, int64_t images, int tile_m, GemmParams& p) {
  p.pool = pool;
  const int64_t outputs = images * pool.out_h * pool.out_w;
  const int area = pool.kernel_h * pool.kernel_w;
  const bool apart =
      pool.stride_h >= pool.kernel_h && pool.stride_w >= pool.kernel_w && pool.padding_h == 0 && pool.padding_w == 0;
  if (apart && area <= tile_m) {
    p.pool_tile = PoolTile::kWindows;
    p.windows = tile_m / area;
    p.tiles_m = ceil_div<int64_t>(outputs, p.windows);
    return p.windows * area * 2 >= tile_m;
  }
  int64_t best = 0;
  for (int tile_h = 1; tile_h <= pool.out_h; tile_h++) {
    const int box_h = (tile_h - 1) * pool.stride_h + pool.kernel_h;
    const int fitting = (tile_m / box_h - pool.kernel_w) / pool.stride_w + 1;
    if (tile_m / box_h < pool.kernel_w) break;
    const int tile_w = std::min(fitting, pool.out_w);
    const int64_t boxes = int64_t{ceil_div(pool.out_h, tile_h)} * ceil_div(pool.out_w, tile_w);
    if (best == 0 || boxes < best) {
      best = boxes;
      p.tile_h = tile_h, p.tile_w = tile_w;
    }
  }
  if (best == 0) return false;
  p.pool_tile = PoolTile::kBox;
  p.windows = p.tile_h * p.tile_w;
  p.box_w = (p.tile_w - 1) * pool.stride_w + pool.kernel_w;
  p.boxes_h = ceil_div(pool.out_h, p.tile_h);
  p.boxes_w = ceil_div(pool.out_w, p.tile_w);
  p.tiles_m = images * best;
  return best * tile_m <= 2 * int64_t{p.height.result} * p.width.result;
}

template <class T, class Shape, class Product, template <class, class> class Loader, class Epilogue>
int launch_gemm_tile(GemmParams p, int classes, const Epilogue& epilogue, Stream stream) {
  p.tiles_n = ceil_div(p.filters, Shape::kN);
  if (p.pool_tile == PoolTile::kNone) {
    const int64_t rows = p.transposed ? ceil_div(p.height.result, p.height.stride) : p.height.result;
    const int64_t cols = p.transposed ? ceil_div(p.width.result, p.width.stride) : p.width.result;
    p.tiles_m = ceil_div<int64_t>(p.images * rows * cols, Shape::kM);
  }
  const int64_t blocks = p.tiles_m * p.tiles_n * p.groups * classes;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                            gemm_shared_bytes<T, Shape, Loader>(), stream};
  return launch(conv_gemm_kernel<T, Shape, Product, Loader, Epilogue>, config, p, epilogue);
}

template <class T>
bool whole_chunks(const GemmParams& p) {
  constexpr int V = kVecElements<T>;
  return p.channels % V == 0 && whole_vectors({p.a, p.a_image, 1, p.a_row, p.a_pixel}, V, sizeof(T)) &&
         whole_vectors({p.b, p.b_filter, 1, p.b_row, p.b_tap}, V, sizeof(T));
}

template <class T>
using TileLarge = TileShape<T, 128, 128, 4, 2>;
template <class T>
using TileMedium = TileShape<T, 128, 64, 4, 2>;
template <class T>
using TileSmall = TileShape<T, 64, 64, 2, 2>;

constexpr int kTileRows = 128, kTileRowsSmall = 64;

// The largest tile whose blocks fill the GPU once, and that has no columns to spare.
template <class T, class Product, class Epilogue>
int launch_gemm(const GemmParams& p, bool small, const Epilogue& epilogue, Stream stream) {
  const int classes = p.transposed ? p.height.stride * p.width.stride : 1;
  if (!whole_chunks<T>(p)) {
    return launch_gemm_tile<T, TileMedium<T>, Product, ElementLoader>(p, classes, epilogue, stream);
  }
  if (small) return launch_gemm_tile<T, TileSmall<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
  const int64_t tiles = p.images * p.height.result * p.width.result / kTileRows * ceil_div(p.filters, 128) * p.groups;
  if (p.filters > 64 && tiles >= multiprocessor_count()) {
    return launch_gemm_tile<T, TileLarge<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
  }
  return launch_gemm_tile<T, TileMedium<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
}

template <class T, class Epilogue>
int launch_gemm(const GemmParams& p, bool tf32, bool small, const Epilogue& epilogue, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return launch_gemm<T, FusedMultiplyAdd>(p, small, epilogue, stream);
  }
  return launch_gemm<T, TensorCores>(p, small, epilogue, stream);
}

inline bool few_places(int64_t places, int filters, int groups) {
  return ceil_div<int64_t>(places, kTileRows) * ceil_div(filters, 64) * groups < multiprocessor_count();
}

// ---- The weight's gradient ----

template <class T, class Product>
int launch_weight(const WeightParams& p, Stream stream) {
  constexpr int V = kVecElements<T>;
  const bool chunks = p.channels % V == 0 && p.filters % V == 0 &&
                      whole_vectors({p.grad, p.grad_image, 1, p.grad_row, p.grad_pixel}, V, sizeof(T)) &&
                      whole_vectors({p.input, p.input_image, 1, p.input_row, p.input_pixel}, V, sizeof(T));
  return chunks ? launch_weight_tile<T, Product, WeightChunkLoader>(p, stream)
                : launch_weight_tile<T, Product, WeightElementLoader>(p, stream);
}

template <class T>
int launch_weight(const WeightParams& p, bool tf32, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return launch_weight<T, FusedMultiplyAdd>(p, stream);
  }
  return launch_weight<T, TensorCores>(p, stream);
}

}  // namespace conv

template <class T>
int conv_forward(const ConvForwardParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  const int channels = shape.channels / shape.groups, filters = shape.filters / shape.groups;
  ConvTensor input = params.input, weight = params.weight;
  if (int error = channels_contiguous(input, shape.images, shape.channels, shape.height, shape.width, sizeof(T), stream,
                                      allocate)) {
    return error;
  }
  if (int error = channels_contiguous(weight, shape.filters, channels, shape.kernel_h, shape.kernel_w, sizeof(T),
                                      stream, allocate)) {
    return error;
  }
  GemmParams p{};
  p.a = input.data, p.a_image = input.image, p.a_row = input.row, p.a_pixel = input.column;
  p.b = weight.data, p.b_filter = weight.image, p.b_row = weight.row, p.b_tap = weight.column;
  p.height = {shape.height, shape.out_h, shape.stride_h, shape.padding_h, shape.dilation_h, shape.kernel_h, 1};
  p.width = {shape.width, shape.out_w, shape.stride_w, shape.padding_w, shape.dilation_w, shape.kernel_w, 1};
  p.images = shape.images, p.groups = shape.groups, p.channels = channels, p.filters = filters;

  const bool pooled = params.pool.kernel_h > 0;
  const int out_h = pooled ? params.pool.out_h : shape.out_h, out_w = pooled ? params.pool.out_w : shape.out_w;
  const int64_t outputs = shape.images * out_h * out_w * shape.filters;
  const int64_t places = shape.images * shape.out_h * shape.out_w;
  bool small = few_places(places, filters, shape.groups) && whole_chunks<T>(p);
  const bool fused = pooled && plan_pool(params.pool, shape.images, small ? kTileRowsSmall : kTileRows, p);

  StoreOutput<T> store{};
  store.bias = static_cast<const T*>(params.bias);
  store.row_filters = shape.filters;
  store.activation = params.activation;
  store.vectors = filters % kVecElements<T> == 0;
  store.output = static_cast<T*>(params.output);
  store.preactivation = static_cast<T*>(params.preactivation);
  store.argmax = params.argmax;
  if (!params.channels_last) {
    store.output = static_cast<T*>(allocate(outputs * sizeof(T)));
    if (params.preactivation != nullptr) store.preactivation = static_cast<T*>(allocate(outputs * sizeof(T)));
    if (params.argmax != nullptr) store.argmax = static_cast<uint8_t*>(allocate(outputs));
  }
  const StoreOutput<T> final_store = store;
  if (pooled && !fused) {
    p.pool_tile = PoolTile::kNone;
    store.output = static_cast<T*>(allocate(places * shape.filters * sizeof(T)));
    store.preactivation = nullptr, store.argmax = nullptr;
    store.activation = ConvActivation::kNone;
  }
  if (int error = launch_gemm<T>(p, params.tf32, small, store, stream)) return error;
  if (pooled && !fused) {
    PoolParams<T> pool{};
    pool.conv = store.output;
    pool.images = shape.images, pool.filters = shape.filters, pool.conv_h = shape.out_h, pool.conv_w = shape.out_w;
    pool.pool = params.pool, pool.activation = params.activation;
    pool.output = final_store.output, pool.preactivation = final_store.preactivation, pool.argmax = final_store.argmax;
    if (int error = launch_pool(pool, stream)) return error;
  }
  if (params.channels_last) return 0;
  auto spread = [&](const void* from, void* to, size_t element_bytes) {
    if (to == nullptr) return 0;
    return copy_tensor(dense_channels_last(from, shape.filters, out_h, out_w),
                       dense_contiguous(to, shape.filters, out_h, out_w), shape.images, shape.filters, out_h, out_w,
                       element_bytes, stream);
  };
  if (int error = spread(final_store.output, params.output, sizeof(T))) return error;
  if (int error = spread(final_store.preactivation, params.preactivation, sizeof(T))) return error;
  return spread(final_store.argmax, params.argmax, 1);
}

template <class T>
int conv_backward_input(const ConvBackwardInputParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  const int channels = shape.channels / shape.groups, filters = shape.filters / shape.groups;
  ConvTensor grad = params.grad_conv;
  if (int error = channels_contiguous(grad, shape.images, shape.filters, shape.out_h, shape.out_w, sizeof(T), stream,
                                      allocate)) {
    return error;
  }
  // The filters with input and output channels exchanged: groups x channels x R x S x filters.
  const int64_t taps = int64_t{shape.kernel_h} * shape.kernel_w;
  void* turned = allocate(shape.filters * channels * taps * sizeof(T));
  const ConvTensor& weight = params.weight;
  PermuteParams turn{};
  turn.source = weight.data, turn.destination = turned;
  turn.outer[0] = shape.groups, turn.source_outer[0] = filters * weight.image;
  turn.destination_outer[0] = channels * taps * filters;
  turn.outer[1] = shape.kernel_h, turn.source_outer[1] = weight.row;
  turn.destination_outer[1] = int64_t{shape.kernel_w} * filters;
  turn.outer[2] = shape.kernel_w, turn.source_outer[2] = weight.column, turn.destination_outer[2] = filters;
  turn.rows = filters, turn.source_row = weight.image, turn.destination_row = 1;
  turn.cols = channels, turn.source_col = weight.channel, turn.destination_col = taps * filters;
  if (int error = launch_permute(turn, sizeof(T), stream)) return error;

  GemmParams p{};
  p.a = grad.data, p.a_image = grad.image, p.a_row = grad.row, p.a_pixel = grad.column;
  p.b = turned, p.b_filter = taps * filters, p.b_row = int64_t{shape.kernel_w} * filters, p.b_tap = filters;
  auto axis = [](int operand, int result, int stride, int padding, int dilation, int kernel) {
    return AxisShape{operand, result, stride, padding, dilation, kernel, std::gcd(stride, dilation)};
  };
  p.height = axis(shape.out_h, shape.height, shape.stride_h, shape.padding_h, shape.dilation_h, shape.kernel_h);
  p.width = axis(shape.out_w, shape.width, shape.stride_w, shape.padding_w, shape.dilation_w, shape.kernel_w);
  p.transposed = true;
  p.images = shape.images, p.groups = shape.groups, p.channels = filters, p.filters = channels;

  const int64_t places = shape.images * shape.height * shape.width;
  StoreOutput<T> store{};
  store.output =
      static_cast<T*>(params.channels_last ? params.grad_input : allocate(places * shape.channels * sizeof(T)));
  store.row_filters = shape.channels;
  store.vectors = channels % kVecElements<T> == 0;
  if (int error = launch_gemm<T>(p, params.tf32, few_places(places, channels, shape.groups), store, stream))
    return error;
  if (params.channels_last) return 0;
  return copy_tensor(dense_channels_last(store.output, shape.channels, shape.height, shape.width),
                     dense_contiguous(params.grad_input, shape.channels, shape.height, shape.width), shape.images,
                     shape.channels, shape.height, shape.width, sizeof(T), stream);
}

template <class T>
int conv_backward_epilogue(const ConvBackwardEpilogueParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  constexpr int V = kVecElements<T>;
  const bool pooled = params.pool.kernel_h > 0;
  const int out_h = pooled ? params.pool.out_h : params.out_h, out_w = pooled ? params.pool.out_w : params.out_w;
  BackwardEpilogueParams<T> p{};
  p.images = params.images, p.filters = params.filters, p.conv_h = params.out_h, p.conv_w = params.out_w;
  p.pool = params.pool, p.activation = params.activation;
  p.grad_output = params.grad_output;
  p.argument = params.activation == ConvActivation::kRelu ? params.output : params.preactivation;
  p.argmax = params.argmax;
  p.grad_conv = static_cast<T*>(params.grad_conv);
  auto gather = [&](ConvTensor& tensor, size_t element_bytes) {
    if (tensor.data == nullptr) return 0;
    return channels_contiguous(tensor, params.images, params.filters, out_h, out_w, element_bytes, stream, allocate);
  };
  if (int error = gather(p.grad_output, sizeof(T))) return error;
  if (int error = gather(p.argument, sizeof(T))) return error;
  if (int error = gather(p.argmax, 1)) return error;
  const bool vectors = p.filters % V == 0 && whole_vectors(p.grad_output, V, sizeof(T)) &&
                       whole_vectors(p.argument, V, sizeof(T)) && whole_vectors(p.argmax, V, 1);
  const int64_t elements = params.images * params.out_h * params.out_w * params.filters;
  return vectors ? launch(conv_backward_epilogue_kernel<T, V>, elementwise_grid(elements / V, stream), p)
                 : launch(conv_backward_epilogue_kernel<T, 1>, elementwise_grid(elements, stream), p);
}

template <class T>
int conv_backward_weight(const ConvBackwardWeightParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  const int channels = shape.channels / shape.groups, filters = shape.filters / shape.groups;
  ConvTensor grad = params.grad_conv, input = params.input;
  if (int error = channels_contiguous(grad, shape.images, shape.filters, shape.out_h, shape.out_w, sizeof(T), stream,
                                      allocate)) {
    return error;
  }
  if (int error = channels_contiguous(input, shape.images, shape.channels, shape.height, shape.width, sizeof(T), stream,
                                      allocate)) {
    return error;
  }
  WeightParams p{};
  p.grad = grad.data, p.grad_image = grad.image, p.grad_row = grad.row, p.grad_pixel = grad.column;
  p.input = input.data, p.input_image = input.image, p.input_row = input.row, p.input_pixel = input.column;
  p.places = shape.images * shape.out_h * shape.out_w;
  p.out_h = shape.out_h, p.out_w = shape.out_w, p.height = shape.height, p.width = shape.width;
  p.stride_h = shape.stride_h, p.stride_w = shape.stride_w;
  p.padding_h = shape.padding_h, p.padding_w = shape.padding_w;
  p.dilation_h = shape.dilation_h, p.dilation_w = shape.dilation_w;
  p.kernel_h = shape.kernel_h, p.kernel_w = shape.kernel_w;
  p.groups = shape.groups, p.channels = channels, p.filters = filters;
  plan_parts(p, TileWeight<T>::kM, TileWeight<T>::kN);
  const int taps = shape.kernel_h * shape.kernel_w;
  const int64_t weights = int64_t{shape.filters} * taps * channels;
  p.sums = static_cast<float*>(allocate(p.parts * weights * sizeof(float)));
  if (params.grad_bias != nullptr) {
    p.bias_sums = static_cast<float*>(allocate(p.parts * shape.filters * sizeof(float)));
  }
  if (int error = launch_weight<T>(p, params.tf32, stream)) return error;

  SumParams<T> sum{p.sums, p.parts, weights, taps, channels, static_cast<T*>(params.grad_weight)};
  sum.out_filter = int64_t{taps} * channels;
  sum.out_tap = params.channels_last ? channels : 1;
  sum.out_channel = params.channels_last ? 1 : taps;
  if (int error = launch_sum(sum, stream)) return error;
  if (params.grad_bias == nullptr) return 0;
  return launch_sum(SumParams<T>{p.bias_sums, p.parts, shape.filters, 1, 1, static_cast<T*>(params.grad_bias), 1, 0, 0},
                    stream);
}

}  // namespace bigkern
