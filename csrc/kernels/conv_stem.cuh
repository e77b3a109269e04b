// The first convolution of a network: 1 to 4 channels, with bias, activation and max pool, for 16-bit elements from
// sm_80 on. Images are read as they lie, NCHW or channels_last, without a copy, a gather or padded channels.
//
// A line is a row of an image in channels_last (pixels side by side), or of one channel in NCHW. Under one tap row the
// window of a place is a run of a line: S C or S neighbouring elements, whatever those are. So k runs over (line, place
// in the run), by pairs of elements, and mma's fragments of a are pairs of k: each of its registers is one aligned word
// of a raw line in shared memory. Runs that start at an odd element start one earlier; what a pair holds beyond its run
// is masked, for it may be no number. If neighbouring places start an odd number of elements apart, every other run
// would: those are read from a second copy of the lines, one element on. 7x7 over RGB takes 160 (channels_last) or 176
// (NCHW) values of k for 147; pixels padded to four channels would take 224.
//
//   block: all taps of kN filters, resident; then box after box of 256 places, pooling windows with all their places
//   shared: [filters][table of k's pairs][where rows start][bias][results, 16-bit][lines, twice][lines one element on]
//
//   box i:  lines landed -> barrier -> start copies of box i + 1 -> multiply -> results -> barrier -> pool and store
//
// Neighbouring boxes compute their common halo twice: 15 x 17 places for 7 x 8 windows of 3x3 by 2, 1.14 times.
// Results wait in shared memory in the output's type. Rounding there changes neither relu nor maxima; the other
// activations are given what is saved for their backward, the rounded sum, as if convolved in a pass before.
//
// Floor of ResNet's stem, 256 x 3 x 224 x 224 to 64 filters, ReLU, 3x3 by 2: 60.4 GFLOP, and 180 MB: 42 us at 4.3 TB/s;
// with argmax 231 MB, 54 us. Convolution, ReLU and pool apart would move 1,824 MB, 424 us. Model of a box on one
// multiprocessor of an H200, channels_last, 10 steps of k; not measured:
//   tensor cores   1,280 products of 16 x 8 x 16, 2,540 FLOP a cycle by mma.sync (62 % of 4,096)     2,064 cycles
//   shared memory  a step of a warp: 16 words of a, a quarter of which cross lines and take two turns,
//                  4 matrices of b of 4 turns, 1 row of the table: 37; 4 warps, 10 steps             1,480 wavefronts
//                  results written and read: 256 + 504; lines: 90                                      850
//   issue          a step: 32 products, 20 loads, 32 additions and masks; 900 a warp, results 350, windows 660: 1,910
// 14,336 boxes on 132 multiprocessors: 109 of 2,330 cycles (shared memory), 159 us at 1.6 GHz, if the two blocks of a
// multiprocessor (80 KB each) overlap one's products with the other's windows. A warp has 64 x 64 sums, 128 of its 252
// registers a thread: 32 x 64 would read b twice as often, 24 instead of 16 wavefronts for 16 products.
#pragma once

#include "kernels/conv_epilogue.cuh"
#include "kernels/conv_layout.cuh"

#include <algorithm>
#include <climits>

namespace bigkern {
namespace conv {

constexpr int kStemChannels = 4;
// What a block of any architecture from sm_80 on may have.
constexpr size_t kStemShared = 99 << 10;

// 256 places by 4 warps; of 32 filters where there are no more.
template <class T, int kFilters>
using StemShape = TileShape<T, 256, kFilters, 4, 1>;
constexpr int kStemPlaces = 256, kStemFilters = 64, kStemFiltersFew = 32;

struct StemParams {
  const void* input;
  int64_t input_image, input_plane, input_row;  // strides; a line is contiguous
  ConvTensor weight;
  const void* bias;  // or null
  void* output;
  void* preactivation;                                 // or null
  uint8_t* argmax;                                     // or null
  int64_t out_image, out_filter, out_row, out_column;  // of all three
  ConvActivation activation;
  ConvPool pool;  // windows of one place where there is none
  int64_t images;
  int channels, height, filters, kernel_h;
  int conv_h, conv_w;
  int stride_h, padding_h;

