// The product of every step: a slice of the recurrent weights, M rows x K, times the states of eight sequences.
//
// Rows come in half tiles of 8: one gate of 8 units. An m16n8k16 takes two half tiles. K is cut into blocks of 32; each
// warp takes a contiguous run of them, so that it waits only for the blocks that write its run, and leaves its partial
// sums in shared memory. Within a block of 32, lane t of a quad owns k = 8t .. 8t+7 of both operands: the order of k
// within a product is free, and so one 16-byte load feeds two instructions.
#pragma once

#include "device/device.cuh"
#include "kernels/rnn_cells.cuh"

namespace bigkern {

constexpr int kRnnBlockK = 32;

// The rows of the weights that a block multiplies: half tile i is gate i % kGates of units unit0 + 8 (i / kGates) on.
// Backward multiplies the transposed weights, whose rows are units: one gate.
template <class T, int kGates>
struct RnnWeights {
  const T* weight;  // (kGates x hidden) rows of size
  int hidden, unit0, size;
  bool aligned;  // every row starts at a multiple of 16 bytes

  __device__ __forceinline__ RnnWeights(const void* all, int direction, int hidden, int unit0, int size)
      : weight(static_cast<const T*>(all) + static_cast<int64_t>(direction) * kGates * hidden * size),
        hidden(hidden),
        unit0(unit0),
        size(size) {
    aligned = size % kVecElements<T> == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  }

  // Elements k .. k + kVecElements - 1 of a row; zero outside the matrix.
  __device__ __forceinline__ Vec<T, kVecElements<T>> load(int half_tile, int row, int k) const {
    constexpr int kCount = kVecElements<T>;
    const int unit = unit0 + half_tile / kGates * 8 + row;
    Vec<T, kCount> values;
    const T* start = weight + (static_cast<int64_t>(half_tile % kGates) * hidden + unit) * size + k;
    if (aligned && unit < hidden && k < size) {
      values = load_vec<T, kCount>(start);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) values.v[i] = unit < hidden && k + i < size ? start[i] : from_float<T>(0.0f);
    }
    return values;
  }
};

// The K blocks of one warp.
struct RnnRun {
  int first, count;

  __device__ __forceinline__ RnnRun(int size, int warps, int warp) {
    const int blocks = ceil_div(size, kRnnBlockK), each = ceil_div(blocks, warps);
    first = min(warp * each, blocks);
    count = min(each, blocks - first);
  }
};

__host__ __device__ constexpr int rnn_blocks_a_warp(int size, int warps) {
  return ceil_div(ceil_div(size, kRnnBlockK), warps);
}

__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_bf16(d, a, b);
}
__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_f16(d, a, b);
}

// 16 rows x one K block of weights as lane (g, t) holds them: row g and row g + 8, k = 8t .. 8t+7.
struct RnnFragment {
  uint4 top, bottom;
};

// d += fragment * states, where states is k = 8t .. 8t+7 of sequence g. Without a second half tile the fragment's
// bottom takes no registers.
template <class T, bool kBoth>
__device__ __forceinline__ void multiply_block(float (&d)[4], const RnnFragment& f, const uint4& states) {
  const uint4 bottom = kBoth ? f.bottom : make_uint4(0, 0, 0, 0);
  const uint32_t a0[4] = {f.top.x, bottom.x, f.top.y, bottom.y}, b0[2] = {states.x, states.y};
  mma(T{}, d, a0, b0);
  const uint32_t a1[4] = {f.top.z, bottom.z, f.top.w, bottom.w}, b1[2] = {states.z, states.w};
  mma(T{}, d, a1, b1);
}

// Tagged states: 16-bit values below 2 in size leave the highest bit of their exponent, bit 14, to the tag. NaN stands
// as the largest of them, which is no state: see states_take_tags in rnn_grid.cuh.
constexpr uint32_t kRnnTagBits = 0x40004000u;

// The tag of state number s: as two buffers alternate, the parity of the buffer's use.
__device__ __forceinline__ uint32_t rnn_tag(int state) {
  return (state & 2) != 0 ? kRnnTagBits : 0u;
}

__device__ __forceinline__ uint16_t with_tag(uint16_t bits, uint32_t tag) {
  return static_cast<uint16_t>((bits & ~kRnnTagBits) | (tag & 0x4000u));
}

// Two states without their tags: adding one carries into bit 14 just where NaN stands.
__device__ __forceinline__ uint32_t without_tags(uint32_t word) {
  return (word & ~kRnnTagBits) | (((word & 0x3fff3fffu) + 0x00010001u) & kRnnTagBits);
}

