// Convolution with bias, activation and max pool in one pass, and its gradients, for sm_80 and up.
//
//   output[n, k, p, q] = pool(activation(bias[k] + sum over c, r, s of weight[k, c, r, s] input[n, c, h, w])),
//   h = p stride_h - padding_h + r dilation_h, w alike; channels in groups. Without a pool, residual[n, k, p, q] may be
//   added before the activation: one more operand to read, and no pass of its own.
//
// Floors, with N P Q places of K filters over C channels and R S taps: 2 N P Q K C / groups R S FLOP in each of
// forward, input gradient and weight gradient; bytes: each operand read once, each result written once.
//
// What serves what (conv_forward, conv_backward_input and conv_backward_weight choose by shape; a path for one
// architecture alone is another branch there):
//
//   conv_gemm.cuh       implicit GEMM for forward and input gradient. Tiles of 128 x 128, 128 x 64 and 64 x 64 on
//                       tensor cores, or by fused multiply-adds for fp32 without TF32. Chunks of channels by cp.async,
//                       single elements where there are no whole chunks.
//   conv_hopper.cuh     the same on sm_90a for 16-bit elements in whole chunks, without groups: TMA and wgmma, pixels
//                       loaded once for all taps; conv_hopper_plan.cuh says which shapes it takes
//   conv_stem.cuh       forward of 1 to 4 channels, 16-bit, with its pool: raw lines of the images, NCHW or
//                       channels_last; plan_stem says which shapes it takes
//   conv_epilogue.cuh   bias, activation, and max pool where windows fit a tile; else
//   conv_pool.cuh       the pool as a pass of its own; and the way back through pool and activation
//   conv_weight.cuh     weight and bias gradients
//   conv_hopper_weight.cuh  the same on sm_90a, of what conv_hopper_weight_plan.cuh takes: TMA and wgmma
//   conv_depthwise.cuh  one channel a group: bound by memory, without tiles
//   conv_layout.cuh     copies between layouts
//
// Layouts: kernels read images with contiguous channels, of any other strides, or of up to 4 channels as they lie.
// Others (NCHW) are copied first, at a read and a write of the operand. Results in NCHW are stored as such by the
// tiles' epilogue; depthwise ones and those of a separate pool are copied last. Weights are copied wherever their
// channels do not lie as the path wants them: they are small.
//
// Numerics: fp32 accumulators over all of k in one order; one rounding at the end, but where a pass or the stem's pool
// is given rounded sums. TF32 rounds operands to nearest, halves away from zero. Offsets are 64-bit; coordinates and
// the k axis are int, which csrc/torch/conv.cpp checks.
#pragma once

#include "kernels/conv.h"
#include "kernels/conv_depthwise.cuh"
#include "kernels/conv_epilogue.cuh"
#include "kernels/conv_gemm.cuh"
#include "kernels/conv_hopper_plan.cuh"
#include "kernels/conv_hopper_weight_plan.cuh"
#include "kernels/conv_layout.cuh"
#include "kernels/conv_pool.cuh"
#include "kernels/conv_stem.cuh"
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
template <class T>
int copy_tensor(const ConvTensor& from, const ConvTensor& to, int64_t images, int channels, int height, int width,
                Stream stream) {
  PermuteParams p{};
  p.source = from.data;
  p.destination = const_cast<void*>(to.data);
  const bool flat = from.row == width * from.column && to.row == width * to.column;
  p.outer[0] = images, p.source_outer[0] = from.image, p.destination_outer[0] = to.image;
  p.outer[1] = flat ? 1 : height, p.source_outer[1] = from.row, p.destination_outer[1] = to.row;
  p.outer[2] = 1;
  p.rows = channels, p.source_row = from.channel, p.destination_row = to.channel;
  p.cols = flat ? int64_t{height} * width : width, p.source_col = from.column, p.destination_col = to.column;
  if (to.channel != 1) {
    std::swap(p.rows, p.cols);
    std::swap(p.source_row, p.source_col);
    std::swap(p.destination_row, p.destination_col);
  }
  return launch_permute<Bits<T>>(p, stream);
}