  bool pixels;  // lines of whole pixels, not of one channel
  int planes;   // lines side by side of one row of an image
  int line;     // elements of a line
  int step;     // elements between the runs of neighbouring places
  int padding;  // elements that the first place's run starts before the line
  int run;      // elements of a line under one place

  int tile_h, tile_w, boxes_h, boxes_w;  // windows of a box, boxes of an image
  int box_h, box_w;                      // places of a box
  int64_t tiles;
  int tiles_n;
  int rows, chunks, pitch;  // a box's rows of the image; 16 bytes of a line; words from line to line
  int pairs, k_steps;       // words of a run; steps of 16 values of k
  bool copies;              // chunks by cp.async

  __host__ __device__ bool odd() const { return step % 2 != 0; }
  // Where runs start at an odd element, all of them.
  __host__ __device__ int lead() const { return odd() ? 0 : padding % 2; }
  __host__ __device__ int lines_words() const { return planes * rows * pitch; }
};

// Elements of a filter's row, 16 bytes beyond a multiple of 32: ldmatrix's 8 rows fall into 8 different places.
__host__ __device__ inline int stem_filter_pitch(int k_steps) {
  return 16 * k_steps + 8;
}

// To the second copy, whose rows take turns with the first's: half the banks away.
__host__ __device__ inline int stem_copy_words(const StemParams& p) {
  return round_up(2 * p.lines_words(), 32) + 16;
}

__host__ __device__ inline int stem_words(const StemParams& p) {
  return p.odd() ? stem_copy_words(p) + p.lines_words() : 2 * p.lines_words();
}

inline size_t stem_shared_bytes(const StemParams& p, int filters) {
  const size_t taps = filters * stem_filter_pitch(p.k_steps) * 2, results = kStemPlaces * (filters + 8) * 2;
  return taps + p.k_steps * 64 + kStemPlaces * 4 + filters * 4 + results + stem_words(p) * 4;
}

// A box: its first place, which padding may put outside, and its first window.
struct StemBox {
  int64_t image;
  int h, w, out_h, out_w;
  int first;  // element of a line from which shared memory has it
  int phase;  // elements from there to the first place's run

