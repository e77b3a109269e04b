// The entry point through which the planted-bug trials call convolution's Hopper kernel, emulated: one tile of it.
#include "kernels/conv_hopper.cuh"

#include <cstring>
#include <vector>

using namespace bigkern;
using namespace bigkern::conv;
using T = __nv_bfloat16;

// Forward of integers that bf16 holds, with one kernel size, stride and padding along both axes and ReLU. Tensors are
// dense and channels_last. Staged: results leave by way of shared memory. cluster: how many blocks share pixels, by the
// plan. 0, or an error code whose message lands in `error`.
extern "C" int run_conv_hopper(int images, int channels, int height, int width, int filters, int kernel, int stride,
                               int padding, int staged, int cluster, const float* input, const float* weight,
                               float* output, char* error, int size) {
  const auto places = [&](int length) { return (length + 2 * padding - kernel) / stride + 1; };
  const auto rounded = [](const float* values, int64_t count) {
    std::vector<T> result(count);
    for (int64_t i = 0; i < count; i++) result[i] = from_float<T>(values[i]);
    return result;
  };
  const int line = width * channels, taps = kernel * kernel * channels;
  const std::vector<T> pixels = rounded(input, int64_t{images} * height * line);
  const std::vector<T> weights = rounded(weight, int64_t{filters} * taps);
  GemmParams p{};
  p.a = pixels.data(), p.a_image = int64_t{height} * line, p.a_row = line, p.a_pixel = channels, p.a_channel = 1;
  p.b = weights.data(), p.b_filter = taps, p.b_row = kernel * channels, p.b_tap = channels;
  p.height = {height, places(height), stride, padding, 1, kernel, 1};
  p.width = {width, places(width), stride, padding, 1, kernel, 1};
  p.images = images, p.groups = 1, p.channels = channels, p.filters = filters;
  constexpr int kTile = 2;
  const HopperPlan plan = plan_hopper(p, !staged);
  if (plan.tile != kTile || plan.layout.cluster != cluster) {
    std::strncpy(error, "the plan has another tile or cluster", size - 1);
    return 1;
  }
  std::vector<T> results(int64_t{images} * p.height.result * p.width.result * filters, from_float<T>(NAN));
  StoreOutput<T> store{};
  store.output = results.data(), store.row_filters = filters, store.activation = ConvActivation::kRelu;
  store.vectors = !staged;
  const int code = launch_hopper_tile<T, kTile>(plan, hopper_maps<T>(plan), store, nullptr);
  for (size_t i = 0; i < results.size(); i++) output[i] = to_float(results[i]);
  if (code != 0) std::strncpy(error, error_string(code), size - 1);
  return code;
}
