// Many blocks a sequence group: each owns kUnits hidden units of one direction for a group of eight sequences, so that
// the cell is local and only the new state (backward: the gates' gradients) is exchanged, through L2.
//
// kResident: the weights stay on chip, all steps run in one cooperative launch, and a flag for each block orders the
// exchange. Otherwise the weights are streamed and the host launches one step at a time; the end of a launch orders it.
//
// Why the flags are right. The exchange has two buffers. State s is read from buffer s % 2 and state s + 1 written to
// the other. A block's flag says how many states it has published in this launch; nothing else writes it.
//   Read after write: the slice's stores -> block barrier -> st.release of s + 1 by one thread (cumulative: it covers
//   what the barrier ordered before it) -> ld.acquire that sees >= s + 1 -> warp barrier -> loads of the slice. A warp
//   waits only for the slices within its own run of k.
//   Write after read: state s + 1 overwrites state s - 1. Before it, the block's warps have passed the barrier that
//   follows the product, so that together they have seen every flag at s; each block raised its flag to s after its
//   own product had read state s - 1, whole, and after the barrier that joined its warps.
//   The partial sums in shared memory are read between that barrier and the one before publishing, and written again
//   only after the latter.
// The loads bypass L1 (ld.cg), where a buffer's content of two steps ago could stand. Launches are ordered by the
// stream, and each call has its own zeroed flags, so nothing is reset between steps, launches or graph replays.
//
// Forward in 16 bits, where |h| stays below 2, the states carry tags instead. A value below 2 in size leaves bit 14,
// the highest of its exponent in bf16 and fp16 alike, at zero. It takes the parity of the buffer's use, (s / 2) % 2: a
// reader polls the states themselves until all bear the tag of step s, and there is no release, no flag and no second
// trip to L2. Modelled at 0.6 to 0.8 of the flags' step (LSTM H = 768, B = 16: 0.78 beside 1.2 us); not measured.
// Why the tags are right. Each element is one 2-byte relaxed access of device scope and validates itself, so that a
// torn vector or a slice half written is only read again.
//   Not too old: a thread reads the same elements at every step. Before it polls for state s it has read state s - 2 at
//   the same address, and coherence lets no later read of it return an older value. In between there is none: the
//   element reads s - 2, with the other tag, or s. Buffer 0 begins as state 0, written by an earlier launch; buffer 1
//   begins with the other tag than state 1's.
//   Not too new: state s + 2 of a sequence is computed from all of its state s + 1, each of whose slices is computed
//   from all of state s as its block read it. A read of s that returned s + 2 would depend on itself, through loads,
//   the partial sums in shared memory and the cell: the PTX model's no-thin-air axiom excludes it. By the same chain
//   two buffers suffice: who overwrites s with s + 2 has seen s + 1, which exists once s was read. Only sequences still
//   running are exchanged: at step s a lane polls for its sequence if the step is within its length, and its owners
//   wrote state s exactly then (padding units of the last slice as zeros). The partial sums keep their two barriers,
//   which no tag replaces: a warp whose run of k holds none of its own block's slice could otherwise start the next
//   step before the sums are read.
// What is weaker than with flags: nothing orders other memory, so that only the states may pass between blocks this
// way; and "not too new" stands on dependencies, not on an acquire that saw a release. The race checker cannot see
// that, as both sides are atomics; schedules and the stress test on a device can. Conditions, the same for all blocks
// of a group, which decide by themselves (states_take_tags): tanh RNN, LSTM or GRU
// (|h| <= max(1, |h0|), also after zoneout, which is a mean), no mask, as dropout's scale breaks the bound, and every
// |h0| below the last value under 2, which stands for NaN. Each block reads the group's h0 from the exchange; all read
// the same, so that nothing is agreed on, the host is not asked, and a graph's replay decides anew.
//
// Not built: h pushed into the shared memory of a cluster's other blocks. Modelled for H = 512 at 0.6 us a step (100
// cycles to issue, 180 to a peer, 50 + 100 to see and read it, 413 of products, as 16 blocks hold what 32 hold here,
// and 220 for the gates): no better than tags at 8 sequences, a quarter better at 64; half of flags' for the GRU, which
// takes tags too. It holds H to 768, or 880 for the GRU, and asks for Hopper.
#pragma once

