// One block for eight sequences of a direction, 16-bit types, H to 128: h stays in shared memory, the weights in
// registers (a part of LSTM's backward ones in shared memory), and a step costs one block barrier and no exchange.
//
// A warp owns units and all of K, so that its accumulators are the gates of its lanes' own pairs: forward 8 units,
// whose gates are the half tiles; backward 16 units, two half tiles of the transposed weights. State (backward: the
// gates' gradients) alternates between two buffers: what is written in a step was last read in the step before, which
// the barrier between them ended.
#pragma once

#include "device/device.cuh"
#include "kernels/rnn_product.cuh"

namespace bigkern {

constexpr int kBlockHidden = 128;  // the largest H
constexpr int kBlockHiddenK = kBlockHidden / kRnnBlockK;

// Rows of the buffers stand 16 bytes x (4 mod 8) apart: eight lanes' 16-byte reads meet all banks.
__host__ __device__ constexpr int rnn_block_pitch(int gates) {
  return gates * kBlockHidden + 32;
}

__host__ __device__ constexpr int rnn_block_held(int gates) {
  return gates * kBlockHiddenK < 12 ? gates * kBlockHiddenK : 12;
}

constexpr size_t rnn_block_backward_shared_bytes(int gates) {
  const int beyond = gates * kBlockHiddenK - rnn_block_held(gates);
  return 2 * kSequences * rnn_block_pitch(gates) * 2 + size_t{16} * beyond * (kBlockHidden / 16) * 64;
}

// Zeros in both buffers: what is never written is read beside zero weights, and must not be NaN.
template <class T>
__device__ __forceinline__ void clear_buffers(T* buffers, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) buffers[i] = from_float<T>(0.0f);
  __syncthreads();
}

template <class Cell, class T>
__global__ void __launch_bounds__(kBlockHidden * 4, 1) rnn_forward_block_kernel(const RnnForwardParams p) {
  constexpr int kGates = Cell::kGates, kTiles = ceil_div(kGates, 2), kPitch = rnn_block_pitch(1);
  constexpr int kBuffer = kSequences * kPitch;
  const RnnShape& shape = p.shape;
  const int hidden = shape.hidden, direction = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = ceil_div(hidden, kRnnBlockK);
  const int64_t sequence0 = int64_t{blockIdx.x} * kSequences;
  const int steps = group_steps(shape, sequence0);

  SharedMemory shared;
  T* buffers = shared.take<T>(2 * kBuffer);
  const RnnWeights<T, kGates> weights(p.weight, direction, hidden, warp * 8, hidden);
  RnnFragment held[kBlockHiddenK][kTiles];
#pragma unroll
  for (int i = 0; i < kBlockHiddenK; i++) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      if (i < blocks) {
        const RnnFragment f = load_fragment<T, kGates, kGates>(weights, tile, i);
        held[i][tile].top = f.top;
        held[i][tile].bottom = f.bottom;
      }
    }
  }
  clear_buffers(buffers, 2 * kBuffer);

  // The accumulators of lane (g, t) are columns 2t and 2t + 1 of unit g.
  const int unit = warp * 8 + lane / 4, column = lane % 4 * 2;
  const RnnPair<T> pairs[2] = {RnnPair<T>(shape, direction, unit, sequence0 + column),
                               RnnPair<T>(shape, direction, unit, sequence0 + column + 1)};
  const float bias_hn = unit < hidden && p.bias_hn != nullptr
                            ? to_float(static_cast<const T*>(p.bias_hn)[direction * hidden + unit])
                            : 0.0f;
  const Cell cell(shape.cell);
  float h[2], c[2], mask[2], x[2][kGates];
  const auto load_gates = [&](int j, int step) {
    if (step >= pairs[j].length) return;
    const int64_t part = pairs[j].part(shape, step);
#pragma unroll
    for (int i = 0; i < kGates; i++) {
      x[j][i] = to_float(static_cast<const T*>(p.gates)[(part * kGates + i) * hidden + unit]);
    }
  };
#pragma unroll
  for (int j = 0; j < 2; j++) {
    h[j] = pairs[j].load_state(shape, shape.h0, 0.0f);
    c[j] = pairs[j].load_state(shape, shape.c0, 0.0f);
    mask[j] = pairs[j].load_state(shape, shape.mask, 1.0f);
    if (pairs[j].live) buffers[(column + j) * kPitch + unit] = from_float<T>(h[j] * mask[j]);
    load_gates(j, 0);
  }
  __syncthreads();

#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const T* read = buffers + (step & 1) * kBuffer + lane / 4 * kPitch + lane % 4 * 8;
    float sums[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kBlockHiddenK; i++) {
      if (i < blocks) {
        const uint4 states = *reinterpret_cast<const uint4*>(read + i * kRnnBlockK);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          if (2 * tile + 1 < kGates) {
            multiply_block<T, true>(sums[tile], held[i][tile], states);
          } else {
            multiply_block<T, false>(sums[tile], held[i][tile], states);
          }
        }
      }
    }
    T* write = buffers + ((step + 1) & 1) * kBuffer;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (step < pairs[j].length) {
        float a[kGates], saved[Cell::kSaved + 1];
#pragma unroll
        for (int i = 0; i < kGates; i++) a[i] = sums[i / 2][i % 2 * 2 + j];
        const int64_t part = pairs[j].part(shape, step);
        forward_pair<Cell, T>(cell, shape, part, unit, x[j], a, bias_hn, h[j], c[j], saved);
        write[(column + j) * kPitch + unit] = from_float<T>(h[j] * mask[j]);
        // Not after the barrier: all warps do the same, so none would wait less, and what is saved would spill.
        store_forward<Cell, T>(p, part, unit, h[j], saved);
      }
      load_gates(j, step + 1);
    }
    __syncthreads();  // the new states are there, and the old ones are read
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    pairs[j].store_state(shape, p.hn, h[j]);
    if constexpr (kGates == 4) pairs[j].store_state(shape, p.cn, c[j]);
  }
}

