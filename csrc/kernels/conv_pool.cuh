// Max pooling as a pass of its own, for windows that no tile of the product holds, and the way back through pooling and
// activation. Both are bound by memory; a thread has V neighbouring channels of one place.
//
//   pool:      reads the convolution once (windows that overlap: from the caches again), writes the output
//   backward:  reads gradient, argmax and what the activation's slope needs for every window over a place; writes the
//              convolution's gradient once. A gather in a fixed order: no atomics.
#pragma once

#include "kernels/conv_epilogue.cuh"

namespace bigkern {
namespace conv {

constexpr int kPoolThreads = 256;

template <class T>
struct PoolParams {
  const T* conv;  // images x conv_h x conv_w x filters, before the activation
  int64_t images;
  int filters, conv_h, conv_w;
  ConvPool pool;
  ConvActivation activation;
  T* output;         // images x out_h x out_w x filters
  T* preactivation;  // or null
  uint8_t* argmax;   // or null
};

// Strided operands of the backward pass: channels contiguous, or V is 1.
template <class T>
struct BackwardEpilogueParams {
  int64_t images;
  int filters, conv_h, conv_w;
  ConvPool pool;  // kernel_h 0: none
  ConvActivation activation;
  ConvTensor grad_output, argument, argmax;  // argument: what activation_slope takes
  T* grad_conv;                              // images x conv_h x conv_w x filters
};

// The V channels that a thread of an elementwise kernel has, of images x height x width places.
struct Element {
  int64_t image;
  int h, w, channel;
  bool valid;

  __device__ __forceinline__ Element(int64_t images, int height, int width, int channels, int vector) {
    const int groups = channels / vector;
    const int64_t index = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x, place = index / groups,
                  line = place / width;
    channel = static_cast<int>(index - place * groups) * vector;
    w = static_cast<int>(place - line * width);
    image = line / height;
    h = static_cast<int>(line - image * height);
    valid = image < images;
  }
};

}  // namespace conv

template <class T, int V>
__global__ void __launch_bounds__(conv::kPoolThreads, 2) conv_pool_kernel(const conv::PoolParams<T> p) {
  using namespace conv;
  const Element at(p.images, p.pool.out_h, p.pool.out_w, p.filters, V);
  if (!at.valid) return;
  const T* const image = p.conv + at.image * p.conv_h * p.conv_w * p.filters + at.channel;
  auto load = [&](int h, int w, float (&values)[V]) {
    load_floats<T, V>(image + (int64_t{h} * p.conv_w + w) * p.filters, values);
  };
  const int h0 = at.h * p.pool.stride_h - p.pool.padding_h, w0 = at.w * p.pool.stride_w - p.pool.padding_w;
  WindowMax<T, V> best;
  for (int y = 0; y < p.pool.kernel_h; y++) {
    for (int x = 0; x < p.pool.kernel_w; x++) {
      if (!within(h0 + y, p.conv_h) || !within(w0 + x, p.conv_w)) continue;
      float values[V];
      load(h0 + y, w0 + x, values);
#pragma unroll
      for (int j = 0; j < V; j++) values[j] = activate(values[j], p.activation);
      best.take(values, y * p.pool.kernel_w + x);
    }
  }
  const int64_t place = (at.image * p.pool.out_h + at.h) * p.pool.out_w + at.w, offset = place * p.filters + at.channel;
  Vec<T, V> rounded;
#pragma unroll
  for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(best.value[j]);
  store_some(p.output + offset, rounded, V, true);
  if (p.argmax != nullptr) {
    Vec<uint8_t, V> places;
#pragma unroll
    for (int j = 0; j < V; j++) places.v[j] = static_cast<uint8_t>(best.place[j]);
    store_some(p.argmax + offset, places, V, true);
  }
  if (p.preactivation != nullptr) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      const int h = h0 + best.place[j] / p.pool.kernel_w, w = w0 + best.place[j] % p.pool.kernel_w;
      rounded.v[j] = image[(int64_t{h} * p.conv_w + w) * p.filters + j];
    }
    store_some(p.preactivation + offset, rounded, V, true);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(conv::kPoolThreads, 2)
    conv_backward_epilogue_kernel(const conv::BackwardEpilogueParams<T> p) {
  using namespace conv;
  const Element at(p.images, p.conv_h, p.conv_w, p.filters, V);
  if (!at.valid) return;
  float sum[V] = {};
  // Adds the gradient of output place (h, w) where that came from this place.
  auto add = [&](int h, int w, int place_in_window) {
    auto offset = [&](const ConvTensor& t) {
      return at.image * t.image + at.channel * t.channel + h * t.row + w * t.column;
    };
    float grad[V], argument[V];
    Vec<uint8_t, V> from;
    load_floats<T, V>(static_cast<const T*>(p.grad_output.data) + offset(p.grad_output), grad);
    if (p.activation != ConvActivation::kNone) {
      load_floats<T, V>(static_cast<const T*>(p.argument.data) + offset(p.argument), argument);
    }
    if (p.pool.kernel_h > 0) from = load_vec<uint8_t, V>(static_cast<const uint8_t*>(p.argmax.data) + offset(p.argmax));
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float slope = p.activation == ConvActivation::kNone ? 1.0f : activation_slope(argument[j], p.activation);
      const bool mine = p.pool.kernel_h == 0 || from.v[j] == place_in_window;
      if (mine) sum[j] += slope == 0.0f ? 0.0f : grad[j] * slope;
    }
  };
  if (p.pool.kernel_h == 0) {
    add(at.h, at.w, 0);
  } else {
    const int h = at.h + p.pool.padding_h, w = at.w + p.pool.padding_w;
    const int first_h = h < p.pool.kernel_h ? 0 : (h - p.pool.kernel_h) / p.pool.stride_h + 1;
    const int first_w = w < p.pool.kernel_w ? 0 : (w - p.pool.kernel_w) / p.pool.stride_w + 1;
    for (int i = first_h; i <= h / p.pool.stride_h && i < p.pool.out_h; i++) {
      for (int j = first_w; j <= w / p.pool.stride_w && j < p.pool.out_w; j++) {
        add(i, j, (h - i * p.pool.stride_h) * p.pool.kernel_w + w - j * p.pool.stride_w);
      }
    }
  }
  Vec<T, V> rounded;
#pragma unroll
  for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(sum[j]);
  const int64_t place = (at.image * p.conv_h + at.h) * p.conv_w + at.w;
  store_some(p.grad_conv + place * p.filters + at.channel, rounded, V, true);
}

namespace conv {

inline LaunchConfig elementwise_grid(int64_t elements, Stream stream) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(elements, kPoolThreads))), dim3(kPoolThreads), 0, stream};
}

template <class T>
int launch_pool(const PoolParams<T>& p, Stream stream) {
  constexpr int V = kVecElements<T>;
  const int64_t elements = p.images * p.pool.out_h * p.pool.out_w * p.filters;
  return p.filters % V == 0 ? launch(conv_pool_kernel<T, V>, elementwise_grid(elements / V, stream), p)
                            : launch(conv_pool_kernel<T, 1>, elementwise_grid(elements, stream), p);
}

}  // namespace conv
}  // namespace bigkern
