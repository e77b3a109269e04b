// What follows the sum of products: bias, activation, max pool; and their way back.
#pragma once

#include "kernels/conv_gemm.cuh"

namespace bigkern {
namespace conv {

constexpr float kSqrtHalf = 0.70710678118654752f;         // 1 / sqrt(2)
constexpr float kInverseSqrtTwoPi = 0.3989422804014327f;  // of the normal density
constexpr float kTanhScale = 0.7978845608028654f;         // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;

// NaN passes through every one, as in torch.
__device__ __forceinline__ float activate(float x, ConvActivation activation) {
  switch (activation) {
    case ConvActivation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case ConvActivation::kGelu:
      return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
    case ConvActivation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(kTanhScale * (x + kTanhCubic * x * x * x)));
    case ConvActivation::kSilu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

// The same of several, of which the kind is asked once.
template <int N>
__device__ __forceinline__ void activate(float (&values)[N], ConvActivation activation) {
  const auto each = [&](ConvActivation kind) {
#pragma unroll
    for (int j = 0; j < N; j++) values[j] = activate(values[j], kind);
  };
  switch (activation) {
    case ConvActivation::kRelu:
      return each(ConvActivation::kRelu);
    case ConvActivation::kGelu:
      return each(ConvActivation::kGelu);
    case ConvActivation::kGeluTanh:
      return each(ConvActivation::kGeluTanh);
    case ConvActivation::kSilu:
      return each(ConvActivation::kSilu);
    default:
      return;
  }
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

// The activation's derivative, with 1 - sigmoid(x) as sigmoid(-x), which keeps its digits where x is large: of relu at
// what it returned, of the others at what they were given.
__device__ __forceinline__ float activation_slope(float x, ConvActivation activation) {
  switch (activation) {
    case ConvActivation::kRelu:
      return x <= 0.0f ? 0.0f : 1.0f;
    case ConvActivation::kGelu:
      return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kInverseSqrtTwoPi * expf(-0.5f * x * x);
    case ConvActivation::kGeluTanh: {
      const float u = 2.0f * kTanhScale * (x + kTanhCubic * x * x * x);
      const float upper = sigmoid(u), slope = 2.0f * kTanhScale * (1.0f + 3.0f * kTanhCubic * x * x);
      return upper + x * upper * sigmoid(-u) * slope;
    }
    case ConvActivation::kSilu: {
      const float upper = sigmoid(x);
      return upper + x * upper * sigmoid(-x);
    }
    default:
      return 1.0f;
  }
}

template <class T, int V>
__device__ __forceinline__ void load_floats(const T* p, float (&values)[V]) {
  const Vec<T, V> loaded = load_vec<T, V>(p);
#pragma unroll
  for (int j = 0; j < V; j++) values[j] = to_float(loaded.v[j]);
}

// The first `count` of V values, at once where they are all there and aligned.
template <class T, int V>
__device__ __forceinline__ void store_some(T* p, const Vec<T, V>& values, int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) * V == 16) {
      __stcg(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&values));
    } else {
      store_vec<T, V>(p, values);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (j < count) p[j] = values.v[j];
  }
}

// Adds the first `count` of V values, read at once where they are all there and aligned.
template <class T, int V>
__device__ __forceinline__ void add_some(const T* p, int count, bool whole, float (&values)[V]) {
  if (whole) {
    const Vec<T, V> loaded = load_vec<T, V>(p);
#pragma unroll
    for (int j = 0; j < V; j++) values[j] += to_float(loaded.v[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (j < count) values[j] += to_float(p[j]);
  }
}

// Between four neighbouring lanes: word i of lane q becomes word q of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & apart) continue;
      const uint32_t low = words[i], high = words[i + apart];
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, apart);
      words[i] = upper ? other : low;
      words[i + apart] = upper ? high : other;
    }
  }
}

// The running maximum of a window, element by element of V channels: the first of equal ones, the last NaN.
template <class T, int V>
struct WindowMax {
  float value[V];
  int place[V];
  bool any = false;

  __device__ __forceinline__ void take(const float (&candidates)[V], int at) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float candidate = to_float(from_float<T>(candidates[j]));
      if (!any || candidate > value[j] || candidate != candidate) {
        value[j] = candidate;
        place[j] = at;
      }
    }
    any = true;
  }
};

// Stores activation(sum + bias + residual), or, without residual, its maxima over the pooling windows: the filters of a
// place side by side, or, where plane is not 0, the places of an image.
template <class T>
struct StoreOutput {
  const T* bias;        // or null
  const T* residual;    // as output, or null
  T* output;            // places x row_filters
  T* preactivation;     // or null
  uint8_t* argmax;      // or null
  int64_t row_filters;  // of all groups
  ConvActivation activation;
  bool vectors;   // whole vectors of filters, aligned, in all of them
  int64_t plane;  // places of an image of the result (NCHW), or 0 (NHWC)