// Dense results with contiguous channels to N x C x H x W; none to none.
template <class T>
int copy_to_contiguous(const T* from, void* to, int64_t images, int channels, int height, int width, Stream stream) {
  if (to == nullptr) return 0;
  return copy_tensor<T>(dense_channels_last(from, channels, height, width),
                        dense_contiguous(to, channels, height, width), images, channels, height, width, stream);
}

// Makes the tensor one with contiguous channels: itself, or a copy. Strides of axes of length one become 0.
template <class T>
int channels_contiguous(ConvTensor& tensor, int64_t images, int channels, int height, int width, Stream stream,
                        const Allocate& allocate) {
  if (tensor.channel != 1 && channels > 1) {
    void* const copy = allocate(images * channels * height * width * sizeof(T));
    const ConvTensor to = dense_channels_last(copy, channels, height, width);
    if (int error = copy_tensor<T>(tensor, to, images, channels, height, width, stream)) return error;
    tensor = to;
  }
  tensor.channel = 1;
  if (images == 1) tensor.image = 0;
  if (height == 1) tensor.row = 0;
  if (width == 1) tensor.column = 0;
  return 0;
}

// The images of forward and weight gradient. Few channels are read as they lie: single elements gain nothing from a
// copy.
template <class T>
int input_channels_contiguous(ConvTensor& input, const ConvShape& shape, Stream stream, const Allocate& allocate) {
  constexpr int kFewChannels = 4;
  if (shape.groups == 1 && shape.channels > 1 && shape.channels <= kFewChannels) return 0;
  return channels_contiguous<T>(input, shape.images, shape.channels, shape.height, shape.width, stream, allocate);
}

// Filters as taps x channels, for one channel a group.
template <class T>
int taps_first(ConvTensor& weight, const ConvShape& shape, Stream stream, const Allocate& allocate) {
  void* const copy = allocate(int64_t{shape.filters} * shape.kernel_h * shape.kernel_w * sizeof(T));
  const ConvTensor from = {weight.data, 0, weight.image, weight.row, weight.column};
  const ConvTensor to = dense_channels_last(copy, shape.filters, shape.kernel_h, shape.kernel_w);
  weight = to;
  return copy_tensor<T>(from, to, 1, shape.filters, shape.kernel_h, shape.kernel_w, stream);
}

// Filters with input and output channels exchanged: groups x channels x R x S x filters.
template <class T>
int exchange_channels(ConvTensor& weight, const ConvShape& shape, Stream stream, const Allocate& allocate) {
  const int channels = shape.channels / shape.groups, filters = shape.filters / shape.groups;
  const int64_t line = int64_t{shape.kernel_w} * filters, taps = shape.kernel_h * line;
  PermuteParams p{};
  p.source = weight.data;
  p.destination = allocate(channels * shape.groups * taps * sizeof(T));
  p.outer[0] = shape.groups, p.source_outer[0] = filters * weight.image, p.destination_outer[0] = channels * taps;
  p.outer[1] = shape.kernel_h, p.source_outer[1] = weight.row, p.destination_outer[1] = line;
  p.outer[2] = shape.kernel_w, p.source_outer[2] = weight.column, p.destination_outer[2] = filters;
  p.rows = filters, p.source_row = weight.image, p.destination_row = 1;
  p.cols = channels, p.source_col = weight.channel, p.destination_col = taps;
  weight = {p.destination, taps, 1, line, filters};
  return launch_permute<Bits<T>>(p, stream);
}

inline bool is_depthwise(const ConvShape& shape) {
  return shape.groups == shape.channels && shape.filters == shape.channels && shape.groups > 1;
}

// ---- The tile loop ----

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
  return p.channels % V == 0 && p.a_channel == 1 &&
         whole_vectors({p.a, p.a_image, 1, p.a_row, p.a_pixel}, V, sizeof(T)) &&
         whole_vectors({p.b, p.b_filter, 1, p.b_row, p.b_tap}, V, sizeof(T));
}

template <class T>
using TileLarge = TileShape<T, 128, 128, 4, 2>;
template <class T>
using TileMedium = TileShape<T, 128, 64, 4, 2>;
template <class T>
using TileSmall = TileShape<T, 64, 64, 2, 2>;