#include "device/device.cuh"
#include "kernels/rnn_product.cuh"

namespace bigkern {

template <class T>
struct RnnExchange {
  T* states;        // [2][groups of this call][8][pitch]; a group is eight sequences of a direction
  unsigned* flags;  // [groups][slices]
  float* carried;   // [2][directions][batch][hidden]: between launches, h and c, or their gradients
  int64_t groups;   //
  int pitch;        // size rounded up to a K block
};

// 16 units fill two half tiles a gate and leave most of the chip's blocks in use from H = 512 on; fp32 takes 8, so that
// 32 lanes are LSTM's 32 rows.
template <class T>
constexpr int kRnnUnits = sizeof(T) == 4 ? 8 : 16;
constexpr int kRnnWarps = 8;
constexpr int kRnnThreads = kRnnWarps * 32;

template <class T, int kGates, int kHalfTiles, bool kForward, bool kResident>
struct RnnProduct {
  // As many registers as stay below 255 without a spill: the forward pass of LSTM's four gates takes the most.
  static constexpr int kHeld = kForward ? 3 : 8, kAhead = !kForward ? 8 : kGates == 4 ? 4 : 5;
  using type = std::conditional_t<kResident, ResidentProduct<T, kGates, kHalfTiles, kRnnWarps, kHeld, kAhead>,
                                  StreamedProduct<T, kGates, kHalfTiles, kRnnWarps>>;
};

template <int kGates, int kHalfTiles, bool kForward, bool kResident>
struct RnnProduct<float, kGates, kHalfTiles, kForward, kResident> {
  using type = FloatProduct<kGates, kHalfTiles, kRnnWarps, kResident>;
};

template <class Cell, class T, bool kResident>
using RnnForwardProduct = typename RnnProduct<T, Cell::kGates, kRnnUnits<T> / 8 * Cell::kGates, true, kResident>::type;

template <class T, bool kResident>
using RnnBackwardProduct = typename RnnProduct<T, 1, kRnnUnits<T> / 8, false, kResident>::type;

// Waits until every slice of units within the warp's run of k has published `target` states. k counts gates times
// units.
template <int kUnits>
__device__ __forceinline__ void wait_for_slices(const unsigned* flags, const RnnRun& run, int size, int hidden,
                                                unsigned target) {
  const int last = min((run.first + run.count) * kRnnBlockK, size);
  for (int k = run.first * kRnnBlockK; k < last; k = (k / hidden + 1) * hidden) {
    const int gate = k / hidden * hidden, end = ceil_div(min(last - gate, hidden), kUnits);
    for (int slice = (k - gate) / kUnits + static_cast<int>(threadIdx.x) % 32; slice < end; slice += 32) {
      while (ld_acquire(flags + slice) < target) {
      }
    }
  }
  __syncwarp();
}

// The sum of one row and column over all parts.
template <int kParts, int kHalfTiles>
__device__ __forceinline__ float sum_parts(const float* partial, int half_tile, int row, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    sum += partial[part * kHalfTiles * 64 + partial_index(half_tile, row, column)];
  }
  return sum;
}