// Eight states of which those not yet written still bear the other tag; reads again until none does.
template <class T>
__device__ __forceinline__ uint4 await_states(uint4 found, const T* states, uint32_t tag) {
  while ((((found.x ^ tag) | (found.y ^ tag) | (found.z ^ tag) | (found.w ^ tag)) & kRnnTagBits) != 0) {
    found = ld_relaxed(reinterpret_cast<const uint4*>(states));
  }
  return make_uint4(without_tags(found.x), without_tags(found.y), without_tags(found.z), without_tags(found.w));
}

template <class T, int kGates, int kHalfTiles>
__device__ __forceinline__ RnnFragment load_fragment(const RnnWeights<T, kGates>& weights, int tile, int k_block) {
  const int lane = threadIdx.x % 32, row = lane / 4, k = k_block * kRnnBlockK + lane % 4 * 8;
  RnnFragment found;
  const Vec<T, 8> top = weights.load(2 * tile, row, k);
  found.top = *reinterpret_cast<const uint4*>(&top);
  found.bottom = make_uint4(0, 0, 0, 0);
  if (2 * tile + 1 < kHalfTiles) {
    const Vec<T, 8> bottom = weights.load(2 * tile + 1, row, k);
    found.bottom = *reinterpret_cast<const uint4*>(&bottom);
  }
  return found;
}

// Partial sums in shared memory: an 8 x 8 tile for each half tile of each part, where column n of row r stands at
// n ^ (r & 6), so that neither the fragments' pairs nor eight rows of one column share banks.
__device__ __forceinline__ int partial_index(int half_tile, int row, int column) {
  return half_tile * 64 + row * 8 + (column ^ (row & 6));
}

// Weights in the registers of the warp that multiplies them: the first kHeld of its K blocks; the others in shared
// memory. kAhead loads of states are in flight beyond those.
template <class T, int kGates, int kHalfTiles, int kWarps, int kHeld, int kAhead>
class ResidentProduct {
 public:
  static constexpr int kTiles = kHalfTiles / 2;
  static_assert(kHalfTiles % 2 == 0, "whole tiles");
  static constexpr int kParts = kWarps;
  static constexpr int kPartialFloats = kParts * kHalfTiles * 64;

  static size_t shared_bytes(int size) {
    const int beyond = rnn_blocks_a_warp(size, kWarps) - kHeld;
    return sizeof(float) * kPartialFloats + (beyond > 0 ? beyond : 0) * kWarps * kTiles * 32 * sizeof(RnnFragment);
  }

  __device__ __forceinline__ ResidentProduct(SharedMemory& shared, const RnnWeights<T, kGates>& weights)
      : run_(weights.size, kWarps, threadIdx.x / 32) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int beyond = rnn_blocks_a_warp(weights.size, kWarps) - kHeld;
    rest_ = shared.take<uint4>(max(beyond, 0) * kWarps * kTiles * 64) + max(beyond, 0) * warp * kTiles * 64 + lane;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        if (i < run_.count) {
          const RnnFragment f = load_fragment<T, kGates, kHalfTiles>(weights, tile, run_.first + i);
          held_[i][tile].top = f.top;
          held_[i][tile].bottom = f.bottom;
        }
      }
    }
    for (int i = kHeld; i < run_.count; i++) {
      for (int tile = 0; tile < kTiles; tile++) {
        const RnnFragment f = load_fragment<T, kGates, kHalfTiles>(weights, tile, run_.first + i);
        uint4* slot = rest_ + ((i - kHeld) * kTiles + tile) * 64;
        store_words(slot, f.top);
        store_words(slot + 32, f.bottom);
      }
    }
  }

  __device__ __forceinline__ RnnRun run() const { return run_; }

  // states: [8][pitch], what other blocks have written since the kernel began.
  __device__ __forceinline__ void multiply(const T* states, int pitch, float* partial) const {
    multiply_states<false>(states, pitch, partial, 0, 0);
  }

  // states: [8][pitch], what other blocks are writing now with this tag. Of this lane's sequence, lane / 4, they write
  // the first `exchanged`.
  __device__ __forceinline__ void multiply_tagged(const T* states, int pitch, float* partial, uint32_t tag,
                                                  int exchanged) const {
    multiply_states<true>(states, pitch, partial, tag, exchanged);
  }

  __device__ __forceinline__ static void store_partial(const float (&sums)[kTiles][4], float* part) {
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      *reinterpret_cast<float2*>(part + partial_index(2 * tile, row, column)) =
          make_float2(sums[tile][0], sums[tile][1]);
      *reinterpret_cast<float2*>(part + partial_index(2 * tile + 1, row, column)) =
          make_float2(sums[tile][2], sums[tile][3]);
    }
  }

 private:
  template <bool kTagged>
  __device__ __forceinline__ void multiply_states(const T* states, int pitch, float* partial, uint32_t tag,
                                                  int exchanged) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_k = run_.first * kRnnBlockK + lane % 4 * 8;
    const T* mine = states + static_cast<int64_t>(lane / 4) * pitch + first_k;
    const int count = kTagged ? min(run_.count, ceil_div(max(exchanged - first_k, 0), kRnnBlockK)) : run_.count;
    const auto load = [&](int i) {
      const uint4* p = reinterpret_cast<const uint4*>(mine + i * kRnnBlockK);
      if constexpr (kTagged) return i < count ? ld_relaxed(p) : make_uint4(tag, tag, tag, tag);
      return i < count ? __ldcg(p) : make_uint4(0, 0, 0, 0);
    };
    const auto arrived = [&](const uint4& found, int i) {
      if constexpr (kTagged) return await_states(found, mine + i * kRnnBlockK, tag);
      return found;
    };
    uint4 first[kHeld], next[kAhead];