constexpr int kTileRows = 128, kTileRowsSmall = 64;

// Fewer blocks of 128 x 64 than multiprocessors.
template <class T>
bool wants_small_tile(const GemmParams& p) {
  const int64_t tiles = ceil_div<int64_t>(p.images * p.height.result * p.width.result, kTileRows);
  return whole_chunks<T>(p) && tiles * ceil_div(p.filters, 64) * p.groups < multiprocessor_count();
}

// The largest tile whose blocks fill the GPU once, and that has no columns to spare. With 64 sums a thread, fp32 and
// its conversions to TF32 would not fit 128 registers.
template <class T, class Product, class Epilogue>
int launch_gemm(const GemmParams& p, bool small, const Epilogue& epilogue, Stream stream) {
  const int classes = p.transposed ? p.height.stride * p.width.stride : 1;
  if (!whole_chunks<T>(p)) {
    return launch_gemm_tile<T, TileMedium<T>, Product, ElementLoader>(p, classes, epilogue, stream);
  }
  if (small) return launch_gemm_tile<T, TileSmall<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
  if constexpr (sizeof(T) == 2) {
    const int64_t tiles = p.images * p.height.result * p.width.result / kTileRows * ceil_div(p.filters, 128) * p.groups;
    if (p.filters > 64 && tiles >= multiprocessor_count()) {
      return launch_gemm_tile<T, TileLarge<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
    }
  }
  return launch_gemm_tile<T, TileMedium<T>, Product, ChunkLoader>(p, classes, epilogue, stream);
}

template <class T, class Epilogue>
int launch_gemm(const GemmParams& p, bool tf32, bool small, const Epilogue& epilogue, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return launch_gemm<T, FusedMultiplyAdd>(p, small, epilogue, stream);
  } else if (compute_capability() == 90 && whole_chunks<T>(p)) {
    // The forward pass and the input gradient have a kernel of sm_90a's own; what its plan leaves stays here.
    const HopperPlan plan = plan_hopper(p, epilogue.vectors && epilogue.plane == 0);
    if (plan.tile >= 0) return launch_hopper<T>(plan, epilogue, stream);
  }
  return launch_gemm<T, TensorCores>(p, small, epilogue, stream);
}

// ---- The weight's gradient ----

template <class T>
bool whole_chunks(const WeightParams& p) {
  constexpr int V = kVecElements<T>;
  return p.channels % V == 0 && p.filters % V == 0 && p.input_channel == 1 &&
         whole_vectors({p.grad, p.grad_image, 1, p.grad_row, p.grad_pixel}, V, sizeof(T)) &&
         whole_vectors({p.input, p.input_image, 1, p.input_row, p.input_pixel}, V, sizeof(T));
}

template <class T, class Product>
int launch_weight(const WeightParams& p, Stream stream) {
  return whole_chunks<T>(p) ? launch_weight_tile<T, Product, WeightChunkLoader>(p, stream)
                            : launch_weight_tile<T, Product, WeightElementLoader>(p, stream);
}

template <class T>
int launch_weight(const WeightParams& p, bool tf32, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return launch_weight<T, FusedMultiplyAdd>(p, stream);
  }
  return launch_weight<T, TensorCores>(p, stream);
}

inline AxisShape axis_shape(int operand, int result, int stride, int padding, int dilation, int taps) {
  return {operand, result, stride, padding, dilation, taps, std::gcd(stride, dilation)};
}

// Axes of the forward pass, or of the input gradient, where the convolution's output is the operand.
template <class Params>
void set_axes(const ConvShape& s, bool transposed, Params& p) {
  p.transposed = transposed;
  p.height = axis_shape(transposed ? s.out_h : s.height, transposed ? s.height : s.out_h, s.stride_h, s.padding_h,
                        s.dilation_h, s.kernel_h);
  p.width = axis_shape(transposed ? s.out_w : s.width, transposed ? s.width : s.out_w, s.stride_w, s.padding_w,
                       s.dilation_w, s.kernel_w);
  p.images = s.images;
}