// Whether the initial states of a group, [8][pitch], are all below what tags can carry; the same for all its blocks.
template <class T>
__device__ __forceinline__ bool states_take_tags(const T* states, int pitch, float* scratch) {
  const auto beyond = [](uint32_t word) { return ((word & 0x7fff7fffu) + 0x40014001u) & 0x80008000u; };  // >= 0x3fff
  uint32_t found = 0;
  for (int i = threadIdx.x * 8; i < kSequences * pitch; i += kRnnThreads * 8) {
    const uint4 word = ld_relaxed(reinterpret_cast<const uint4*>(states + i));
    found |= beyond(word.x) | beyond(word.y) | beyond(word.z) | beyond(word.w);
  }
  const bool any = __any_sync(0xffffffffu, found != 0);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = any ? 1.0f : 0.0f;
  __syncthreads();
  float beyond_tags = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kRnnWarps; warp++) beyond_tags += scratch[warp];
  __syncthreads();  // the scratch is free
  return beyond_tags == 0.0f;
}

template <class T>
__device__ __forceinline__ void store_tagged(T* state, float value, uint32_t tag) {
  const T rounded = from_float<T>(value);
  const uint16_t bits = value == value ? *reinterpret_cast<const uint16_t*>(&rounded) : 0x7fff;
  st_relaxed(reinterpret_cast<uint16_t*>(state), with_tag(bits, tag));
}

template <class Cell, class T, bool kResident>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_forward_kernel(const RnnForwardParams p, const RnnExchange<T> exchange, int64_t first_group, int first_step,
                       int end_step) {
  using Product = RnnForwardProduct<Cell, T, kResident>;
  constexpr int kGates = Cell::kGates, kUnits = kRnnUnits<T>, kHalfTiles = kUnits / 8 * kGates;
  constexpr bool kTags = kResident && sizeof(T) == 2;
  const RnnShape& shape = p.shape;
  const int hidden = shape.hidden, direction = blockIdx.y;
  const int64_t group = first_group + blockIdx.z, sequence0 = group * kSequences;
  const int steps = min(group_steps(shape, sequence0), end_step);
  if (first_step >= steps) return;

  SharedMemory shared;
  float* partial = shared.take<float>(Product::kPartialFloats);
  const RnnWeights<T, kGates> weights(p.weight, direction, hidden, blockIdx.x * kUnits, hidden);
  const Product product(shared, weights);

  const int64_t exchanged = group * shape.directions + direction,
                buffer = exchange.groups * kSequences * exchange.pitch;
  T* states = exchange.states + exchanged * kSequences * exchange.pitch;
  unsigned* flags = exchange.flags + exchanged * gridDim.x;

  // Neighbouring threads have neighbouring units.
  const int slice_unit = threadIdx.x % kUnits, column = threadIdx.x / kUnits;
  const bool owns = column < kSequences;
  const RnnPair<T> pair(shape, direction, weights.unit0 + slice_unit, owns ? sequence0 + column : shape.batch);
  const int64_t carried = pair.state(shape), all = static_cast<int64_t>(shape.directions) * shape.batch * hidden;
  const bool fresh = first_step == 0;
  float h = fresh || !pair.live ? pair.load_state(shape, shape.h0, 0.0f) : exchange.carried[carried];
  float c = fresh || !pair.live ? pair.load_state(shape, shape.c0, 0.0f) : exchange.carried[all + carried];
  const float mask = pair.load_state(shape, shape.mask, 1.0f);
  const float bias_hn = pair.live && p.bias_hn != nullptr
                            ? to_float(static_cast<const T*>(p.bias_hn)[direction * hidden + pair.unit])
                            : 0.0f;
  const Cell cell(shape.cell);

  bool tagged = false;
  int length = pair.length, read_length = 0;  // steps of the sequence that is written, with padding units, and read
  if constexpr (kTags) {
    tagged = cell.is_bounded() && shape.mask == nullptr && shape.variant != RnnVariant::kFlags &&
             states_take_tags(states, exchange.pitch, partial);
    if (tagged) {
      length = RnnPair<T>(shape, direction, 0, owns ? sequence0 + column : shape.batch).length;
      read_length = RnnPair<T>(shape, direction, 0, sequence0 + threadIdx.x % 32 / 4).length;
    }
  }

#pragma unroll 1
  for (int step = first_step; step < steps; step++) {
    const bool active = pair.live && step < length;
    int64_t part = 0;
    float x[kGates];
    if (active) {  // in flight while we wait
      part = pair.part(shape, step);
#pragma unroll
      for (int i = 0; i < kGates; i++) {
        x[i] = to_float(static_cast<const T*>(p.gates)[(part * kGates + i) * hidden + pair.unit]);
      }
    }
    const T* now = states + (step & 1) * buffer;
    if constexpr (kTags) {
      if (tagged) {
        const int exchanged = step < read_length ? static_cast<int>(gridDim.x) * kUnits : 0;
        product.multiply_tagged(now, exchange.pitch, partial, rnn_tag(step), exchanged);
      }
    }
    if (!tagged) {
      if constexpr (kResident) {
        wait_for_slices<kUnits>(flags, product.run(), hidden, hidden, static_cast<unsigned>(step));
      }
      product.multiply(now, exchange.pitch, partial);
    }
    __syncthreads();  // the partial sums are there, and all warps have read the state
    T* next = states + ((step + 1) & 1) * buffer + static_cast<int64_t>(column) * exchange.pitch + pair.unit;
    float saved[Cell::kSaved + 1];
    if (active) {
      float a[kGates];
#pragma unroll
      for (int i = 0; i < kGates; i++) {
        a[i] = sum_parts<Product::kParts, kHalfTiles>(partial, slice_unit / 8 * kGates + i, slice_unit % 8, column);
      }
      forward_pair<Cell, T>(cell, shape, part, pair.unit, x, a, bias_hn, h, c, saved);
      if (!tagged) *next = from_float<T>(h * mask);
    }
    if constexpr (kTags) {
      if (tagged && step < length) store_tagged(next, h, rnn_tag(step + 1));
    }
    __syncthreads();  // the slice is written, and the partial sums are read
    if constexpr (kResident) {
      if (!tagged && threadIdx.x == 0) st_release(flags + blockIdx.x, static_cast<unsigned>(step + 1));
    }
    if (active) store_forward<Cell, T>(p, part, pair.unit, h, saved);  // off the path that others wait for
  }

  if (steps == group_steps(shape, sequence0)) {
    pair.store_state(shape, p.hn, h);
    if constexpr (kGates == 4) pair.store_state(shape, p.cn, c);
  } else if (pair.live) {
    exchange.carried[carried] = h;
    exchange.carried[all + carried] = c;
  }
}

