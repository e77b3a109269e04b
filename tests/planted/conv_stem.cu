// The entry point through which the planted-bug trials call convolution's stem kernel, emulated: one instance of it.
#include "kernels/conv_stem.cuh"

#include <cstring>
#include <vector>

using namespace bigkern;
using namespace bigkern::conv;
using T = __nv_bfloat16;

// Forward of integers that bf16 holds, with ReLU and a 3x3 max pool by 2. Images are dense, in channels_last or not;
// results too. 0, or an error code whose message lands in `error`.
extern "C" int run_conv_stem(int images, int channels, int height, int width, int filters, int kernel, int stride,
                             int padding, int channels_last, const float* input, const float* weight, const float* bias,
                             float* output, uint8_t* argmax, char* error, int size) {
  const auto places = [](int length, int window, int step, int pad) { return (length + 2 * pad - window) / step + 1; };
  const auto rounded = [](const float* values, int64_t count) {
    std::vector<T> result(count);
    for (int64_t i = 0; i < count; i++) result[i] = from_float<T>(values[i]);
    return result;
  };
  const auto strides = [&](const void* data, int rows, int columns) {
    const int64_t plane = int64_t{rows} * columns;
    return channels_last ? ConvTensor{data, plane * channels, 1, int64_t{columns} * channels, channels}
                         : ConvTensor{data, plane * channels, plane, columns, 1};
  };
  const int64_t pixels = int64_t{images} * channels * height * width;
  const std::vector<T> image = rounded(input, pixels), taps = rounded(weight, filters * channels * kernel * kernel);
  const std::vector<T> shift = rounded(bias, filters);
  // Lines that are copied in chunks begin where those are aligned.
  std::vector<T> storage(pixels + 8);
  T* const aligned = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16 / sizeof(T);
  std::copy(image.begin(), image.end(), aligned);

  ConvForwardParams params{};
  params.shape = {images, channels, height, width, filters, kernel, kernel};
  ConvShape& s = params.shape;
  s.out_h = places(height, kernel, stride, padding), s.out_w = places(width, kernel, stride, padding);
  s.stride_h = s.stride_w = stride, s.padding_h = s.padding_w = padding;
  s.dilation_h = s.dilation_w = s.groups = 1;
  params.pool = {3, 3, 2, 2, 1, 1, places(s.out_h, 3, 2, 1), places(s.out_w, 3, 2, 1)};
  params.activation = ConvActivation::kRelu;
  params.input = strides(aligned, height, width), params.weight = strides(taps.data(), kernel, kernel);
  params.bias = shift.data();
  std::vector<T> results(int64_t{images} * filters * params.pool.out_h * params.pool.out_w, from_float<T>(NAN));
  params.output = results.data(), params.argmax = argmax;
  params.channels_last = channels_last;
  StemParams p;
  if (!plan_stem(params, p)) {
    std::strncpy(error, "the plan refuses the shape", size - 1);
    return 1;
  }
  const int code = launch_stem_tile<T, kStemFiltersFew>(p, nullptr);
  for (size_t i = 0; i < results.size(); i++) output[i] = to_float(results[i]);
  if (code != 0) std::strncpy(error, error_string(code), size - 1);
  return code;
}