inline WeightParams weight_params(const ConvShape& s, const ConvTensor& grad, const ConvTensor& input) {
  WeightParams p{};
  p.grad = grad.data, p.grad_image = grad.image, p.grad_row = grad.row, p.grad_pixel = grad.column;
  p.input = input.data, p.input_image = input.image, p.input_row = input.row, p.input_pixel = input.column;
  p.input_channel = input.channel;
  p.places = s.images * s.out_h * s.out_w;
  p.out_h = s.out_h, p.out_w = s.out_w, p.height = s.height, p.width = s.width;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.padding_h = s.padding_h, p.padding_w = s.padding_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w;
  p.groups = s.groups, p.channels = s.channels / s.groups, p.filters = s.filters / s.groups;
  return p;
}

template <class T>
DepthwiseParams<T> depthwise_params(const ConvShape& shape, bool transposed, const ConvTensor& operand,
                                    const ConvTensor& weight) {
  DepthwiseParams<T> p{};
  set_axes(shape, transposed, p);
  p.operand = static_cast<const T*>(operand.data), p.weight = static_cast<const T*>(weight.data);
  p.operand_image = operand.image, p.operand_row = operand.row, p.operand_pixel = operand.column;
  p.channels = shape.channels;
  return p;
}

inline GemmParams gemm_params(const ConvShape& shape, bool transposed, const ConvTensor& a, const ConvTensor& b) {
  GemmParams p{};
  set_axes(shape, transposed, p);
  const int channels = shape.channels / shape.groups, filters = shape.filters / shape.groups;
  p.a = a.data, p.a_image = a.image, p.a_row = a.row, p.a_pixel = a.column, p.a_channel = a.channel;
  p.b = b.data, p.b_filter = b.image, p.b_row = b.row, p.b_tap = b.column;
  p.groups = shape.groups, p.channels = transposed ? filters : channels, p.filters = transposed ? channels : filters;
  return p;
}

// Where the results of a pass go; none but the output in passes before the last.
template <class T>
struct Results {
  T* output;
  T* preactivation;  // or null
  uint8_t* argmax;   // or null
};

template <class T>
int launch_depthwise_forward(const ConvForwardParams& params, ConvActivation activation, const Results<T>& results,
                             Stream stream, const Allocate& allocate) {
  const ConvShape& shape = params.shape;
  ConvTensor input = params.input, weight = params.weight;
  if (int error =
          channels_contiguous<T>(input, shape.images, shape.channels, shape.height, shape.width, stream, allocate)) {
    return error;
  }
  if (int error = taps_first<T>(weight, shape, stream, allocate)) return error;
  DepthwiseParams<T> p = depthwise_params<T>(shape, false, input, weight);
  p.bias = static_cast<const T*>(params.bias);
  p.residual = static_cast<const T*>(params.residual);
  if (params.residual != nullptr && !params.channels_last) {
    const int64_t outputs = shape.images * shape.filters * shape.out_h * shape.out_w;
    void* const copy = allocate(outputs * sizeof(T));
    if (int error = copy_tensor<T>(dense_contiguous(params.residual, shape.filters, shape.out_h, shape.out_w),
                                   dense_channels_last(copy, shape.filters, shape.out_h, shape.out_w), shape.images,
                                   shape.filters, shape.out_h, shape.out_w, stream)) {
      return error;
    }
    p.residual = static_cast<const T*>(copy);
  }
  p.activation = activation;
  p.output = results.output, p.preactivation = results.preactivation;
  return launch_depthwise(p, stream);
}

