// The cells: what one step does to one (unit, sequence) pair, in fp32.
//
// forward: x is the projected input, a = W_hh h; h and c are replaced; is_bounded says that no new |h| exceeds 1 or, if
// that is more, the old one. backward: dh is the gradient of the new h, dc
// that of the new c and then of the old one; grad goes to the projected input, hidden to W h (the same but for GRU's n,
// whose W h + b_hn is multiplied by r), and bypass is what of dh reaches the old h without W_hh.
#pragma once

#include "device/device.cuh"
#include "kernels/rnn.h"

namespace bigkern {

// Fast intrinsics err by 1e-7 absolutely, which 16-bit results do not show and fp32 results do.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <class T>
struct VanillaCell {
  static constexpr int kGates = 1, kSaved = 0;
  bool relu;

  __device__ explicit VanillaCell(RnnCell cell) : relu(cell == RnnCell::kRelu) {}

  __device__ __forceinline__ bool is_bounded() const { return !relu; }

  __device__ __forceinline__ void forward(const float (&x)[1], const float (&a)[1], float, float& h, float&,
                                          float*) const {
    const float sum = x[0] + a[0];
    h = relu ? (sum < 0.0f ? 0.0f : sum) : tanhf(sum);  // NaN passes
  }

  __device__ __forceinline__ void backward(float dh, float&, float y, const float*, float, float, float (&grad)[1],
                                           float& hidden, float& bypass) const {
    grad[0] = hidden = relu ? (y <= 0.0f ? 0.0f : dh) : dh * (1.0f - y) * (1.0f + y);
    bypass = 0.0f;
  }
};

template <class T>
struct LstmCell {
  static constexpr int kGates = 4, kSaved = 5;

  __device__ explicit LstmCell(RnnCell) {}

  __device__ __forceinline__ bool is_bounded() const { return true; }

  __device__ __forceinline__ void forward(const float (&x)[4], const float (&a)[4], float, float& h, float& c,
                                          float* saved) const {
    const float i = sigmoid<T>(x[0] + a[0]), f = sigmoid<T>(x[1] + a[1]);
    const float g = tanhf(x[2] + a[2]), o = sigmoid<T>(x[3] + a[3]);
    c = f * c + i * g;
    h = o * tanhf(c);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    saved[4] = c;
  }

  __device__ __forceinline__ void backward(float dh, float& dc, float, const float* saved, float, float c_before,
                                           float (&grad)[4], float& hidden, float& bypass) const {
    const float i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanhf(saved[4]);
    const float d = dc + dh * o * (1.0f - tanh_c) * (1.0f + tanh_c);
    grad[0] = d * g * i * (1.0f - i);
    grad[1] = d * c_before * f * (1.0f - f);
    grad[2] = d * i * (1.0f - g) * (1.0f + g);
    grad[3] = hidden = dh * tanh_c * o * (1.0f - o);
    dc = d * f;
    bypass = 0.0f;
  }
};

template <class T>
struct GruCell {
  static constexpr int kGates = 3, kSaved = 4;

  __device__ explicit GruCell(RnnCell) {}

  __device__ __forceinline__ bool is_bounded() const { return true; }

  __device__ __forceinline__ void forward(const float (&x)[3], const float (&a)[3], float bias_hn, float& h, float&,
                                          float* saved) const {
    // The fast division may err upwards, and h is a mean only where z is no more than 1.
    const float r = sigmoid<T>(x[0] + a[0]), z = fminf(sigmoid<T>(x[1] + a[1]), 1.0f);
    const float inner = a[2] + bias_hn;
    const float n = tanhf(x[2] + r * inner);
    h = (1.0f - z) * n + z * h;
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = inner;
  }