  __device__ __forceinline__ StemBox(const StemParams& p, int64_t tile) {
    const int64_t line = tile / p.boxes_w;
    image = line / p.boxes_h;
    out_h = static_cast<int>(line - image * p.boxes_h) * p.tile_h;
    out_w = static_cast<int>(tile - line * p.boxes_w) * p.tile_w;
    h = out_h * p.pool.stride_h - p.pool.padding_h;
    w = out_w * p.pool.stride_w - p.pool.padding_w;
    const int start = w * p.step - p.padding;
    phase = start & 7;
    first = start - phase;
  }
};

// Starts copies of a box's lines, zeros where they leave the image.
template <class T, class Shape>
__device__ __forceinline__ void load_stem_box(const StemParams& p, const StemBox& box, T* lines) {
  const T* const image = static_cast<const T*>(p.input) + box.image * p.input_image;
  const int top = box.h * p.stride_h - p.padding_h;
  for (int plane = 0; plane < p.planes; plane++) {
    for (int i = threadIdx.x; i < p.rows * p.chunks; i += Shape::kThreads) {
      const int row = i / p.chunks, chunk = i % p.chunks * 8, element = box.first + chunk;
      T* const to = lines + (plane * p.rows + row) * p.pitch * 2 + chunk;
      const bool inside = within(top + row, p.height);
      const T* const from = image + plane * p.input_plane + (top + row) * p.input_row + element;
      if (p.copies) {
        const bool valid = inside && within(element, p.line);
        cp_async16(to, valid ? from : p.input, valid);
        continue;
      }
      Vec<T, 8> values;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        values.v[j] = inside && within(element + j, p.line) ? from[j] : from_float<T>(0.0f);
      }
      store_vec<T, 8>(to, values);
    }
  }
}

// Pairs of k as a thread's fragments take them: t and t + 4 of eight, as bytes from a run's start and masks of what
// belongs to the run.
struct alignas(16) StemPairs {
  uint32_t offset[2], mask[2];
};

__device__ __forceinline__ void describe_stem_pair(const StemParams& p, int pair, StemPairs* table) {
  const int line = pair / p.pairs, word = pair - line * p.pairs, plane = line / p.kernel_h;
  const bool inside = plane < p.planes;
  const int row = plane * p.rows + line - plane * p.kernel_h, element = 2 * word - p.lead();
  StemPairs& entry = table[pair / 8 * 4 + pair % 4];
  entry.offset[pair / 4 % 2] = inside ? (row * p.pitch + word) * 4 : 0;
  entry.mask[pair / 4 % 2] =
      inside ? (within(element, p.run) ? 0xffffu : 0) | (within(element + 1, p.run) ? 0xffff0000u : 0) : 0;
}

// One value of k of every filter.
template <class T, class Shape>
__device__ __forceinline__ void load_stem_taps(const StemParams& p, int first_filter, int k, T* filters) {
  const int line = k / 2 / p.pairs, place = k - 2 * line * p.pairs - p.lead();
  const int plane = line / p.kernel_h, r = line - plane * p.kernel_h;
  const bool inside = plane < p.planes && within(place, p.run);
  const int channel = p.pixels ? place % p.channels : plane, s = p.pixels ? place / p.channels : place;
  const T* const from = static_cast<const T*>(p.weight.data) + first_filter * p.weight.image +
                        channel * p.weight.channel + r * p.weight.row + s * p.weight.column;
  const int pitch = stem_filter_pitch(p.k_steps);
#pragma unroll 16
  for (int i = 0; i < Shape::kN; i++) {
    const bool valid = inside && first_filter + i < p.filters;
    filters[i * pitch + k] = valid ? from[i * p.weight.image] : from_float<T>(0.0f);
  }
}

template <class T, class Shape>
struct StemFragments {
  using Sums = Accumulators<T, Shape, TensorCores>;
  uint32_t a[Sums::kFragmentsM][4], b[Sums::kFragmentsN / 2][4];