// Forward through passes over channels_last memory: the convolution, then a pool where one is wanted and has not been
// fused, then a copy where NCHW is wanted. `convolve(activation, results)` launches the first.
template <class T, class Convolve>
int launch_passes(const ConvForwardParams& params, bool pools, Stream stream, const Allocate& allocate,
                  Convolve&& convolve) {
  const ConvShape& shape = params.shape;
  const int out_h = pools ? params.pool.out_h : shape.out_h, out_w = pools ? params.pool.out_w : shape.out_w;
  const int64_t outputs = shape.images * out_h * out_w * shape.filters;
  Results<T> last = {static_cast<T*>(params.output), static_cast<T*>(params.preactivation), params.argmax};
  if (!params.channels_last) {
    last.output = static_cast<T*>(allocate(outputs * sizeof(T)));
    if (last.preactivation != nullptr) last.preactivation = static_cast<T*>(allocate(outputs * sizeof(T)));
    if (last.argmax != nullptr) last.argmax = static_cast<uint8_t*>(allocate(outputs));
  }
  if (pools) {
    const int64_t places = shape.images * shape.out_h * shape.out_w;
    T* const conv = static_cast<T*>(allocate(places * shape.filters * sizeof(T)));
    if (int error = convolve(ConvActivation::kNone, Results<T>{conv, nullptr, nullptr})) return error;
    const PoolParams<T> pool{conv,        shape.images,      shape.filters, shape.out_h,        shape.out_w,
                             params.pool, params.activation, last.output,   last.preactivation, last.argmax};
    if (int error = launch_pool(pool, stream)) return error;
  } else {
    if (int error = convolve(params.activation, last)) return error;
  }
  if (params.channels_last) return 0;
  auto spread = [&](const auto* from, void* to) {
    return copy_to_contiguous(from, to, shape.images, shape.filters, out_h, out_w, stream);
  };
  if (int error = spread(last.output, params.output)) return error;
  if (int error = spread(last.preactivation, params.preactivation)) return error;
  return spread(last.argmax, params.argmax);
}

}  // namespace conv

template <class T>
int conv_forward(const ConvForwardParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  const bool wants_pool = params.pool.kernel_h > 0;
  if (is_depthwise(shape)) {
    return launch_passes<T>(params, wants_pool, stream, allocate, [&](ConvActivation activation, const auto& results) {
      return launch_depthwise_forward<T>(params, activation, results, stream, allocate);
    });
  }
  if constexpr (sizeof(T) == 2) {
    StemParams stem;
    if (plan_stem(params, stem)) return launch_stem<T>(stem, stream);
  }
  ConvTensor input = params.input, weight = params.weight;
  if (int error = input_channels_contiguous<T>(input, shape, stream, allocate)) return error;
  if (int error = channels_contiguous<T>(weight, shape.filters, shape.channels / shape.groups, shape.kernel_h,
                                         shape.kernel_w, stream, allocate)) {
    return error;
  }
  GemmParams p = gemm_params(shape, false, input, weight);
  const bool small = wants_small_tile<T>(p);
  const bool fused = wants_pool && plan_pool(params.pool, small ? kTileRowsSmall : kTileRows, p);
  auto convolve = [&](ConvActivation activation, const Results<T>& results, int64_t plane) {
    constexpr int V = kVecElements<T>;
    const StoreOutput<T> store{static_cast<const T*>(params.bias),
                               static_cast<const T*>(params.residual),
                               results.output,
                               results.preactivation,
                               results.argmax,
                               shape.filters,
                               activation,
                               p.filters % V == 0 && whole_vectors({params.residual, 0, 1, 0, 0}, V, sizeof(T)),
                               plane};
    return launch_gemm<T>(p, params.tf32, small, store, stream);
  };
  if (wants_pool && !fused) {
    p.pool_tile = PoolTile::kNone;
    return launch_passes<T>(params, true, stream, allocate, [&](ConvActivation activation, const auto& results) {
      return convolve(activation, results, 0);
    });
  }
  const int64_t plane =
      wants_pool ? int64_t{params.pool.out_h} * params.pool.out_w : int64_t{shape.out_h} * shape.out_w;
  const Results<T> results{static_cast<T*>(params.output), static_cast<T*>(params.preactivation), params.argmax};
  return convolve(params.activation, results, params.channels_last ? 0 : plane);
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
  auto gather = [&](ConvTensor& tensor, auto element) {
    if (tensor.data == nullptr) return 0;
    return channels_contiguous<decltype(element)>(tensor, params.images, params.filters, out_h, out_w, stream,
                                                  allocate);
  };
  if (int error = gather(p.grad_output, T{})) return error;
  if (int error = gather(p.argument, T{})) return error;
  if (int error = gather(p.argmax, uint8_t{})) return error;
  const bool vectors = p.filters % V == 0 && whole_vectors(p.grad_output, V, sizeof(T)) &&
                       whole_vectors(p.argument, V, sizeof(T)) && whole_vectors(p.argmax, V, 1);
  const int64_t elements = params.images * params.out_h * params.out_w * params.filters;
  return vectors ? launch(conv_backward_epilogue_kernel<T, V>, elementwise_grid(elements / V, stream), p)
                 : launch(conv_backward_epilogue_kernel<T, 1>, elementwise_grid(elements, stream), p);
}