  __device__ __forceinline__ void backward(float dh, float&, float, const float* saved, float h_before, float,
                                           float (&grad)[3], float& hidden, float& bypass) const {
    const float r = saved[0], z = saved[1], n = saved[2], inner = saved[3];
    grad[2] = dh * (1.0f - z) * (1.0f - n) * (1.0f + n);
    grad[1] = dh * (h_before - n) * z * (1.0f - z);
    grad[0] = grad[2] * inner * r * (1.0f - r);
    hidden = grad[2] * r;
    bypass = dh * z;
  }
};

// The sequences of a tensor-core tile: its eight columns.
constexpr int kSequences = 8;

// One thread's (unit, sequence) pair in one direction, and where it stands in the tensors. Steps and sequences fit an
// int each; their product need not.
template <class T>
class RnnPair {
 public:
  __device__ __forceinline__ RnnPair(const RnnShape& shape, int direction, int unit, int64_t sequence)
      : unit(unit), sequence(static_cast<int>(sequence)), reverse(direction == 1) {
    live = unit < shape.hidden && sequence < shape.batch;
    length = !live ? 0 : static_cast<int>(shape.lengths != nullptr ? shape.lengths[sequence] : shape.steps);
  }

  // Index in h0 and what is shaped like it.
  __device__ __forceinline__ int64_t state(const RnnShape& shape) const {
    return (reverse * shape.batch + sequence) * shape.hidden + unit;
  }

  __device__ __forceinline__ float load_state(const RnnShape& shape, const void* tensor, float otherwise) const {
    return live && tensor != nullptr ? to_float(static_cast<const T*>(tensor)[state(shape)]) : otherwise;
  }

  __device__ __forceinline__ void store_state(const RnnShape& shape, void* tensor, float value) const {
    if (live && tensor != nullptr) static_cast<T*>(tensor)[state(shape)] = from_float<T>(value);
  }

  // Index of the direction's part in the row that this sequence's step number `step` reads; step < length.
  __device__ __forceinline__ int64_t part(const RnnShape& shape, int step) const {
    const int t = reverse ? length - 1 - step : step;
    const int64_t row = (shape.offsets != nullptr ? shape.offsets[t] : t * shape.batch) + sequence;
    return row * shape.directions + reverse;
  }

  int unit, sequence, length;
  bool reverse, live;
};

// The most steps that a sequence of the eight from `first` on has: the first's, as they are sorted.
__device__ __forceinline__ int group_steps(const RnnShape& shape, int64_t first) {
  return static_cast<int>(shape.lengths != nullptr ? shape.lengths[first] : shape.steps);
}

// How many values a row and unit stand in `saved`.
template <class Cell>
__device__ __forceinline__ int saved_count(const RnnShape& shape) {
  return Cell::kSaved + (Cell::kGates != 3 && shape.zoned);
}

// The weight of a pair's old state in a step: 0 or 1 while training.
template <class T>
__device__ __forceinline__ float load_zone(const void* zone, float zoneout, int64_t at) {
  return zone != nullptr ? to_float(static_cast<const T*>(zone)[at]) : zoneout;
}

// One pair's step: the cell, then zoneout. saved has one place beyond the cell's own, for what zoneout hides.
template <class Cell, class T>
__device__ __forceinline__ void forward_pair(const Cell& cell, const RnnShape& shape, int64_t part, int unit,
                                             const float (&x)[Cell::kGates], const float (&a)[Cell::kGates],
                                             float bias_hn, float& h, float& c, float (&saved)[Cell::kSaved + 1]) {
  const float old_h = h, old_c = c;
  cell.forward(x, a, bias_hn, h, c, saved);
  if (shape.zoned) {
    const int64_t at = part * shape.hidden + unit;
    const float zone = load_zone<T>(shape.zone, shape.zoneout, at);
    saved[Cell::kSaved] = h;
    h = zone * old_h + (1.0f - zone) * h;
    if constexpr (Cell::kGates == 4) {
      const float cell_zone = load_zone<T>(shape.cell_zone, shape.cell_zoneout, at);
      c = cell_zone * old_c + (1.0f - cell_zone) * c;
      saved[Cell::kSaved] = c;
    }
  }
}

// What one pair's backward step reads.
template <class Cell, class T>
struct RnnBackwardInputs {
  float saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
  float grad_output, y, h_before, c_before, zone, cell_zone;

