// Recurrent layers: tanh and ReLU RNN, LSTM and GRU, the sequential part of one layer, forward and backward.
//
//   a = W_hh (mask * h) for every step; the cells are in rnn_cells.cuh. The projection of all steps' inputs is one GEMM
//   before, the weights' gradients are one after: neither is here.
//
// Floor. A step must move h through the whole layer: 2 G B H^2 FLOP, and where blocks share a layer one exchange
// through L2, a release and an acquire, about 1 us. The weights, G H^2 elements, are read once. Memory: G B H in, B H
// out and S B H saved an element and step; at B = 8, H = 1024, LSTM in bf16: 160 KB a step, 0.05 us on an H100. So the
// exchange rules, and what follows is about its latency. Not measured: no GPU has run this code yet; the step model of
// 1 to 2 us is CONTRIBUTING's to confirm.
//
// Three ways to run, in the order they are chosen; all share the cells, the row and time arithmetic and the products:
//   block (rnn_block.cuh): 16-bit, H <= 128. One block for eight sequences; no exchange.
//   grid (rnn_grid.cuh): a block for 16 units (fp32: 8) of eight sequences, weights on chip, one cooperative launch for
//     all steps; h is exchanged through L2, with tags in its elements or flags beside them. Fits where all blocks of a
//     group are resident at once and the weights fit: 16-bit LSTM to H = 2048, fp32 to about 1024 on an H100. More
//     sequences than are resident run in waves.
//   step (rnn_grid.cuh, streamed weights): one launch a step; any H.
//
// Layers run one after another. A wavefront, layer l + 1 on a chunk of steps while layer l is on the next, would
// overlap them where their blocks fit a chip together: two layers of H = 512 or 1024 at B = 8 (32 or 64 blocks each),
// not of H = 768 at B = 16 (96 each), and never bidirectional ones. Counted for two LSTM layers of H = 512, T = 512, in
// chunks of 64 steps at 0.55 us: 590 us one after another, GEMMs included; as a wavefront 9 chunks of 35 us, each with
// some 6 us to launch, fill the exchange and load the weights again and 5 us for its own small GEMM, 415 us. At the
// documents' models (H = 128, 64 steps in 22 us) a chunk's launches cost what they save. It is left out: the gain, 1.4
// in that corner, hangs on two cooperative grids running side by side, which only a GPU can show, and h and c would be
// carried from chunk to chunk.
//
// Numerics: products accumulate in fp32; c, h and their gradients stay in fp32 registers over all steps, and only what
// is multiplied is rounded to T. Sums have a fixed order: equal inputs give equal bits.
#pragma once

#include "device/device.cuh"
#include "kernels/rnn_block.cuh"
#include "kernels/rnn_grid.cuh"

#include <algorithm>

namespace bigkern {

namespace detail {

inline int64_t groups_of(const RnnShape& shape) {
  return ceil_div<int64_t>(shape.batch, kSequences);
}

template <class T>
bool block_serves(const RnnShape& shape) {
  return sizeof(T) == 2 && shape.hidden <= kBlockHidden;
}

// Allocates the exchange for all groups and launches what fills it.
template <class T>
int start_exchange(const RnnShape& shape, int size, bool forward, bool resident, Stream stream,
                   const Allocate& allocate, RnnExchange<T>& exchange) {
  const int64_t slices = ceil_div(shape.hidden, kRnnUnits<T>);
  exchange.groups = groups_of(shape) * shape.directions;
  exchange.pitch = round_up(size, kRnnBlockK);
  const int64_t elements = 2 * exchange.groups * kSequences * exchange.pitch;
  const int64_t flags = resident ? exchange.groups * slices : 0;
  exchange.states = static_cast<T*>(allocate(elements * sizeof(T)));
  exchange.flags = resident ? static_cast<unsigned*>(allocate(flags * sizeof(unsigned))) : nullptr;
  const int64_t carried = 2 * shape.directions * shape.batch * shape.hidden;
  exchange.carried = resident ? nullptr : static_cast<float*>(allocate(carried * sizeof(float)));
  LaunchConfig config;
  config.block = dim3(256);
  config.grid = dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(elements, 256), 1024)));
  config.stream = stream;
  return launch(rnn_start_kernel<T>, config, shape, exchange, flags, forward);
}

// How many groups' blocks are resident at once; 0 when one group's are not.
template <class Kernel>
int64_t resident_groups(Kernel kernel, const RnnShape& shape, int units, size_t shared_bytes) {
  if (shared_bytes > static_cast<size_t>(max_shared_bytes())) return 0;
  const int64_t blocks = int64_t{occupancy(kernel, kRnnThreads, shared_bytes)} * multiprocessor_count();
  return blocks / (int64_t{ceil_div(shape.hidden, units)} * shape.directions);
}