template <class T>
int conv_backward_input(const ConvBackwardInputParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  ConvTensor grad = params.grad_conv, weight = params.weight;
  if (int error =
          channels_contiguous<T>(grad, shape.images, shape.filters, shape.out_h, shape.out_w, stream, allocate)) {
    return error;
  }
  if (!is_depthwise(shape)) {
    if (int error = exchange_channels<T>(weight, shape, stream, allocate)) return error;
    const GemmParams p = gemm_params(shape, true, grad, weight);
    StoreOutput<T> store{};
    store.output = static_cast<T*>(params.grad_input);
    store.row_filters = shape.channels;
    store.vectors = p.filters % kVecElements<T> == 0;
    store.plane = params.channels_last ? 0 : int64_t{shape.height} * shape.width;
    return launch_gemm<T>(p, params.tf32, wants_small_tile<T>(p), store, stream);
  }
  if (int error = taps_first<T>(weight, shape, stream, allocate)) return error;
  DepthwiseParams<T> p = depthwise_params<T>(shape, true, grad, weight);
  const int64_t elements = shape.images * shape.channels * shape.height * shape.width;
  p.output = static_cast<T*>(params.channels_last ? params.grad_input : allocate(elements * sizeof(T)));
  if (int error = launch_depthwise(p, stream)) return error;
  if (params.channels_last) return 0;
  return copy_to_contiguous(p.output, params.grad_input, shape.images, shape.channels, shape.height, shape.width,
                            stream);
}

template <class T>
int conv_backward_weight(const ConvBackwardWeightParams& params, Stream stream, const Allocate& allocate) {
  using namespace conv;
  const ConvShape& shape = params.shape;
  const int channels = shape.channels / shape.groups, taps = shape.kernel_h * shape.kernel_w;
  ConvTensor grad = params.grad_conv, input = params.input;
  if (int error =
          channels_contiguous<T>(grad, shape.images, shape.filters, shape.out_h, shape.out_w, stream, allocate)) {
    return error;
  }
  if (int error = input_channels_contiguous<T>(input, shape, stream, allocate)) return error;
  WeightParams p = weight_params(shape, grad, input);
  const bool depthwise = is_depthwise(shape);
  const DepthwiseWeightGrid grid = plan_depthwise_weight<T>(p);
  HopperWeightPlan hopper{-1, {}, {}};
  if (sizeof(T) == 2 && compute_capability() == 90 && whole_chunks<T>(p)) hopper = plan_hopper_weight(p);
  if (hopper.tile >= 0) {
    p.parts = hopper.params.parts;
  } else {
    p.tiles_m = ceil_div(p.filters, TileWeight<T>::kM), p.tiles_n = ceil_div(taps * channels, TileWeight<T>::kN);
    plan_parts(p, depthwise ? grid.blocks : int64_t{p.groups} * p.tiles_m * p.tiles_n);
  }
  const int64_t weights = int64_t{shape.filters} * taps * channels;
  p.sums = static_cast<float*>(allocate(p.parts * weights * sizeof(float)));
  if (params.grad_bias != nullptr) {
    p.bias_sums = static_cast<float*>(allocate(p.parts * shape.filters * sizeof(float)));
  }
  const auto launch_sums = [&] {
    if constexpr (sizeof(T) == 2) {
      hopper.params.sums = p.sums, hopper.params.bias_sums = p.bias_sums;
      if (hopper.tile >= 0) return launch_hopper_weight<T>(hopper, stream);
    }
    return depthwise ? launch_depthwise_weight<T>(p, grid, stream) : launch_weight<T>(p, params.tf32, stream);
  };
  if (int error = launch_sums()) return error;

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