  __device__ __forceinline__ void load(const RnnBackwardParams& p, const RnnPair<T>& pair, int step) {
    const int64_t part = pair.part(p.shape, step), unit = pair.unit, hidden = p.shape.hidden;
    const int64_t count = saved_count<Cell>(p.shape);
    const T* all = static_cast<const T*>(p.saved);
    grad_output =
        p.grad_output != nullptr ? to_float(static_cast<const T*>(p.grad_output)[part * hidden + unit]) : 0.0f;
    y = h_before = c_before = 0.0f;
    if constexpr (Cell::kSaved == 0) {
      y = to_float((p.shape.zoned ? all : static_cast<const T*>(p.output))[part * hidden + unit]);
    } else {
#pragma unroll
      for (int i = 0; i < Cell::kSaved; i++) saved[i] = to_float(all[(part * count + i) * hidden + unit]);
    }
    const int64_t earlier = step > 0 ? pair.part(p.shape, step - 1) : 0;
    if constexpr (Cell::kGates == 3) {
      h_before = step > 0 ? to_float(static_cast<const T*>(p.output)[earlier * hidden + unit])
                          : pair.load_state(p.shape, p.shape.h0, 0.0f);
    }
    if constexpr (Cell::kGates == 4) {
      c_before = step > 0 ? to_float(all[(earlier * count + count - 1) * hidden + unit])
                          : pair.load_state(p.shape, p.shape.c0, 0.0f);
    }
    if (p.shape.zoned) {
      zone = load_zone<T>(p.shape.zone, p.shape.zoneout, part * hidden + unit);
      if constexpr (Cell::kGates == 4) {
        cell_zone = load_zone<T>(p.shape.cell_zone, p.shape.cell_zoneout, part * hidden + unit);
      }
    }
  }
};

// One pair's step back: through zoneout, then the cell. dh is the gradient of the step's h, and becomes what of it
// reaches the old h without W_hh; dc likewise.
template <class Cell, class T>
__device__ __forceinline__ void backward_pair(const Cell& cell, const RnnShape& shape,
                                              const RnnBackwardInputs<Cell, T>& inputs, float& dh, float& dc,
                                              float (&grad)[Cell::kGates], float& inner) {
  float total = dh + inputs.grad_output, past_h = 0.0f, past_c = 0.0f, bypass;
  if (shape.zoned) {
    past_h = inputs.zone * total;
    total *= 1.0f - inputs.zone;
    if constexpr (Cell::kGates == 4) {
      past_c = inputs.cell_zone * dc;
      dc *= 1.0f - inputs.cell_zone;
    }
  }
  cell.backward(total, dc, inputs.y, inputs.saved, inputs.h_before, inputs.c_before, grad, inner, bypass);
  dh = bypass + past_h;
  dc += past_c;
}

// Stores one pair's results of a forward step.
template <class Cell, class T>
__device__ __forceinline__ void store_forward(const RnnForwardParams& p, int64_t part, int unit, float h,
                                              const float (&saved)[Cell::kSaved + 1]) {
  const int64_t hidden = p.shape.hidden;
  static_cast<T*>(p.output)[part * hidden + unit] = from_float<T>(h);
  if (p.saved != nullptr) {
    const int64_t count = saved_count<Cell>(p.shape);
    T* kept = static_cast<T*>(p.saved) + part * count * hidden + unit;
#pragma unroll
    for (int i = 0; i < Cell::kSaved; i++) kept[i * hidden] = from_float<T>(saved[i]);
    if (count > Cell::kSaved) kept[Cell::kSaved * hidden] = from_float<T>(saved[Cell::kSaved]);
  }
}

template <class Cell, class T>
__device__ __forceinline__ void store_backward(const RnnBackwardParams& p, int64_t part, int unit, const float* grad,
                                               float inner) {
  const int64_t hidden = p.shape.hidden;
#pragma unroll
  for (int i = 0; i < Cell::kGates; i++) {
    static_cast<T*>(p.grad_gates)[(part * Cell::kGates + i) * hidden + unit] = from_float<T>(grad[i]);
  }
  if constexpr (Cell::kGates == 3) static_cast<T*>(p.grad_hidden)[part * hidden + unit] = from_float<T>(inner);
}

}  // namespace bigkern
