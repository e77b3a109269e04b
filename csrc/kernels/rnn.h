// The sequential part of one recurrent layer, all its directions together: tanh or ReLU RNN, LSTM, GRU.
// What csrc/torch sees of rnn.cuh: plain C++.
#pragma once

#include "device/stream.h"
#include "kernels/element_types.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bigkern {

enum class RnnCell { kTanh, kRelu, kLstm, kGru };

// kBlock: one block for eight sequences, H to 128, 16-bit types. kGrid: blocks that hold the weights for all steps and
// exchange h. kStep: a launch for each step. kAuto: the first of these that fits. kFlags: as kGrid, but what is
// exchanged never carries tags (rnn_grid.cuh), for comparison.
enum class RnnVariant { kAuto, kBlock, kGrid, kStep, kFlags };

constexpr int rnn_gates(RnnCell cell) {
  return cell == RnnCell::kLstm ? 4 : cell == RnnCell::kGru ? 3 : 1;
}

// Values a row and unit that the backward pass wants beside the output: LSTM i, f, g, o, c; GRU r, z, n, W h + b_hn.
// With zoneout one more where it hides something: the RNN's h before it, the LSTM's c after it.
constexpr int rnn_saved(RnnCell cell, bool zoned) {
  return cell == RnnCell::kLstm ? 5 + zoned : cell == RnnCell::kGru ? 4 : zoned;
}

// T is the type of all tensors, which are contiguous. A row is a (step, sequence) pair, time-major. With offsets the
// batch is packed: step t holds rows from offsets[t] on, sequences are sorted by falling length.
struct RnnShape {
  const void* h0;    // T, directions x batch x hidden
  const void* c0;    // T, as h0; LSTM's, else null
  const void* mask;  // T, as h0, or null: multiplies h where W_hh reads it
  // Zoneout: a step's h and c are zone * old + (1 - zone) * new; T, rows x directions x hidden, or null: zoneout then.
  const void* zone;
  const void* cell_zone;
  float zoneout, cell_zoneout;
  bool zoned;              // whether there is any
  const int64_t* offsets;  // steps, or null
  const int64_t* lengths;  // batch, or null; null exactly when offsets is
  int64_t steps, batch;    // both positive
  int hidden, directions;  // both positive; the second direction reads each sequence from its end
  RnnCell cell;
  RnnVariant variant;
};

struct RnnForwardParams {
  RnnShape shape;
  const void* gates;    // T, rows x directions x G x hidden: the projected input with its biases
  const void* weight;   // T, directions x (G hidden) x hidden
  const void* bias_hn;  // T, directions x hidden, GRU's, or null
  void* output;         // T, rows x directions x hidden
  void* hn;             // T, as h0
  void* cn;             // T, as h0; LSTM's
  void* saved;          // T, rows x directions x S x hidden, or null
};

struct RnnBackwardParams {
  RnnShape shape;
  const void* grad_output;  // T, as output, or null
  const void* grad_hn;      // T, as h0, or null
  const void* grad_cn;      // T, as h0, or null
  const void* output;       // T, the forward pass's
  const void* saved;        // T, the forward pass's
  const void* weight;       // T, directions x hidden x (G hidden): transposed
  void* grad_gates;         // T, as gates
  void* grad_hidden;        // T, rows x directions x hidden: GRU's gradient of W h + b_hn
  void* grad_h0;            // T, as h0
  void* grad_c0;            // T, as h0; LSTM's
};

// Device memory that lives until the launched work is done.
using Allocate = std::function<void*(size_t bytes)>;

// What a launcher returns beside error_string's codes: the variant that was asked for cannot serve the shape here.
constexpr int kRnnVariantDoesNotFit = -1;

// Launch on the current device. Instances: float, __nv_bfloat16, __half.
template <class T>
int rnn_forward(const RnnForwardParams& params, Stream stream, const Allocate& allocate);

template <class T>
int rnn_backward(const RnnBackwardParams& params, Stream stream, const Allocate& allocate);

}  // namespace bigkern