template <class Cell, class T>
__global__ void __launch_bounds__(kBlockHidden * 2, 1) rnn_backward_block_kernel(const RnnBackwardParams p) {
  constexpr int kGates = Cell::kGates, kPitch = rnn_block_pitch(kGates), kBuffer = kSequences * kPitch;
  constexpr int kBlocks = kGates * kBlockHiddenK, kHeld = rnn_block_held(kGates);
  const RnnShape& shape = p.shape;
  const int hidden = shape.hidden, size = kGates * hidden, direction = blockIdx.y, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, blocks = ceil_div(size, kRnnBlockK);
  const int64_t sequence0 = int64_t{blockIdx.x} * kSequences;
  const int steps = group_steps(shape, sequence0);

  SharedMemory shared;
  T* buffers = shared.take<T>(2 * kBuffer);
  uint4* rest = shared.take<uint4>((kBlocks - kHeld) * (kBlockHidden / 16) * 64) + warp * (kBlocks - kHeld) * 64 + lane;
  const RnnWeights<T, 1> weights(p.weight, direction, hidden, warp * 16, size);
  RnnFragment held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    if (i < blocks) {
      const RnnFragment f = load_fragment<T, 1, 2>(weights, 0, i);
      held[i].top = f.top;
      held[i].bottom = f.bottom;
    }
  }
  for (int i = kHeld; i < blocks; i++) {
    const RnnFragment f = load_fragment<T, 1, 2>(weights, 0, i);
    rest[(i - kHeld) * 64] = f.top;
    rest[(i - kHeld) * 64 + 32] = f.bottom;
  }
  clear_buffers(buffers, 2 * kBuffer);

  // The accumulators of lane (g, t) are columns 2t and 2t + 1 of units g and g + 8.
  const int unit0 = warp * 16 + lane / 4, column = lane % 4 * 2;
  const Cell cell(shape.cell);
  const auto pair_of = [&](int j) {
    return RnnPair<T>(shape, direction, unit0 + j / 2 * 8, sequence0 + column + j % 2);
  };
  const RnnPair<T> pairs[4] = {pair_of(0), pair_of(1), pair_of(2), pair_of(3)};
  RnnBackwardInputs<Cell, T> inputs[4];  // loaded one step ahead
  float dh[4], dc[4], mask[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    dh[j] = pairs[j].load_state(shape, p.grad_hn, 0.0f);
    dc[j] = pairs[j].load_state(shape, p.grad_cn, 0.0f);
    mask[j] = pairs[j].load_state(shape, shape.mask, 1.0f);
    if (steps - 1 < pairs[j].length) inputs[j].load(p, pairs[j], steps - 1);
  }

#pragma unroll 1
  for (int iteration = 0; iteration <= steps; iteration++) {
    const int step = steps - 1 - iteration;
    if (iteration > 0) {
      const T* read = buffers + (iteration & 1) * kBuffer + lane / 4 * kPitch + lane % 4 * 8;
      float sums[2][4] = {};  // two chains, half as deep
#pragma unroll
      for (int i = 0; i < kHeld; i++) {
        if (i < blocks) {
          multiply_block<T, true>(sums[i % 2], held[i], *reinterpret_cast<const uint4*>(read + i * kRnnBlockK));
        }
      }
#pragma unroll
      for (int i = kHeld; i < kBlocks; i++) {
        if (i < blocks) {
          RnnFragment f;
          f.top = rest[(i - kHeld) * 64];
          f.bottom = rest[(i - kHeld) * 64 + 32];
          multiply_block<T, true>(sums[i % 2], f, *reinterpret_cast<const uint4*>(read + i * kRnnBlockK));
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (step + 1 < pairs[j].length) dh[j] += mask[j] * (sums[0][j] + sums[1][j]);
      }
    }
    if (step < 0) break;
    T* write = buffers + ((iteration + 1) & 1) * kBuffer;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const RnnPair<T>& pair = pairs[j];
      if (step < pair.length) {
        float grad[kGates], inner;
        backward_pair<Cell, T>(cell, shape, inputs[j], dh[j], dc[j], grad, inner);
        T* next = write + (column + j % 2) * kPitch + pair.unit;
#pragma unroll
        for (int i = 0; i < kGates; i++) next[i * hidden] = from_float<T>(kGates == 3 && i == 2 ? inner : grad[i]);
        store_backward<Cell, T>(p, pair.part(shape, step), pair.unit, grad, inner);
      }
      if (step > 0 && step - 1 < pair.length) inputs[j].load(p, pair, step - 1);
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    pairs[j].store_state(shape, p.grad_h0, dh[j]);
    if constexpr (kGates == 4) pairs[j].store_state(shape, p.grad_c0, dc[j]);
  }
}

}  // namespace bigkern