// dh of the step before is W_hh^T times the gates' gradients; k counts gates times units. Iteration i finishes dh with
// the product of what iteration i - 1 published, then takes step steps - 1 - i back through the cell and publishes. The
// last iteration is that product alone: what remains is the initial state's gradient.
template <class Cell, class T, bool kResident>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_backward_kernel(const RnnBackwardParams p, const RnnExchange<T> exchange, int64_t first_group,
                        int first_iteration, int end_iteration) {
  using Product = RnnBackwardProduct<T, kResident>;
  constexpr int kGates = Cell::kGates, kUnits = kRnnUnits<T>, kHalfTiles = kUnits / 8;
  const RnnShape& shape = p.shape;
  const int hidden = shape.hidden, size = kGates * hidden, direction = blockIdx.y;
  const int64_t group = first_group + blockIdx.z, sequence0 = group * kSequences;
  const int steps = group_steps(shape, sequence0), end = min(steps + 1, end_iteration);
  if (first_iteration >= end) return;

  SharedMemory shared;
  float* partial = shared.take<float>(Product::kPartialFloats);
  const RnnWeights<T, 1> weights(p.weight, direction, hidden, blockIdx.x * kUnits, size);
  const Product product(shared, weights);

  const int64_t exchanged = group * shape.directions + direction,
                buffer = exchange.groups * kSequences * exchange.pitch;
  T* grads = exchange.states + exchanged * kSequences * exchange.pitch;
  unsigned* flags = exchange.flags + exchanged * gridDim.x;

  const int slice_unit = threadIdx.x % kUnits, column = threadIdx.x / kUnits;
  const bool owns = column < kSequences;
  const RnnPair<T> pair(shape, direction, weights.unit0 + slice_unit, owns ? sequence0 + column : shape.batch);
  const int64_t carried = pair.state(shape), all = static_cast<int64_t>(shape.directions) * shape.batch * hidden;
  const bool fresh = first_iteration == 0;
  float dh = fresh || !pair.live ? pair.load_state(shape, p.grad_hn, 0.0f) : exchange.carried[carried];
  float dc = fresh || !pair.live ? pair.load_state(shape, p.grad_cn, 0.0f) : exchange.carried[all + carried];
  const float mask = pair.load_state(shape, shape.mask, 1.0f);
  const Cell cell(shape.cell);

#pragma unroll 1
  for (int iteration = first_iteration; iteration < end; iteration++) {
    const int step = steps - 1 - iteration;
    const bool active = step >= 0 && step < pair.length;
    RnnBackwardInputs<Cell, T> inputs;
    if (active) inputs.load(p, pair, step);
    if (iteration > 0) {
      if constexpr (kResident) {
        wait_for_slices<kUnits>(flags, product.run(), size, hidden, static_cast<unsigned>(iteration));
      }
      product.multiply(grads + (iteration & 1) * buffer, exchange.pitch, partial);
      __syncthreads();
      if (step + 1 < pair.length) {
        dh += mask * sum_parts<Product::kParts, kHalfTiles>(partial, slice_unit / 8, slice_unit % 8, column);
      }
    }
    if (step < 0) break;
    float grad[kGates], inner = 0.0f;
    if (active) {
      backward_pair<Cell, T>(cell, shape, inputs, dh, dc, grad, inner);
      T* next = grads + ((iteration + 1) & 1) * buffer + static_cast<int64_t>(column) * exchange.pitch + pair.unit;
#pragma unroll
      for (int i = 0; i < kGates; i++) next[i * hidden] = from_float<T>(kGates == 3 && i == 2 ? inner : grad[i]);
    }
    __syncthreads();
    if constexpr (kResident) {
      if (threadIdx.x == 0) st_release(flags + blockIdx.x, static_cast<unsigned>(iteration + 1));
    }
    if (active) store_backward<Cell, T>(p, pair.part(shape, step), pair.unit, grad, inner);
  }

  if (end == steps + 1) {
    pair.store_state(shape, p.grad_h0, dh);
    if constexpr (kGates == 4) pair.store_state(shape, p.grad_c0, dc);
  } else if (pair.live) {
    exchange.carried[carried] = dh;
    exchange.carried[all + carried] = dc;
  }
}