// The grid or the step variant. `iterations` is how many steps the kernel counts.
template <class T, class Params, class Resident, class Streamed>
int run_grid(Resident resident, size_t resident_bytes, Streamed streamed, size_t streamed_bytes, const Params& params,
             int size, int iterations, bool forward, Stream stream, const Allocate& allocate) {
  const RnnShape& shape = params.shape;
  const int64_t groups = groups_of(shape);
  int64_t wave = 0;
  if (shape.variant != RnnVariant::kStep) {
    wave = resident_groups(resident, shape, kRnnUnits<T>, resident_bytes);
    if (wave == 0 && shape.variant != RnnVariant::kAuto) return kRnnVariantDoesNotFit;
  }
  RnnExchange<T> exchange{};
  int code = start_exchange(shape, size, forward, wave > 0, stream, allocate, exchange);
  LaunchConfig config;
  config.block = dim3(kRnnThreads);
  config.stream = stream;
  config.cooperative = wave > 0;
  config.shared_bytes = wave > 0 ? resident_bytes : streamed_bytes;
  const int64_t most = wave > 0 ? wave : 65535;
  for (int64_t group = 0; group < groups && code == 0; group += most) {
    config.grid = dim3(ceil_div(shape.hidden, kRnnUnits<T>), shape.directions,
                       static_cast<unsigned>(std::min(most, groups - group)));
    if (wave > 0) {
      code = launch(resident, config, params, exchange, group, 0, iterations);
    } else {
      for (int i = 0; i < iterations && code == 0; i++) {
        code = launch(streamed, config, params, exchange, group, i, i + 1);
      }
    }
  }
  return code;
}

template <class Cell, class T>
int forward_cell(const RnnForwardParams& params, Stream stream, const Allocate& allocate) {
  const RnnShape& shape = params.shape;
  if constexpr (sizeof(T) == 2) {
    if (block_serves<T>(shape) && (shape.variant == RnnVariant::kAuto || shape.variant == RnnVariant::kBlock)) {
      LaunchConfig config;
      config.grid = dim3(static_cast<unsigned>(groups_of(shape)), shape.directions);
      config.block = dim3(ceil_div(shape.hidden, 8) * 32);
      config.shared_bytes = 2 * kSequences * rnn_block_pitch(1) * sizeof(T);
      config.stream = stream;
      return launch(rnn_forward_block_kernel<Cell, T>, config, params);
    }
  }
  if (shape.variant == RnnVariant::kBlock) return kRnnVariantDoesNotFit;
  using Resident = RnnForwardProduct<Cell, T, true>;
  using Streamed = RnnForwardProduct<Cell, T, false>;
  return run_grid<T>(rnn_forward_kernel<Cell, T, true>, Resident::shared_bytes(shape.hidden),
                     rnn_forward_kernel<Cell, T, false>, Streamed::shared_bytes(shape.hidden), params, shape.hidden,
                     static_cast<int>(shape.steps), true, stream, allocate);
}

template <class Cell, class T>
int backward_cell(const RnnBackwardParams& params, Stream stream, const Allocate& allocate) {
  const RnnShape& shape = params.shape;
  if constexpr (sizeof(T) == 2) {
    if (block_serves<T>(shape) && (shape.variant == RnnVariant::kAuto || shape.variant == RnnVariant::kBlock)) {
      LaunchConfig config;
      config.grid = dim3(static_cast<unsigned>(groups_of(shape)), shape.directions);
      config.block = dim3(ceil_div(shape.hidden, 16) * 32);
      config.shared_bytes = rnn_block_backward_shared_bytes(Cell::kGates);
      config.stream = stream;
      return launch(rnn_backward_block_kernel<Cell, T>, config, params);
    }
  }
  if (shape.variant == RnnVariant::kBlock) return kRnnVariantDoesNotFit;
  const int size = Cell::kGates * shape.hidden;
  return run_grid<T>(rnn_backward_kernel<Cell, T, true>, RnnBackwardProduct<T, true>::shared_bytes(size),
                     rnn_backward_kernel<Cell, T, false>, RnnBackwardProduct<T, false>::shared_bytes(size), params,
                     size, shape.steps + 1, false, stream, allocate);
}

}  // namespace detail

template <class T>
int rnn_forward(const RnnForwardParams& params, Stream stream, const Allocate& allocate) {
  switch (params.shape.cell) {
    case RnnCell::kLstm:
      return detail::forward_cell<LstmCell<T>, T>(params, stream, allocate);
    case RnnCell::kGru:
      return detail::forward_cell<GruCell<T>, T>(params, stream, allocate);
    default:
      return detail::forward_cell<VanillaCell<T>, T>(params, stream, allocate);
  }
}

template <class T>
int rnn_backward(const RnnBackwardParams& params, Stream stream, const Allocate& allocate) {
  switch (params.shape.cell) {
    case RnnCell::kLstm:
      return detail::backward_cell<LstmCell<T>, T>(params, stream, allocate);
    case RnnCell::kGru:
      return detail::backward_cell<GruCell<T>, T>(params, stream, allocate);
    default:
      return detail::backward_cell<VanillaCell<T>, T>(params, stream, allocate);
  }
}

}  // namespace bigkern