  __device__ __forceinline__ void load(const unsigned char* lines, const uint32_t (&runs)[Sums::kFragmentsM][2],
                                       const StemPairs& pairs, const T* filters, int filter_pitch) {
#pragma unroll
    for (int i = 0; i < Sums::kFragmentsM; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const uint32_t at = runs[i][e % 2] + pairs.offset[e / 2];
        a[i][e] = *reinterpret_cast<const uint32_t*>(lines + at) & pairs.mask[e / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < Sums::kFragmentsN / 2; j++) ldmatrix_x4(b[j], filters + 16 * j * filter_pitch);
  }
};

// V neighbouring elements, each in the upper half of a word.
template <class T, int V>
__device__ __forceinline__ void load_upper_halves(const T* p, uint32_t (&halves)[V]) {
  if constexpr (V == 1) {
    halves[0] = uint32_t{*reinterpret_cast<const uint16_t*>(p)} << 16;
  } else {
    const Vec<uint32_t, V / 2> words = load_vec<uint32_t, V / 2>(reinterpret_cast<const uint32_t*>(p));
#pragma unroll
    for (int j = 0; j < V; j++) halves[j] = j % 2 == 0 ? words.v[j / 2] << 16 : words.v[j / 2] & 0xffff0000u;
  }
}

// Pools and stores a box's results: by rows of filters, V of them a thread, or, V being 1, by columns of places.
template <class T, class Shape, int V>
__device__ __forceinline__ void store_stem_box(const StemParams& p, const StemBox& box, int first_filter,
                                               const T* results) {
  constexpr bool kRows = V > 1;
  constexpr int kPlacePitch = kRows ? kResultPitch<Shape> : 1, kFilterPitch = kRows ? 1 : kColumnPitch<Shape>;
  constexpr int kVectors = Shape::kN / V, kWarps = Shape::kThreads / 32;
  constexpr int kWindowStep = kRows ? Shape::kThreads / kVectors : 32, kFilterStep = kRows ? Shape::kN : kWarps;
  const int thread = threadIdx.x, filters = min(p.filters - first_filter, Shape::kN);
  for (int window = kRows ? thread / kVectors : thread % 32; window < p.tile_h * p.tile_w; window += kWindowStep) {
    const int i = window / p.tile_w, j = window - i * p.tile_w;
    if (box.out_h + i >= p.pool.out_h || box.out_w + j >= p.pool.out_w) continue;
    // The window's first place, and which of its places are the image's.
    const int row = i * p.pool.stride_h, col = j * p.pool.stride_w, h = box.h + row, w = box.w + col;
    const int top = max(0, -h), bottom = min(p.pool.kernel_h, p.conv_h - h);
    const int left = max(0, -w), right = min(p.pool.kernel_w, p.conv_w - w);
    const int64_t place = box.image * p.out_image + (box.out_h + i) * p.out_row + (box.out_w + j) * p.out_column +
                          first_filter * p.out_filter;
    for (int filter = kRows ? thread % kVectors * V : thread / 32; filter < filters; filter += kFilterStep) {
      const T* const from = results + (row * p.box_w + col) * kPlacePitch + filter * kFilterPitch;
      const auto candidate = [&](int y, int x) { return from + (y * p.box_w + x) * kPlacePitch; };
      WindowMax<T, V> best;
      bool numbers = p.activation == ConvActivation::kRelu;
      if (numbers) {
        // What relu leaves compares as its bits do; below them, the first place has the largest tag.
        uint32_t keys[V] = {};
        for (int y = top; y < bottom; y++) {
          for (int x = left; x < right; x++) {
            const uint32_t tag = 0xffffu - (y * p.pool.kernel_w + x);
            uint32_t halves[V];
            load_upper_halves<T, V>(candidate(y, x), halves);
#pragma unroll
            for (int e = 0; e < V; e++) keys[e] = max(keys[e], halves[e] | tag);
          }
        }
#pragma unroll
        for (int e = 0; e < V; e++) {
          const uint16_t bits = static_cast<uint16_t>(keys[e] >> 16);
          best.value[e] = to_float(*reinterpret_cast<const T*>(&bits));
          best.place[e] = 0xffff - (keys[e] & 0xffff);
          numbers = numbers && best.value[e] == best.value[e];
        }
      }
      if (!numbers) {
        best = {};
        for (int y = top; y < bottom; y++) {
          for (int x = left; x < right; x++) {
            float values[V];
            load_floats<T, V>(candidate(y, x), values);
#pragma unroll
            for (int e = 0; e < V; e++) values[e] = activate(values[e], p.activation);
            best.take(values, y * p.pool.kernel_w + x);
          }
        }
      }
      const int64_t offset = place + filter * p.out_filter;
      const int count = filters - filter;
      const bool whole = count >= V && p.filters % V == 0;
      Vec<T, V> rounded;
#pragma unroll
      for (int e = 0; e < V; e++) rounded.v[e] = from_float<T>(best.value[e]);
      store_some(static_cast<T*>(p.output) + offset, rounded, count, whole);
      if (p.argmax != nullptr) {
        Vec<uint8_t, V> places;
#pragma unroll
        for (int e = 0; e < V; e++) places.v[e] = static_cast<uint8_t>(best.place[e]);
        store_some(p.argmax + offset, places, count, whole);
      }
      if (p.preactivation != nullptr) {
#pragma unroll
        for (int e = 0; e < V; e++) {
          const int y = best.place[e] / p.pool.kernel_w;
          rounded.v[e] = candidate(y, best.place[e] - y * p.pool.kernel_w)[e * kFilterPitch];
        }
        store_some(static_cast<T*>(p.preactivation) + offset, rounded, count, whole);
      }
    }
  }
}

}  // namespace conv

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) conv_stem_kernel(const conv::StemParams p) {
  using namespace conv;
  using Sums = Accumulators<T, Shape, TensorCores>;
  using Fragments = StemFragments<T, Shape>;
  const int filter_pitch = stem_filter_pitch(p.k_steps);
  SharedMemory shared;
  T* const filters = shared.take<T>(Shape::kN * filter_pitch, 128);
  StemPairs* const pairs = shared.take<StemPairs>(4 * p.k_steps);
  uint32_t* const starts = shared.take<uint32_t>(Shape::kM);  // of a row's run: words before its line, elements in it
  float* const bias = shared.take<float>(Shape::kN);
  T* const results = shared.take<T>(Shape::kM * kResultPitch<Shape>);
  uint32_t* const lines = shared.take<uint32_t>(stem_words(p));
  const int block = blockIdx.x / p.tiles_n, blocks = gridDim.x / p.tiles_n;
  const int first_filter = blockIdx.x % p.tiles_n * Shape::kN;

  int64_t tile = block;
  if (tile < p.tiles) load_stem_box<T, Shape>(p, StemBox(p, tile), reinterpret_cast<T*>(lines));
  cp_async_commit();

  for (int k = threadIdx.x; k < 16 * p.k_steps; k += Shape::kThreads) {
    load_stem_taps<T, Shape>(p, first_filter, k, filters);
    if (k % 2 == 0) describe_stem_pair(p, k / 2, pairs);
  }
  for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads) {
    const bool some = p.bias != nullptr && first_filter + i < p.filters;
    bias[i] = some ? to_float(static_cast<const T*>(p.bias)[first_filter + i]) : 0.0f;
  }
  for (int i = threadIdx.x; i < Shape::kM; i += Shape::kThreads) {
    const int y = i / p.box_w, x = i - y * p.box_w;
    starts[i] = y < p.box_h ? (y * p.stride_h * p.pitch) << 16 | x * p.step : 0;
  }

  const int lane = Sums::lane();
  const T* const filter_rows = filters + (lane % 8 + lane / 16 * 8) * filter_pitch + lane / 8 % 2 * 8;
  const bool relu = p.activation == ConvActivation::kRelu;
  for (int buffer = 0; tile < p.tiles; tile += blocks, buffer ^= 1) {
    const StemBox box(p, tile);
    uint32_t* const landed = lines + buffer * p.lines_words();
    cp_async_wait<0>();
    __syncthreads();  // the lines have landed for all, and all have left the other buffer and the results
    if (tile + blocks < p.tiles) {
      load_stem_box<T, Shape>(p, StemBox(p, tile + blocks),
                              reinterpret_cast<T*>(lines + (buffer ^ 1) * p.lines_words()));
    }
    cp_async_commit();
    if (p.odd()) {
      uint32_t* const shifted = lines + stem_copy_words(p);
      const int words = 4 * p.chunks;
      for (int line = threadIdx.x / 32; line < p.planes * p.rows; line += Shape::kThreads / 32) {
        for (int word = lane; word < words; word += 32) {
          const int at = line * p.pitch + word;
          const uint32_t next = word + 1 < words ? landed[at + 1] : 0;  // behind the last one is no run
          shifted[at] = landed[at] >> 16 | next << 16;
        }
      }
      __syncthreads();  // the copy is whole
    }

    uint32_t runs[Sums::kFragmentsM][2];
#pragma unroll
    for (int i = 0; i < Sums::kFragmentsM; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t start = starts[Sums::first_row() + 16 * i + lane / 4 + 8 * half];
        const uint32_t element = (start & 0xffff) + box.phase;
        const bool other = p.odd() && element % 2 != 0;
        const int words = other ? stem_copy_words(p) : buffer * p.lines_words();
        runs[i][half] = ((start >> 16) + element / 2 + words) * 4;
      }
    }
    Sums sums;