  template <class Shape>
  __device__ __forceinline__ void store(const GemmParams& p, const TilePlace& tile, const float* results,
                                        const int64_t* places) const {
    constexpr int V = kVecElements<T>, kColumns = Shape::kN / V;
    static_assert(Shape::kThreads % kColumns == 0, "a thread keeps its columns");
    const int col = threadIdx.x % kColumns * V;
    const int count = p.filters - tile.n * Shape::kN - col;
    if (count <= 0) return;
    const int64_t first = int64_t{tile.group} * p.filters + tile.n * Shape::kN + col;
    const bool whole = vectors && count >= V;
    float shift[V];
#pragma unroll
    for (int j = 0; j < V; j++) shift[j] = bias != nullptr && j < count ? to_float(bias[first + j]) : 0.0f;

    auto sums = [&](int row, float (&values)[V]) {
      load_results<Shape>(results, row, col, values);
#pragma unroll
      for (int j = 0; j < V; j++) values[j] += shift[j];
    };
    if (p.pool_tile == PoolTile::kNone) {
      for (int row = threadIdx.x / kColumns; row < Shape::kM; row += Shape::kThreads / kColumns) {
        const int64_t place = places[row];
        if (place < 0) continue;
        float values[V];
        sums(row, values);
        const int64_t offset = place * row_filters + first;
        if (residual != nullptr) add_some(residual + offset, count, whole, values);
        Vec<T, V> rounded;
        if (preactivation != nullptr) {
#pragma unroll
          for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(values[j]);
          store_some(preactivation + offset, rounded, count, whole);
        }
#pragma unroll
        for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(activate(values[j], activation));
        store_some(output + offset, rounded, count, whole);
      }
      return;
    }
    for (int window = threadIdx.x / kColumns; window < p.windows; window += Shape::kThreads / kColumns) {
      int row;
      const int64_t place = pooled_place(p, tile, window, row);
      if (place < 0) continue;
      const int pitch = window_pitch(p);
      WindowMax<T, V> best;
      for (int y = 0; y < p.pool.kernel_h; y++) {
        for (int x = 0; x < p.pool.kernel_w; x++) {
          const int at = row + y * pitch + x;
          if (places[at] < 0) continue;
          float values[V];
          sums(at, values);
#pragma unroll
          for (int j = 0; j < V; j++) values[j] = activate(values[j], activation);
          best.take(values, y * p.pool.kernel_w + x);
        }
      }
      const int64_t offset = place * row_filters + first;
      Vec<T, V> rounded;
#pragma unroll
      for (int j = 0; j < V; j++) rounded.v[j] = from_float<T>(best.value[j]);
      store_some(output + offset, rounded, count, whole);
      if (argmax != nullptr) {
        Vec<uint8_t, V> at;
#pragma unroll
        for (int j = 0; j < V; j++) at.v[j] = static_cast<uint8_t>(best.place[j]);
        store_some(argmax + offset, at, count, whole);
      }
      if (preactivation != nullptr) {
#pragma unroll
        for (int j = 0; j < V; j++) {
          const int at = row + best.place[j] / p.pool.kernel_w * pitch + best.place[j] % p.pool.kernel_w;
          rounded.v[j] = from_float<T>(results[at * kResultPitch<Shape> + col + j] + shift[j]);
        }
        store_some(preactivation + offset, rounded, count, whole);
      }
    }
  }

