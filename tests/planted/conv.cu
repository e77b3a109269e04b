// The entry point through which the planted-bug trials call the convolution kernels, emulated: few instances, for a
// short compile. fp32 without TF32 runs the same tile loops as the tensor cores do.
#include "kernels/conv.cuh"

#include <cstring>
#include <memory>
#include <vector>

using namespace bigkern;
using namespace bigkern::conv;

namespace {

using Shape = TileSmall<float>;

template <template <class, class> class Loader>
int multiply(const GemmParams& p, const StoreOutput<float>& store) {
  const int classes = p.transposed ? p.height.stride * p.width.stride : 1;
  return launch_gemm_tile<float, Shape, FusedMultiplyAdd, Loader>(p, classes, store, nullptr);
}

}  // namespace

// Forward with ReLU and a max pool of one kernel, stride and padding along both axes (0: none), then every gradient of
// what it saved. All tensors are dense and channels_last, `weight_turned` is C x R x S x K; `residual` is null with a
// pool. 0, or an error code whose message lands in `error`.
extern "C" int run_conv(const ConvShape* shape, int pool, int pool_stride, int pool_padding, const float* input,
                        const float* weight, const float* weight_turned, const float* bias, const float* residual,
                        const float* grad_output, float* output, uint8_t* argmax, float* grad_conv, float* grad_input,
                        float* grad_weight, float* grad_bias, char* error, int size) {
  const ConvShape& s = *shape;
  const ConvTensor image = dense_channels_last(input, s.channels, s.height, s.width);
  GemmParams forward = gemm_params(s, false, image, dense_channels_last(weight, s.channels, s.kernel_h, s.kernel_w));
  ConvPool window{};
  if (pool > 0) {
    auto places = [&](int extent) { return (extent + 2 * pool_padding - pool) / pool_stride + 1; };
    window = {pool, pool, pool_stride, pool_stride, pool_padding, pool_padding, places(s.out_h), places(s.out_w)};
    plan_pool(window, Shape::kM, forward);
  }
  StoreOutput<float> store{
      bias, residual, output, nullptr, argmax, s.filters, ConvActivation::kRelu, s.filters % 4 == 0};
  const bool chunks = whole_chunks<float>(forward);
  int code = chunks ? multiply<ChunkLoader>(forward, store) : multiply<ElementLoader>(forward, store);

  const int out_h = pool > 0 ? window.out_h : s.out_h, out_w = pool > 0 ? window.out_w : s.out_w;
  BackwardEpilogueParams<float> epilogue{s.images, s.filters, s.out_h, s.out_w, window, ConvActivation::kRelu};
  epilogue.grad_output = dense_channels_last(grad_output, s.filters, out_h, out_w);
  epilogue.argument = dense_channels_last(output, s.filters, out_h, out_w);
  epilogue.argmax = dense_channels_last(argmax, s.filters, out_h, out_w);
  epilogue.grad_conv = grad_conv;
  const int64_t elements = s.images * s.out_h * s.out_w * s.filters;
  if (code == 0) code = launch(conv_backward_epilogue_kernel<float, 1>, elementwise_grid(elements, nullptr), epilogue);

  const ConvTensor grad = dense_channels_last(grad_conv, s.filters, s.out_h, s.out_w);
  const GemmParams backward =
      gemm_params(s, true, grad, dense_channels_last(weight_turned, s.filters, s.kernel_h, s.kernel_w));
  store = {nullptr, nullptr, grad_input, nullptr, nullptr, s.channels, ConvActivation::kNone, s.channels % 4 == 0};
  if (code == 0) code = chunks ? multiply<ChunkLoader>(backward, store) : multiply<ElementLoader>(backward, store);

  WeightParams p = weight_params(s, grad, image);
  p.tiles_m = p.tiles_n = 1;
  p.parts = chunks ? 1 : 2, p.part_places = ceil_div<int64_t>(p.places, p.parts);
  const int taps = s.kernel_h * s.kernel_w;
  std::vector<float> sums(p.parts * s.filters * taps * s.channels, NAN), bias_sums(p.parts * s.filters, NAN);
  p.sums = sums.data(), p.bias_sums = bias_sums.data();
  if (code == 0) {
    code = chunks ? launch_weight_tile<float, FusedMultiplyAdd, WeightChunkLoader>(p, nullptr)
                  : launch_weight_tile<float, FusedMultiplyAdd, WeightElementLoader>(p, nullptr);
  }
  const int64_t filter = int64_t{taps} * s.channels;
  if (code == 0) {
    code = launch_sum(SumParams<float>{sums.data(), p.parts, s.filters * filter, taps, s.channels, grad_weight, filter,
                                       s.channels, 1},
                      nullptr);
  }
  if (code == 0) {
    code = launch_sum(SumParams<float>{bias_sums.data(), p.parts, s.filters, 1, 1, grad_bias, 1, 0, 0}, nullptr);
  }
  if (code != 0) std::strncpy(error, error_string(code), size - 1);
  return code;
}