#pragma unroll
    for (int j = 0; j < Sums::kFragmentsN; j++) {
      const float2 shift = *reinterpret_cast<const float2*>(bias + 8 * j + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < Sums::kFragmentsM; i++) {
        sums.values[i][j][0] = sums.values[i][j][2] = shift.x;
        sums.values[i][j][1] = sums.values[i][j][3] = shift.y;
      }
    }
    // Fragments of one step are loaded while those of the other are multiplied.
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(lines);
    Fragments even, odd;
    const auto load = [&](int step, Fragments& fragments) {
      if (step >= p.k_steps) return;
      fragments.load(bytes, runs, pairs[4 * step + lane % 4], filter_rows + 16 * step, filter_pitch);
    };
    const auto multiply = [&](Fragments& fragments) {
#pragma unroll
      for (int j = 0; j < Sums::kFragmentsN / 2; j++) sums.multiply(fragments.a, fragments.b[j], j);
    };
    load(0, even);
    for (int step = 0; step < p.k_steps; step += 2) {
      load(step + 1, odd);
      multiply(even);
      if (step + 1 == p.k_steps) break;
      load(step + 2, even);
      multiply(odd);
    }

    const auto finish = [relu](float x) { return from_float<T>(relu && x <= 0.0f ? 0.0f : x); };
    const bool columns = p.out_filter != 1;
    sums.each([&](int row, int col, float first, float second) {
      if (columns) {
        results[col * kColumnPitch<Shape> + row] = finish(first);
        results[(col + 1) * kColumnPitch<Shape> + row] = finish(second);
      } else {
        store_vec<T, 2>(results + row * kResultPitch<Shape> + col, {{finish(first), finish(second)}});
      }
    });
    __syncthreads();  // the box's results are there
    if (columns) {
      store_stem_box<T, Shape, 1>(p, box, first_filter, results);
    } else {
      store_stem_box<T, Shape, 8>(p, box, first_filter, results);
    }
  }
}