#pragma unroll
    for (int i = 0; i < kHeld; i++) first[i] = load(i);
#pragma unroll
    for (int i = 0; i < kAhead; i++) next[i] = load(kHeld + i);
    float sums[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kHeld; i++) first[i] = arrived(first[i], i);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      if (i < run_.count) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) multiply_block<T, true>(sums[tile], held_[i][tile], first[i]);
      }
    }
#pragma unroll 1
    for (int base = kHeld; base < run_.count; base += kAhead) {
      uint4 now[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        now[i] = next[i];
        next[i] = load(base + kAhead + i);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) now[i] = arrived(now[i], base + i);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (base + i < run_.count) {
#pragma unroll
          for (int tile = 0; tile < kTiles; tile++) {
            const uint4* slot = rest_ + ((base + i - kHeld) * kTiles + tile) * 64;
            RnnFragment f;
            f.top = slot[0];
            f.bottom = slot[32];
            multiply_block<T, true>(sums[tile], f, now[i]);
          }
        }
      }
    }
    store_partial(sums, partial + warp * kHalfTiles * 64);
  }

  __device__ __forceinline__ static void store_words(uint4* slot, const uint4& value) { *slot = value; }

  RnnRun run_;
  RnnFragment held_[kHeld][kTiles];
  uint4* rest_;
};

// Weights read again at every product, for shapes that no chip holds: any K.
template <class T, int kGates, int kHalfTiles, int kWarps>
class StreamedProduct {
 public:
  static constexpr int kParts = kWarps;
  static constexpr int kPartialFloats = kParts * kHalfTiles * 64;

  static size_t shared_bytes(int) { return sizeof(float) * kPartialFloats; }

  __device__ __forceinline__ StreamedProduct(SharedMemory&, const RnnWeights<T, kGates>& weights)
      : run_(weights.size, kWarps, threadIdx.x / 32), weights_(weights) {}

  __device__ __forceinline__ RnnRun run() const { return run_; }

  __device__ __forceinline__ void multiply(const T* states, int pitch, float* partial) const {
    constexpr int kTiles = Resident::kTiles;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const T* mine = states + static_cast<int64_t>(lane / 4) * pitch + run_.first * kRnnBlockK + lane % 4 * 8;
    float sums[kTiles][4] = {};
#pragma unroll 1
    for (int i = 0; i < run_.count; i++) {
      const uint4 now = __ldcg(reinterpret_cast<const uint4*>(mine + i * kRnnBlockK));
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        const RnnFragment f = load_fragment<T, kGates, kHalfTiles>(weights_, tile, run_.first + i);
        multiply_block<T, true>(sums[tile], f, now);
      }
    }
    Resident::store_partial(sums, partial + warp * kHalfTiles * 64);
  }

 private:
  using Resident = ResidentProduct<T, kGates, kHalfTiles, kWarps, 1, 1>;

  RnnRun run_;
  RnnWeights<T, kGates> weights_;
};