// The exchange as the first step finds it: the masked initial state in buffer 0 (backward: nothing), elsewhere what is
// no NaN, because zero weights beyond the matrix meet it: zeros or, as state 1's buffer wants the other tag, twos;
// flags at zero.
template <class T>
__global__ void __launch_bounds__(256)
    rnn_start_kernel(const RnnShape shape, const RnnExchange<T> exchange, int64_t flags, bool forward) {
  const int64_t buffer = exchange.groups * kSequences * exchange.pitch, stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < 2 * buffer; i += stride) {
    const int unit = static_cast<int>(i % exchange.pitch);
    const int64_t row = i / exchange.pitch, group = row / kSequences;
    const int direction = static_cast<int>(group % shape.directions);
    const int64_t sequence = group / shape.directions * kSequences + row % kSequences;
    float value = forward && sizeof(T) == 2 ? 2.0f : 0.0f;
    if (forward && i < buffer) {
      const RnnPair<T> pair(shape, direction, unit, sequence);
      value = pair.load_state(shape, shape.h0, 0.0f) * pair.load_state(shape, shape.mask, 1.0f);
    }
    exchange.states[i] = from_float<T>(value);
  }
  for (int64_t i = first; i < flags; i += stride) exchange.flags[i] = 0;
}

}  // namespace bigkern