namespace conv {

// What the kernel serves, and how. The one place that says so: 1 to 4 channels of one group, without dilation or a
// residual; dense lines; taps and two boxes' lines that fit shared memory; boxes of which a quarter is of use.
inline bool plan_stem(const ConvForwardParams& params, StemParams& p) {
  const ConvShape& s = params.shape;
  const ConvTensor& input = params.input;
  p = {};
  p.pixels = s.channels > 1 && input.channel == 1 && input.column == s.channels;
  const bool dense = p.pixels || input.column == 1 || s.width == 1;
  if (s.groups != 1 || s.channels > kStemChannels || s.dilation_h != 1 || s.dilation_w != 1 || !dense ||
      params.residual != nullptr || s.images == 0) {
    return false;
  }
  const int elements = p.pixels ? s.channels : 1;
  p.input = input.data;
  p.planes = p.pixels ? 1 : s.channels;
  p.input_image = s.images > 1 ? input.image : 0;
  p.input_plane = p.planes > 1 ? input.channel : 0;
  p.input_row = s.height > 1 ? input.row : 0;
  p.weight = params.weight, p.bias = params.bias;
  p.output = params.output, p.preactivation = params.preactivation, p.argmax = params.argmax;
  p.activation = params.activation;
  const bool wants_pool = params.pool.kernel_h > 0;
  p.pool = wants_pool ? params.pool : ConvPool{1, 1, 1, 1, 0, 0, s.out_h, s.out_w};
  p.images = s.images, p.channels = s.channels, p.height = s.height, p.filters = s.filters, p.kernel_h = s.kernel_h;
  p.conv_h = s.out_h, p.conv_w = s.out_w, p.stride_h = s.stride_h, p.padding_h = s.padding_h;
  const int64_t place = params.channels_last ? s.filters : 1, plane = int64_t{p.pool.out_h} * p.pool.out_w;
  p.out_image = plane * s.filters, p.out_filter = params.channels_last ? 1 : plane;
  p.out_row = p.pool.out_w * place, p.out_column = place;

  const int64_t padding = int64_t{s.padding_w} * elements, line = int64_t{s.width} * elements;
  const PoolBoxes boxes = fit_boxes(p.pool, kStemPlaces);
  const int64_t places = int64_t{s.out_h} * s.out_w;
  if (boxes.count == 0 || boxes.count * kStemPlaces > 4 * places) return false;
  p.tile_h = boxes.tile_h, p.tile_w = boxes.tile_w;
  p.boxes_h = ceil_div(p.pool.out_h, p.tile_h), p.boxes_w = ceil_div(p.pool.out_w, p.tile_w);
  p.box_h = (p.tile_h - 1) * p.pool.stride_h + p.pool.kernel_h;
  p.box_w = (p.tile_w - 1) * p.pool.stride_w + p.pool.kernel_w;
  p.tiles = s.images * boxes.count;

  // Bounds before products: no extent of what fits is beyond 16 bits.
  constexpr int kMost = 1 << 12;
  if (padding + line > INT_MAX / 2 || s.kernel_h > kMost || s.kernel_w > kMost || s.stride_h > kMost ||
      s.stride_w > kMost) {
    return false;
  }
  p.line = static_cast<int>(line), p.padding = static_cast<int>(padding);
  p.step = s.stride_w * elements, p.run = s.kernel_w * elements;
  p.rows = (p.box_h - 1) * s.stride_h + s.kernel_h;
  p.chunks = ceil_div(7 + (p.box_w - 1) * p.step + p.run, 8);
  p.pairs = ceil_div(p.run + p.lead(), 2);
  const int64_t k_steps = ceil_div<int64_t>(int64_t{p.planes} * s.kernel_h * p.pairs, 8);
  const int64_t words = int64_t{p.planes} * p.rows * p.chunks * 4;
  if (k_steps > kMost || words > kMost * 4) return false;
  p.k_steps = static_cast<int>(k_steps);
  // Of 8 rows of a fragment some lie in the box's next line. Where those start behind the others' banks and end before
  // their first ones they meet none of them.
  const int used = 4 + 7 * p.step / 2;
  for (int i = 0; i < 8; i++) {
    p.pitch = p.chunks * 4 + 4 * i + 4;
    const int jump = (p.stride_h * p.pitch - p.box_w * p.step / 2) & 31;
    if (jump >= 1 && jump + used <= 32) break;
  }
  constexpr int V = 8;
  p.copies = p.line % V == 0 && p.input_plane % V == 0 &&
             whole_vectors({p.input, p.input_image, 1, p.input_row, 0}, V, sizeof(uint16_t));
  return stem_shared_bytes(p, s.filters > kStemFiltersFew ? kStemFilters : kStemFiltersFew) <= kStemShared;
}

template <class T, int kFilters>
int launch_stem_tile(StemParams p, Stream stream) {
  using Shape = StemShape<T, kFilters>;
  p.tiles_n = ceil_div(p.filters, kFilters);
  // Two blocks a multiprocessor, or all there are.
  const int64_t resident = std::max(1, 2 * multiprocessor_count() / p.tiles_n);
  const int64_t blocks = std::min(p.tiles, resident) * p.tiles_n;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), stem_shared_bytes(p, kFilters),
                            stream};
  return launch(conv_stem_kernel<T, Shape>, config, p);
}

template <class T>
int launch_stem(const StemParams& p, Stream stream) {
  return p.filters > kStemFiltersFew ? launch_stem_tile<T, kStemFilters>(p, stream)
                                     : launch_stem_tile<T, kStemFiltersFew>(p, stream);
}

}  // namespace conv
}  // namespace bigkern