// fp32: FFMA, a lane for each row. Where rows are fewer than lanes, several lanes share a row and split its k. The
// states of two K blocks at a time go through shared memory, from where all lanes read them at once.
template <int kGates, int kHalfTiles, int kWarps, bool kResident>
class FloatProduct {
 public:
  static constexpr int kRows = kHalfTiles * 8, kSplit = 32 / kRows, kParts = kWarps * kSplit;
  static constexpr int kPartialFloats = kParts * kHalfTiles * 64;
  static_assert(kRows <= 32, "a lane for each row");

  static size_t shared_bytes(int size) {
    const size_t weights = kResident ? size_t{16} * rnn_blocks_a_warp(size, kWarps) * kWarps * kQuads * kRows : 0;
    return weights + sizeof(float) * (kPartialFloats + kWarps * kStage);
  }

  __device__ __forceinline__ FloatProduct(SharedMemory& shared, const RnnWeights<float, kGates>& weights)
      : run_(weights.size, kWarps, threadIdx.x / 32), weights_(weights) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    stage_ = shared.take<float>(kWarps * kStage) + warp * kStage;
    if constexpr (kResident) {
      const int each = rnn_blocks_a_warp(weights.size, kWarps);
      held_ = shared.take<float4>(each * kWarps * kQuads * kRows) + each * warp * kQuads * kRows;
      for (int i = lane; i < run_.count * kQuads * kRows; i += 32) {
        const int row = i % kRows, k = run_.first * kRnnBlockK + i / kRows * 4;
        const Vec<float, 4> values = weights.load(row / 8, row % 8, k);
        held_[i] = make_float4(values.v[0], values.v[1], values.v[2], values.v[3]);
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ RnnRun run() const { return run_; }

  __device__ __forceinline__ void multiply(const float* states, int pitch, float* partial) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane % kRows, split = lane / kRows;
    const float* mine = states + run_.first * kRnnBlockK;
    float4 next[kLoads];
    load(mine, pitch, 0, next);
    float sums[kSequences] = {};
#pragma unroll 1
    for (int base = 0; base < run_.count; base += kStageBlocks) {
      __syncwarp();  // the lanes are done with what the stage held
#pragma unroll
      for (int i = 0; i < kLoads; i++) reinterpret_cast<float4*>(stage_)[i * 32 + lane] = next[i];
      __syncwarp();
      load(mine, pitch, base + kStageBlocks, next);
      const int quads = min(kStageBlocks, run_.count - base) * kQuads;
      if (split < kSplit) {
#pragma unroll 4
        for (int quad = split; quad < quads; quad += kSplit) {
          const float4 w = weight(base * kQuads + quad, row);
#pragma unroll
          for (int n = 0; n < kSequences; n++) {
            const float4 h = *reinterpret_cast<const float4*>(stage_ + n * kStagePitch + quad * 4);
            sums[n] = __fmaf_rn(w.x, h.x, __fmaf_rn(w.y, h.y, __fmaf_rn(w.z, h.z, __fmaf_rn(w.w, h.w, sums[n]))));
          }
        }
      }
    }
    if (split < kSplit) {
      float* part = partial + (warp * kSplit + split) * kHalfTiles * 64;
#pragma unroll
      for (int n = 0; n < kSequences; n += 2) {
        *reinterpret_cast<float2*>(part + partial_index(row / 8, row % 8, n)) = make_float2(sums[n], sums[n + 1]);
      }
    }
  }

 private:
  static constexpr int kQuads = kRnnBlockK / 4, kStageBlocks = 2, kStagePitch = kStageBlocks * kRnnBlockK;
  static constexpr int kStage = kSequences * kStagePitch, kLoads = kStage / 4 / 32;

  __device__ __forceinline__ void load(const float* mine, int pitch, int base, float4 (&found)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int j = i * 32 + threadIdx.x % 32, n = j / (kStagePitch / 4), k = j % (kStagePitch / 4) * 4;
      found[i] =
          base * kRnnBlockK + k < run_.count * kRnnBlockK
              ? __ldcg(reinterpret_cast<const float4*>(mine + static_cast<int64_t>(n) * pitch + base * kRnnBlockK + k))
              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  __device__ __forceinline__ float4 weight(int quad, int row) const {
    if constexpr (kResident) {
      return held_[quad * kRows + row];
    } else {
      const Vec<float, 4> values = weights_.load(row / 8, row % 8, run_.first * kRnnBlockK + quad * 4);
      return make_float4(values.v[0], values.v[1], values.v[2], values.v[3]);
    }
  }

  RnnRun run_;
  RnnWeights<float, kGates> weights_;
  float* stage_;
  float4* held_;
};

}  // namespace bigkern
