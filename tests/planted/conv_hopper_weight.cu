// The entry point through which the planted-bug trials call the weight gradient's Hopper kernel, emulated: parts of it,
// and their sum.
#include "kernels/conv_hopper_weight.cuh"

#include <cmath>
#include <cstring>
#include <vector>

using namespace bigkern;
using namespace bigkern::conv;
using T = __nv_bfloat16;

// Gradients of weight and bias of integers that bf16 holds, with one kernel size, stride and padding along both axes.
// Tensors are dense and channels_last. `cluster` is how many blocks the plan must share the gradient among. 0, or an
// error code whose message lands in `error`.
extern "C" int run_conv_hopper_weight(int images, int channels, int height, int width, int filters, int kernel,
                                      int stride, int padding, int cluster, const float* grad, const float* input,
                                      float* grad_weight, float* grad_bias, char* error, int size) {
  const auto rounded = [](const float* values, int64_t count) {
    std::vector<T> result(count);
    for (int64_t i = 0; i < count; i++) result[i] = from_float<T>(values[i]);
    return result;
  };
  WeightParams p{};
  p.height = height, p.width = width;
  p.out_h = (height + 2 * padding - kernel) / stride + 1, p.out_w = (width + 2 * padding - kernel) / stride + 1;
  p.places = int64_t{images} * p.out_h * p.out_w;
  p.stride_h = p.stride_w = stride, p.padding_h = p.padding_w = padding, p.dilation_h = p.dilation_w = 1;
  p.kernel_h = p.kernel_w = kernel;
  p.groups = 1, p.channels = channels, p.filters = filters;
  const std::vector<T> gradient = rounded(grad, p.places * filters);
  const std::vector<T> pixels = rounded(input, int64_t{images} * height * width * channels);
  p.grad = gradient.data(), p.grad_pixel = filters, p.grad_row = p.out_w * p.grad_pixel;
  p.grad_image = p.out_h * p.grad_row;
  p.input = pixels.data(), p.input_channel = 1, p.input_pixel = channels, p.input_row = width * p.input_pixel;
  p.input_image = height * p.input_row;
  HopperWeightPlan plan = plan_hopper_weight(p);
  const auto fail = [&](const char* message, int code) {
    std::strncpy(error, message, size - 1);
    return code;
  };
  if (plan.tile < 0 || plan.layout.cluster != cluster) return fail("the plan has another cluster", 1);
  const int64_t weights = int64_t{filters} * kernel * kernel * channels, parts = plan.params.parts;
  std::vector<float> sums(parts * weights, NAN), bias_sums(parts * filters, NAN);
  plan.params.sums = sums.data(), plan.params.bias_sums = bias_sums.data();
  const HopperWeightMaps maps = hopper_weight_maps<T>(plan);
  constexpr int kTile = 2;
  if (plan.tile != kTile) return fail("the plan has another tile", 1);
  const int code = launch_hopper_weight_tile<T, kTile>(plan, maps, nullptr);
  if (code != 0) return fail(error_string(code), code);
  const auto add = [&](const std::vector<float>& from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) {
      to[i] = 0.0f;
      for (int64_t part = 0; part < parts; part++) to[i] += from[part * count + i];
    }
  };
  add(sums, weights, grad_weight);
  add(bias_sums, filters, grad_bias);
  return 0;
}