  // 32 filters of a place, `first` and on, as wgmma leaves them to four neighbouring lanes: values[2 b + e] is filter
  // 8 b + 2 (lane % 4) + e. Through an exchange each stores 8 neighbours. shift is the bias of the lane's filters,
  // added what load_quad gave. Where there are whole vectors only; all lanes of a warp call, those without a place with
  // -1.
  __device__ __forceinline__ void store_quad(const GemmParams& p, int64_t place, int first, const float (&shift)[8],
                                             const uint4& added, float (&values)[8]) const {
    const int col = first + threadIdx.x % 4 * 8;
    const bool stores = place >= 0 && col < p.filters;
    const int64_t offset = place * row_filters + col;
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] += shift[j];
    if (residual != nullptr) {
      uint32_t words[4] = {added.x, added.y, added.z, added.w};
      transpose_quad(words);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        Vec<T, 2> pair;
        memcpy(&pair, &words[j], sizeof(pair));
        values[2 * j] += to_float(pair.v[0]);
        values[2 * j + 1] += to_float(pair.v[1]);
      }
    }
    if (preactivation != nullptr) store_exchanged(preactivation + offset, values, stores);
    activate(values, activation);
    store_exchanged(output + offset, values, stores);
  }

  // The 8 neighbours of the residual that this lane adds in store_quad; zeros where there are none.
  __device__ __forceinline__ uint4 load_quad(const GemmParams& p, int64_t place, int first) const {
    const int col = first + threadIdx.x % 4 * 8;
    if (residual == nullptr || place < 0 || col >= p.filters) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(residual + place * row_filters + col);
  }

  // A warp has the places of one filter.
  template <class Shape>
  __device__ __forceinline__ void store_planes(const GemmParams& p, const TilePlace& tile, const float* results,
                                               const int64_t* places) const {
    const bool pooled = p.pool_tile != PoolTile::kNone;
    const int items = pooled ? p.windows : Shape::kM, pitch = window_pitch(p);
    const int count = min(p.filters - tile.n * Shape::kN, Shape::kN);
    const int64_t first = int64_t{tile.group} * p.filters + tile.n * Shape::kN;
    for (int item = threadIdx.x % 32; item < items; item += 32) {
      int row = item;
      const int64_t place = pooled ? pooled_place(p, tile, item, row) : places[item];
      if (place < 0) continue;
      const int64_t image = place / plane, start = (image * row_filters + first) * plane + place - image * plane;
      for (int col = threadIdx.x / 32; col < count; col += Shape::kThreads / 32) {
        const float* const column = results + col * kColumnPitch<Shape>;
        const float bias_of_filter = bias != nullptr ? to_float(bias[first + col]) : 0.0f;
        const int64_t offset = start + col * plane;
        const float shift = residual != nullptr ? bias_of_filter + to_float(residual[offset]) : bias_of_filter;
        int from = row;
        float value[1] = {activate(column[row] + shift, activation)};
        if (pooled) {
          WindowMax<T, 1> best;
          for (int y = 0; y < p.pool.kernel_h; y++) {
            for (int x = 0; x < p.pool.kernel_w; x++) {
              const int at = row + y * pitch + x;
              if (places[at] < 0) continue;
              value[0] = activate(column[at] + shift, activation);
              best.take(value, y * p.pool.kernel_w + x);
            }
          }
          value[0] = best.value[0];
          from = row + best.place[0] / p.pool.kernel_w * pitch + best.place[0] % p.pool.kernel_w;
          if (argmax != nullptr) argmax[offset] = static_cast<uint8_t>(best.place[0]);
        }
        output[offset] = from_float<T>(value[0]);
        if (preactivation != nullptr) preactivation[offset] = from_float<T>(column[from] + shift);
      }
    }
  }

 private:
  static __device__ __forceinline__ void store_exchanged(T* p, const float (&values)[8], bool stores) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Vec<T, 2> pair{{from_float<T>(values[2 * j]), from_float<T>(values[2 * j + 1])}};
      memcpy(&words[j], &pair, sizeof(pair));
    }
    transpose_quad(words);
    if (stores) __stcg(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
  }

  // V results of a row. Of 8, lanes 4 to 7 of every 8 read their second half first: 8 lanes then read 128 different
  // bytes of the 256 that are theirs.
  template <class Shape, int V>
  static __device__ __forceinline__ void load_results(const float* results, int row, int col, float (&values)[V]) {
    const float* const p = results + row * kResultPitch<Shape> + col;
    if constexpr (V == 4) {
      load_floats<float, V>(p, values);
    } else {
      const bool swap = threadIdx.x & 4;
      const float4 one = *reinterpret_cast<const float4*>(p + (swap ? 4 : 0));
      const float4 other = *reinterpret_cast<const float4*>(p + (swap ? 0 : 4));
      const float4 low = swap ? other : one, high = swap ? one : other;
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    }
  }

  // Rows of the tile from one line of a window to the next.
  static __device__ __forceinline__ int window_pitch(const GemmParams& p) {
    return p.pool_tile == PoolTile::kBox ? p.box_w : p.pool.kernel_w;
  }

  // The pooled place of a tile's window, or -1, and the row of the tile that the window starts at.
  static __device__ __forceinline__ int64_t pooled_place(const GemmParams& p, const TilePlace& tile, int window,
                                                         int& row) {
    if (p.pool_tile == PoolTile::kWindows) {
      row = window * p.pool.kernel_h * p.pool.kernel_w;
      const int64_t place = tile.m * p.windows + window;
      return place < p.images * p.pool.out_h * p.pool.out_w ? place : -1;
    }
    const int i = window / p.tile_w, j = window % p.tile_w;
    row = i * p.pool.stride_h * p.box_w + j * p.pool.stride_w;
    const int64_t line = tile.m / p.boxes_w, image = line / p.boxes_h;
    const int out_h = static_cast<int>(line - image * p.boxes_h) * p.tile_h + i;
    const int out_w = static_cast<int>(tile.m - line * p.boxes_w) * p.tile_w + j;
    if (out_h >= p.pool.out_h || out_w >= p.pool.out_w) return -1;
    return (image * p.pool.out_h + out_h) * p.pool.out_w + out_w;
  }
};

}  // namespace conv
}  // namespace bigkern
