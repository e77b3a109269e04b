// Fused attention, forward and backward: softmax(scale query key^T) value, tile by tile, without the scores in memory.
//
// Maths, for query row i and key row j that i may see:
//     s_ij = scale q_i . k_j      softcap: s = softcap tanh(s / softcap)      s += mask_ij - slope |position_i - j|
//     p_ij = exp(s_ij - lse_i)    lse_i = log(sum over j of exp(s_ij))        output_i = sum over j of drop(p_ij) v_j
// Backward, with g = grad_output and drop's mask and factor m_ij, 0 or 1 / (1 - dropout_p):
//     delta_i = g_i . output_i - grad_lse_i            ds_ij = p_ij (m_ij g_i . v_j - delta_i)      grad_mask = ds
//     grad_v_j = sum over i of m_ij p_ij g_i           c_ij = 1, or 1 - tanh^2 under softcap
//     grad_q_i = scale sum over j of ds_ij c_ij k_j    grad_k_j = scale sum over i of ds_ij c_ij q_i
//     grad_slope = -sum over i and j of ds_ij |position_i - j|
//
// Floors. Forward 4 B H Sq Sk d FLOP, backward 2.5 times that, half of each if causal; against bytes read and written
// once they matter from a few hundred rows on, and below (decoding) the bytes of key and value do.
//
// Tiling, forward. A block of 4 warps owns kRows rows of one head, each warp 16 or 32 of them, with their output and
// statistics in registers, and walks over tiles of kKeys keys:
//
//                   wait K | Q K^T, mask, exp2            | wait V | output += P V
//     in flight            | V of this tile               |        | K of the next
//
// Scores never leave the registers: the accumulator of one mma is the left operand of the next. Tiles that the window
// (causal too) hides from all rows are skipped, those it cuts are compared element by element, and the others are not.
// Rows with the most keys start first. Rows may be (query, head) pairs of the heads that share a key head, so that
// decoding reads key and value once a group. Where blocks are few, the keys are split over more of them, and a second
// kernel weighs their outputs by their lse.
//
// Tiling, backward. A block owns kKeys keys of one key head, 16 a warp, with their gradients in registers, and walks
// over tiles of kQueries rows of all the heads that share them. Scores are transposed (keys are the mma's rows), so
// that P and dS are again left operands from registers; dS goes through shared memory once, for grad_query:
//
//     wait Q, dO | S^T = K Q^T, P | dP^T = V dO^T, dS | dV += P^T dO, dK += dS^T Q | dS to shared | dQ = dS K
//     in flight                                                                                   | next Q, dO
//
// grad_query is added up in fp32, by atomics; when deterministic, each of a few blocks a head owns a copy of it, and
// the copies are added in order. Where a warp cannot hold all columns of its keys'
// gradients (head_dim 256; fp32 beyond 64), several share the keys and each computes their scores.
//
// Shared memory is swizzled: 16-byte chunk c of row r stands at chunk c ^ r % 8, so that ldmatrix meets every bank
// once.
//
// Instances, for each of bf16 and fp16, head_dim 64 (and below), 128 and 256: with every feature at run time, and up to
// 128 a plain one with windows alone, whose inner loop has nothing more in it; fp32 has the former. Two directions: 26
// kernels, and four small ones a dtype. value_dim is padded with head_dim to the larger one. What a tile may be is
// bound by registers, of which the output of 32 x 128 or 16 x 256 takes half: hence 32 keys in the plain kernel of 128,
// and no more than 16 at 256, which costs it time.
//
// Numerics: scores, statistics and sums are fp32; P and dS are rounded to T for the tensor cores. Differences from the
// maximum and, with features, from lse are taken before they are scaled. An fp32 product is four tf32 ones, which
// leaves an error of about 2^-24 of each factor, and five under the weights (P V, P^T dO), which leaves none of the
// values'; an infinite factor makes NaN. Their sums are rounded to nearest, step by step.
//
// The path of another architecture enters in attention_forward and attention_backward below, and shares
// attention_scores.cuh.
//
// Registers: at most 255, by ptxas for sm_80 and sm_90a, and nothing spills. Expected: two blocks a multiprocessor, the
// rate of FlashAttention-2. Not measured.
#pragma once

#include "device/device.cuh"
#include "kernels/attention.h"
#include "kernels/attention_hopper.h"
#include "kernels/attention_hopper_backward.h"
#include "kernels/attention_scores.cuh"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace bigkern {
namespace attention {

// ---- Tiles in shared memory ----

template <class T, int kCols>
struct SharedTile {
  static constexpr int kVec = kVecElements<T>;
  static constexpr int kChunks = kCols / kVec;
  static_assert((kChunks & (kChunks - 1)) == 0 && kChunks >= 2, "whole powers of two");

  // Element (row, col); the rest of its chunk follows it.
  static __device__ __forceinline__ T* at(T* tile, int row, int col) {
    const int turn = kChunks >= 8 ? row % 8 : row / (8 / kChunks) % kChunks;
    return tile + row * kCols + ((col / kVec) ^ turn) * kVec + col % kVec;
  }
};

// Starts the copy of `rows` x `cols` elements to a tile and fills the rest of its kRows with zeros. source(row) is a
// row's first element. Without `vectors` it copies at once, element by element.
template <class T, int kCols, int kRows, int kThreads, class Source>
__device__ __forceinline__ void load_tile(T* tile, int rows, int cols, bool vectors, Source source) {
  using Tile = SharedTile<T, kCols>;
  constexpr int kVec = Tile::kVec;
  if (vectors) {
    constexpr int kSteps = ceil_div(kRows * Tile::kChunks, kThreads);
#pragma unroll 1  // the addresses of unrolled rows would be kept in registers all through the kernel's loop
    for (int i = 0; i < kSteps; i++) {
      const int chunk = i * kThreads + threadIdx.x;
      const int row = chunk / Tile::kChunks, col = chunk % Tile::kChunks * kVec;
      if (kRows * Tile::kChunks % kThreads != 0 && row >= kRows) break;
      const bool inside = row < rows && col < cols;
      cp_async16(Tile::at(tile, row, col), inside ? source(row) + col : source(0), inside);
    }
  } else {
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < kRows * Tile::kChunks; chunk += kThreads) {
      const int row = chunk / Tile::kChunks, col = chunk % Tile::kChunks * kVec;
      Vec<T, kVec> values;
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        values.v[j] = row < rows && col + j < cols ? source(row)[col + j] : from_float<T>(0.0f);
      }
      store_vec<T, kVec>(Tile::at(tile, row, col), values);
    }
  }
}

// ---- Matrix fragments ----
//
// One step of a product is kDepth deep. fp32 takes a transposed operand's elements 2t and 2t+1 where the instruction
// has t and t+4: the order of a sum's terms is free, and this is the order in which an accumulator holds them.

template <class T>
constexpr int kDepth = 2 * kVecElements<T>;

// Steps of a product over head_dim that are unrolled: more cost registers that would spill, and compile time.
template <class T>
constexpr int kProductSteps = sizeof(T) == 2 ? 4 : 2;

// 16 x kDepth of a tile whose rows are the product's.
template <class T, int kCols>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], T* tile, int row0, int k0) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, SharedTile<T, kCols>::at(tile, row0 + lane % 16, k0 + lane / 16 * kVecElements<T>));
}

// kDepth x 16 of a tile whose rows are the product's columns.
template <class T, int kCols>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], T* tile, int col0, int k0) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(b, SharedTile<T, kCols>::at(tile, col0 + lane % 8 + lane / 16 * 8, k0 + lane / 8 % 2 * kVecElements<T>));
}

// kDepth x 16 of a tile whose rows are the product's depth; it begins at element `place0` of `tile`, a multiple of its
// size. fp32's places are changed bits of a few: written with SharedTile::at, the compiler keeps a register for each
// column all through the kernel, and spills at head_dim 256. A place0 that changes from tile to tile saves even these.
template <class T, int kCols>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], T* tile, int k0, int col0, int place0 = 0) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(b, SharedTile<T, kCols>::at(tile + place0, k0 + lane % 16, col0 + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane % 4 * 2 + i % 2, col = col0 + i / 2 * 8;
      const int place = place0 + (k0 + row) * kCols + (lane / 16 ^ row % 8) * kVecElements<T> + lane / 4 % 4;
      b[i] = __float_as_uint(tile[(place ^ col % 32) + col / 32 * 32]);
    }
  }
}

// 16 x kDepth of a tile whose rows are the product's depth.
template <class T, int kCols>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], T* tile, int k0, int row0) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(a, SharedTile<T, kCols>::at(tile, k0 + lane % 8 + lane / 16 * 8, row0 + lane / 8 % 2 * 8));
  } else {
    const int row = k0 + lane % 4 * 2, col = row0 + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i] = __float_as_uint(*SharedTile<T, kCols>::at(tile, row + i / 2, col + i % 2 * 8));
    }
  }
}

// Step `step` of a left operand from accumulators, 8 columns each.
template <class T, int kTiles>
__device__ __forceinline__ void accumulator_to_a(uint32_t (&a)[4], const float (&c)[kTiles][4], int step) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = c[2 * step + i / 2] + i % 2 * 2;
      a[i] = pack_pair<T>(pair[0], pair[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = __float_as_uint(c[step][i % 2 * 2 + i / 2]);
  }
}

// How many steps of a product whose left operand is accumulators are unrolled, and of how many column tiles: what fp32
// has no registers for, if the compiler may have them all in flight at once.
template <class T>
constexpr int kUnrolledSteps = sizeof(T) == 2 ? 8 : 1;
template <class T>
constexpr int kColumnTiles = sizeof(T) == 2 ? 32 : 4;

// Step `step` of such a loop, whose steps follow each other from 0 to the last. Where it is not unrolled, accumulators
// go round, for registers have no index.
template <class T, int kTiles>
__device__ __forceinline__ void next_a(uint32_t (&a)[4], float (&c)[kTiles][4], int step) {
  if constexpr (kUnrolledSteps<T> > 1) {
    accumulator_to_a<T>(a, c, step);
  } else {
    accumulator_to_a<T>(a, c, 0);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float first = c[0][e];
#pragma unroll
      for (int i = 1; i < kTiles; i++) c[i - 1][e] = c[i][e];
      c[kTiles - 1][e] = first;
    }
  }
}

// d += a b, 16 x 8. fp32: of a = a' + a'' and b = b' + b'', each part a tf32, all four products, the smallest first;
// without a'' b'' gradients were up to 4 times as wrong as torch's (emulated). They make a sum of their own, which is
// added by an instruction that rounds to nearest (Ootomo, Yokota: "Recovering single precision accuracy from Tensor
// Cores", 2022; tensor cores truncate).
//
// kWhole: b in three parts, which hold all of it: where a row sees one key alone, its value is the output to the bit.
template <class T, bool kWhole = false>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    mma_m16n8k16_bf16(d, a, {b0, b1});
  } else if constexpr (std::is_same_v<T, __half>) {
    mma_m16n8k16_f16(d, a, {b0, b1});
  } else {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    const uint32_t b[2] = {b0, b1};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a_high[i] = to_tf32(__uint_as_float(a[i]));
      a_low[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(a_high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      b_high[i] = to_tf32(__uint_as_float(b[i]));
      b_low[i] = to_tf32(__uint_as_float(b[i]) - __uint_as_float(b_high[i]));
    }
    float sum[4] = {};
    if constexpr (kWhole) {
      uint32_t b_last[2];  // of so few bits that they are a tf32's
#pragma unroll
      for (int i = 0; i < 2; i++) {
        b_last[i] = __float_as_uint(__uint_as_float(b[i]) - __uint_as_float(b_high[i]) - __uint_as_float(b_low[i]));
      }
      mma_m16n8k8_tf32(sum, a_high, b_last);
    }
    mma_m16n8k8_tf32(sum, a_low, b_low);
    mma_m16n8k8_tf32(sum, a_low, b_high);
    mma_m16n8k8_tf32(sum, a_high, b_low);
    mma_m16n8k8_tf32(sum, a_high, b_high);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] += sum[i];
  }
}

// Columns of one part of a product over head_dim: fp32 adds the parts up, so that few sums round at the whole's size.
template <class T>
constexpr int kPartCols = sizeof(T) == 2 ? 256 : 64;

// sums, which are 0, from multiply(sums, col) of each part of `cols` columns.
template <class T, int kDim, class Sums, class Multiply>
__device__ __forceinline__ void multiply_parts(Sums& sums, int cols, Multiply multiply) {
  if constexpr (kDim <= kPartCols<T>) {
    multiply(sums, 0);
  } else {
#pragma unroll 1
    for (int col = 0; col < cols; col += kPartCols<T>) {
      Sums part = {};
      multiply(part, col);
      float* sum = reinterpret_cast<float*>(&sums);
      const float* addend = reinterpret_cast<const float*>(&part);
#pragma unroll
      for (size_t i = 0; i < sizeof(Sums) / sizeof(float); i++) sum[i] += addend[i];
    }
  }
}

// Accumulators, 16 rows times a factor (of rows 0 to 7, 8 to 15), to a tile from (row0, col0) on, and from there to
// rows of global memory, by one warp; in vectors where `vectors`.
template <class T, int kCols, int kTiles, class Target>
__device__ __forceinline__ void store_rows(T* tile, int row0, int col0, const float (&c)[kTiles][4], float factor_low,
                                           float factor_high, int rows, int cols, bool vectors, Target target) {
  using Tile = SharedTile<T, kCols>;
  constexpr int kVec = Tile::kVec, kChunks = kTiles * 8 / kVec;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = half == 0 ? factor_low : factor_high;
      Vec<T, 2> pair;
      pair.v[0] = from_float<T>(c[i][2 * half] * factor);
      pair.v[1] = from_float<T>(c[i][2 * half + 1] * factor);
      store_vec<T, 2>(Tile::at(tile, row0 + lane / 4 + 8 * half, col0 + i * 8 + lane % 4 * 2), pair);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int chunk = lane; chunk < 16 * kChunks; chunk += 32) {
    const int row = row0 + chunk / kChunks, col = col0 + chunk % kChunks * kVec;
    if (row >= rows || col >= cols) continue;
    const Vec<T, kVec> values = load_vec<T, kVec>(Tile::at(tile, row, col));
    T* destination = target(row) + col;
    if (vectors) {
      store_vec<T, kVec>(destination, values);
    } else {
      for (int j = 0; j < kVec && col + j < cols; j++) destination[j] = values.v[j];
    }
  }
}

// ---- Forward ----

constexpr int kForwardThreads = 128;

template <class T, int kDim, bool kPlain>
struct ForwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  // 32 rows a warp halve what the warps read from shared memory, as far as registers go.
  static constexpr int kWarpTiles = (kDim == 64 && !kWide) || (kDim == 128 && kPlain) ? 2 : 1;
  static constexpr int kRows = 4 * 16 * kWarpTiles;
  // More keys a tile with an output of 256 columns would spill.
  static constexpr int kProductSteps = kDim == 256 && kWide    ? 1
                                       : kPlain && kDim == 128 ? 2
                                                               : attention::kProductSteps<T>;  // unrolled
  static constexpr int kKeys = kDim == 256 ? 16 : kWide || (kDim == 128 && kPlain) ? 32 : 64;
  static constexpr int kElements = (kRows + 2 * kKeys) * kDim;
};

// Blocks split a head's keys in `splits` parts, whose results are fp32 and lie behind each other in `output` (rows of
// value_dim) and `lse`. A row is a (query, head) pair of `pack` heads.
struct ForwardPlan {
  int tiles, pack, splits;
  bool vector_q, vector_k, vector_v, vector_o;
  float* output;
  float* lse;

  __device__ __forceinline__ int query(int row) const { return pack == 1 ? row : row / pack; }
  __device__ __forceinline__ int head(int row) const { return pack == 1 ? 0 : row % pack; }
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kForwardThreads, 1)
    attention_forward_kernel(const AttentionForwardParams p, const ForwardPlan plan) {
  using Tile = ForwardTile<T, kDim, kPlain>;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kWarpTiles = Tile::kWarpTiles;
  constexpr int kKeyTiles = kKeys / 8, kDimTiles = kDim / 8;
  SharedMemory shared;
  T* q_tile = shared.take<T>(kRows * kDim, 128);
  T* k_tile = shared.take<T>(kKeys * kDim, 128);
  T* v_tile = shared.take<T>(kKeys * kDim, 128);

  // The block's place: splits fastest, then tiles from the last, then heads.
  unsigned place = blockIdx.x;
  const int split = place % plan.splits;
  place /= plan.splits;
  const int tile = plan.tiles - 1 - static_cast<int>(place % plan.tiles);
  place /= plan.tiles;
  const int packed_heads = p.heads / plan.pack;
  const int head0 = static_cast<int>(place % packed_heads) * plan.pack, b = place / packed_heads;
  const int kv_head = head0 / (p.heads / p.kv_heads);
  const Sequence sequence(p, b);
  const int rows = sequence.queries * plan.pack, row0 = tile * kRows;
  if (row0 >= rows) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp * 16 * kWarpTiles;
  const bool active = row0 + warp_row < rows;
  const int first_query = row0 / plan.pack, last_query = (min(row0 + kRows, rows) - 1) / plan.pack;
  const int first_key = sequence.first_key(p, first_query), end_key = sequence.end_key(p, last_query);
  int key_tile = first_key / kKeys, end_tile = end_key > first_key ? ceil_div(end_key, kKeys) : key_tile;
  if (plan.splits > 1) {
    const int part = ceil_div(end_tile - key_tile, plan.splits);
    key_tile = min(key_tile + split * part, end_tile);
    end_tile = min(key_tile + part, end_tile);
  }
  // Between these every row sees every key.
  const int whole_from = sequence.first_key(p, last_query), whole_to = sequence.end_key(p, first_query);

  const auto load_keys = [&](T* target, const AttentionTensor& x, int number, int cols, bool vectors) {
    const T* source = sequence.row<T>(p, x, b, kv_head, sequence.first_k, number * kKeys);
    load_tile<T, kDim, kKeys, kForwardThreads>(target, sequence.keys - number * kKeys, cols, vectors,
                                               [&](int row) { return source + row * x.row_stride; });
  };
  if (key_tile < end_tile) {
    load_tile<T, kDim, kRows, kForwardThreads>(q_tile, rows - row0, p.head_dim, plan.vector_q, [&](int row) {
      return sequence.row<T>(p, p.query, b, head0 + plan.head(row0 + row), sequence.first_q, plan.query(row0 + row));
    });
    load_keys(k_tile, p.key, key_tile, p.head_dim, plan.vector_k);
    cp_async_commit();
  }

  float out[kWarpTiles][kDimTiles][4] = {};
  float maximum[kWarpTiles][2], sum[kWarpTiles][2];
#pragma unroll
  for (int m = 0; m < kWarpTiles; m++) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.0f;
  }
  const float factor = kPlain ? p.scale * kLog2e : kLog2e;  // from scores to powers of two

#pragma unroll 1
  for (; key_tile < end_tile; key_tile++) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and everyone is done with the last tile's values
    load_keys(v_tile, p.value, key_tile, p.value_dim, plan.vector_v);
    cp_async_commit();

    float scores[kWarpTiles][kKeyTiles][4] = {};
    if (active) {
      multiply_parts<T, kDim>(scores, p.head_dim, [&](auto& sums, int col) {
#pragma unroll(Tile::kProductSteps)
        for (int k = col; k < col + min(kDim, kPartCols<T>); k += kDepth<T>) {
          uint32_t a[kWarpTiles][4];
#pragma unroll
          for (int m = 0; m < kWarpTiles; m++) load_a<T, kDim>(a[m], q_tile, warp_row + 16 * m, k);
#pragma unroll
          for (int n = 0; n < kKeyTiles; n += 2) {
            uint32_t keys[4];
            load_b<T, kDim>(keys, k_tile, 8 * n, k);
#pragma unroll
            for (int m = 0; m < kWarpTiles; m++) {
              multiply_add<T>(sums[m][n], a[m], keys[0], keys[1]);
              multiply_add<T>(sums[m][n + 1], a[m], keys[2], keys[3]);
            }
          }
        }
      });
      const int key0 = key_tile * kKeys;
      const bool cut = key0 < whole_from || key0 + kKeys > whole_to;
#pragma unroll
      for (int m = 0; m < kWarpTiles; m++) {
        uint32_t kept = ~0u;
        if constexpr (!kPlain) {
          const int first = row0 + warp_row + 16 * m + lane / 4;
          const auto head = [&](int e) { return head0 + plan.head(first + e / 2 * 8); };
          const int queries[2] = {plan.query(first), plan.query(first + 8)};
          float derivative[1][4];
          add_features<T, kKeyTiles, false>(
              p, sequence, b, scores[m], derivative, head, [&](int, int e) { return queries[e / 2]; },
              [&](int n, int e) { return key0 + 8 * n + lane % 4 * 2 + e % 2; });
          if (p.philox != nullptr) {
            uint64_t number[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * half;
              const int64_t head = int64_t{b} * p.heads + head0 + plan.head(row);
              number[half] = static_cast<uint64_t>((head * p.seqlen_q + plan.query(row)) * p.seqlen_k);
            }
            kept = kept_scores<kKeyTiles>(p, number[0], number[1], key0);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * half, query = plan.query(row);
          if (cut) {
            const int from = sequence.first_key(p, query), to = sequence.end_key(p, query);
#pragma unroll
            for (int n = 0; n < kKeyTiles; n++) {
#pragma unroll
              for (int e = 0; e < 2; e++) {
                const int key = key0 + 8 * n + lane % 4 * 2 + e;
                if (key < from || key >= to) scores[m][n][2 * half + e] = -INFINITY;
              }
            }
          }
          // Online softmax: what was summed under the former maximum is brought to the new one.
          float top = maximum[m][half];
#pragma unroll
          for (int n = 0; n < kKeyTiles; n++)
            top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
          // The difference first: exactly 0 for the largest, however large it is.
          const float base = top == -INFINITY ? 0.0f : top;
          const float rescale = exponential<T>(maximum[m][half] - base, factor);
          maximum[m][half] = top;
          float total = sum[m][half] * rescale;
#pragma unroll
          for (int n = 0; n < kKeyTiles; n++) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
              float& x = scores[m][n][e];
              x = exponential<T>(x - base, factor);
              total += x;
              if constexpr (!kPlain) x = kept >> (4 * n + e) & 1 ? x : 0.0f;
            }
          }
          sum[m][half] = total;
#pragma unroll
          for (int d = 0; d < kDimTiles; d++) {
            out[m][d][2 * half] *= rescale;
            out[m][d][2 * half + 1] *= rescale;
          }
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // the values are there, and everyone is done with the keys
    if (key_tile + 1 < end_tile) {
      load_keys(k_tile, p.key, key_tile + 1, p.head_dim, plan.vector_k);
      cp_async_commit();
    }
    if (active) {
#pragma unroll(kUnrolledSteps<T>)
      for (int k = 0; k < kKeys / kDepth<T>; k++) {
        uint32_t weights[kWarpTiles][4];
#pragma unroll
        for (int m = 0; m < kWarpTiles; m++) next_a<T>(weights[m], scores[m], k);
#pragma unroll
        for (int first = 0; first < kDimTiles; first += kColumnTiles<T>) {
          if (Tile::kWide && 8 * first >= p.value_dim) break;
#pragma unroll
          for (int d = first; d < min(first + kColumnTiles<T>, kDimTiles); d += 2) {
            uint32_t values[4];
            load_b_trans<T, kDim>(values, v_tile, k * kDepth<T>, 8 * d);
#pragma unroll
            for (int m = 0; m < kWarpTiles; m++) {
              multiply_add<T, true>(out[m][d], weights[m], values[0], values[1]);
              multiply_add<T, true>(out[m][d + 1], weights[m], values[2], values[3]);
            }
          }
        }
      }
    }
  }
  if (!active) return;

#pragma unroll
  for (int m = 0; m < kWarpTiles; m++) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * half;
      const int query = plan.query(row), head = head0 + plan.head(row);
      const float total = group_sum<4>(sum[m][half]);
      inverse[half] = total == 0.0f ? 0.0f : p.dropout_scale / total;
      const float lse = total == 0.0f ? -INFINITY : maximum[m][half] * (factor * kLn2) + logf(total);
      if (lane % 4 == 0 && row < rows) {
        const int64_t place_of_row = sequence.statistics(p, b, head) + query;
        if (plan.splits > 1) {
          plan.lse[place_of_row * plan.splits + split] = lse;
        } else {
          p.lse[place_of_row] = lse;
        }
      }
      if (plan.splits > 1 && row < rows) {
        float* target = plan.output + ((sequence.statistics(p, b, head) + query) * plan.splits + split) * p.value_dim;
#pragma unroll
        for (int d = 0; d < kDimTiles; d++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int col = 8 * d + lane % 4 * 2 + e;
            if (col < p.value_dim) target[col] = out[m][d][2 * half + e] * inverse[half];
          }
        }
      }
    }
    if (plan.splits == 1) {
      store_rows<T, kDim>(q_tile, warp_row + 16 * m, 0, out[m], inverse[0], inverse[1], rows - row0, p.value_dim,
                          plan.vector_o, [&](int row) {
                            return sequence.row<T>(p, p.output, b, head0 + plan.head(row0 + row), sequence.first_q,
                                                   plan.query(row0 + row));
                          });
    }
  }
}

// Adds the parts of split keys: a warp a row, each part by its share exp(lse of the part - lse).
template <class T>
__global__ void __launch_bounds__(kForwardThreads)
    attention_combine_kernel(const AttentionForwardParams p, const ForwardPlan plan, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * (kForwardThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float* part_lse = plan.lse + row * plan.splits;
  float top = -INFINITY;
  for (int i = lane; i < plan.splits; i += 32) top = fmaxf(top, part_lse[i]);
  top = warp_max(top);
  const float base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int i = lane; i < plan.splits; i += 32) total += expf(part_lse[i] - base);
  total = warp_sum(total);
  if (lane == 0) p.lse[row] = total == 0.0f ? -INFINITY : base + logf(total);

  // Row = (batch, head, query), or (head, packed row).
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t length = packed ? p.total_q : p.seqlen_q;
  const int64_t query = row % length, head = row / length % p.heads, b = row / length / p.heads;
  T* target = static_cast<T*>(p.output.data) + b * p.output.batch_stride + head * p.output.head_stride +
              query * p.output.row_stride;
  const float* parts = plan.output + row * plan.splits * p.value_dim;
  for (int col = lane; col < p.value_dim; col += 32) {
    float value = 0.0f;
    for (int i = 0; i < plan.splits; i++) {
      const float share = expf(part_lse[i] - base);
      if (share != 0.0f) value += share * parts[int64_t{i} * p.value_dim + col];
    }
    target[col] = from_float<T>(total == 0.0f ? 0.0f : value / total);
  }
}

// ---- Backward ----

template <class T, int kDim, bool kPlain>
struct BackwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  // Warps along the keys (16 each) and along the columns of their gradients; queries a step.
  static constexpr int kKeyWarps = kWide && kDim == 256 ? 2 : 4;
  static constexpr int kParts = kWide ? kDim / 64 : kDim == 256 ? 2 : 1;
  static constexpr int kQueries = kDim == 64 ? (kPlain ? 64 : 32) : kDim == 128 && kPlain ? 32 : 16;
  static constexpr int kWarps = kKeyWarps * kParts;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kKeyWarps;
  static constexpr int kBytes = (2 * kKeys * kDim + 2 * kQueries * kDim + kKeys * kQueries) * sizeof(T) + kQueries * 8;
  // grad_query: a warp makes 16 rows, in kQueryParts column groups of kQueryCols.
  static constexpr int kQueryTiles = kQueries / 16;
  static constexpr int kQueryParts = kWarps / kQueryTiles;
  static constexpr int kQueryCols = kDim / kQueryParts;
  static constexpr int kProductSteps = kPlain && kDim == 128 ? 2 : attention::kProductSteps<T>;  // unrolled
  static constexpr int kQueryStep = kWide || kQueryCols < 32 ? 16 : 32;                          // at once
};

// A row's numbers that the backward pass needs: lse, of plain kernels in powers of two (plus infinity of a row without
// keys, so that its weights are 0), and delta.
using RowStatistics = float2;

// `copies` blocks share a head's keys, each turn about; their sums of grad_query lie behind each other in `sums`: copy,
// sequence and head, tile of queries, element of the accumulators, thread.
struct BackwardPlan {
  int key_tiles, query_tiles, copies;
  bool vector_q, vector_k, vector_v, vector_g, vector_dk, vector_dv;
  float lse_factor;
  RowStatistics* statistics;
  float* sums;
  float* slope_parts;  // of each sequence and head: tile of keys, warp along the keys
};

template <class T>
__device__ __forceinline__ float dot_rows(const T* a, const T* b, int cols, int lane) {
  float sum = 0.0f;
  for (int col = lane; col < cols; col += 32) sum += to_float(a[col]) * to_float(b[col]);
  return warp_sum(sum);
}

// Each row's statistics, a warp a row.
template <class T>
__global__ void __launch_bounds__(128)
    attention_backward_rows_kernel(const AttentionBackwardParams p, const BackwardPlan plan, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t length = packed ? p.total_q : p.seqlen_q;
  const int64_t query = row % length, head = row / length % p.heads, b = row / length / p.heads;
  const auto at = [&](const AttentionTensor& x) {
    return static_cast<const T*>(x.data) + b * x.batch_stride + head * x.head_stride + query * x.row_stride;
  };
  float delta = dot_rows(at(p.grad_output), at(p.output), p.value_dim, lane);
  if (p.grad_lse != nullptr) delta -= p.grad_lse[row];
  const float lse = p.lse[row];
  if (lane == 0) plan.statistics[row] = make_float2(lse == -INFINITY ? INFINITY : lse * plan.lse_factor, delta);
}

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(BackwardTile<T, kDim, kPlain>::kThreads, 1)
    attention_backward_kernel(const AttentionBackwardParams p, const BackwardPlan plan) {
  using Tile = BackwardTile<T, kDim, kPlain>;
  constexpr int kKeys = Tile::kKeys, kQueries = Tile::kQueries, kThreads = Tile::kThreads;
  constexpr int kScoreTiles = kQueries / 8, kCols = kDim / Tile::kParts, kColTiles = kCols / 8;
  SharedMemory shared;
  T* k_tile = shared.take<T>(kKeys * kDim, 128);
  T* v_tile = shared.take<T>(kKeys * kDim, 128);
  T* q_tile = shared.take<T>(kQueries * kDim, 128);
  T* g_tile = shared.take<T>(kQueries * kDim, 128);
  T* ds_tile = shared.take<T>(kKeys * kQueries, 128);
  RowStatistics* row_statistics = shared.take<RowStatistics>(kQueries);

  const int group = p.heads / p.kv_heads;
  const int copy = blockIdx.x % plan.copies;
  const int kv_head = blockIdx.x / plan.copies % p.kv_heads, b = blockIdx.x / plan.copies / p.kv_heads;
  const Sequence sequence(p, b);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_key = warp % Tile::kKeyWarps * 16, warp_col = warp / Tile::kKeyWarps * kCols;

#pragma unroll 1
  for (int key_tile = copy; key_tile < plan.key_tiles; key_tile += plan.copies) {
    const int key0 = key_tile * kKeys, keys = min(kKeys, sequence.keys - key0);
    if (keys <= 0) break;
    const bool active = warp_key < keys;
    // The queries that may see any of these keys.
    const int first_query = p.window_right < 0 ? 0 : max(0, key0 - sequence.shift - p.window_right);
    const int end_query =
        p.window_left < 0 ? sequence.queries : min(sequence.queries, key0 + keys - sequence.shift + p.window_left);
    const int first_tile = first_query / kQueries;
    const int tiles = max(0, ceil_div(end_query, kQueries) - first_tile);
    const int steps = end_query > first_query ? tiles * group : 0;

    const auto load_step = [&](int step) {
      const int head = kv_head * group + step / tiles, query0 = (first_tile + step % tiles) * kQueries;
      const int rows = sequence.queries - query0;
      const T* q = sequence.row<T>(p, p.query, b, head, sequence.first_q, query0);
      const T* g = sequence.row<T>(p, p.grad_output, b, head, sequence.first_q, query0);
      load_tile<T, kDim, kQueries, kThreads>(q_tile, rows, p.head_dim, plan.vector_q,
                                             [&](int row) { return q + row * p.query.row_stride; });
      load_tile<T, kDim, kQueries, kThreads>(g_tile, rows, p.value_dim, plan.vector_g,
                                             [&](int row) { return g + row * p.grad_output.row_stride; });
      cp_async_commit();
      const RowStatistics* source = plan.statistics + sequence.statistics(p, b, head) + query0;
      for (int row = threadIdx.x; row < kQueries; row += kThreads) {
        row_statistics[row] = row < rows ? source[row] : make_float2(INFINITY, 0.0f);
      }
    };
    const T* k_source = sequence.row<T>(p, p.key, b, kv_head, sequence.first_k, key0);
    const T* v_source = sequence.row<T>(p, p.value, b, kv_head, sequence.first_k, key0);
    load_tile<T, kDim, kKeys, kThreads>(k_tile, keys, p.head_dim, plan.vector_k,
                                        [&](int row) { return k_source + row * p.key.row_stride; });
    load_tile<T, kDim, kKeys, kThreads>(v_tile, keys, p.value_dim, plan.vector_v,
                                        [&](int row) { return v_source + row * p.value.row_stride; });
    cp_async_commit();
    if (steps > 0) load_step(0);

    float grad_k[kColTiles][4] = {}, grad_v[kColTiles][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const int head = kv_head * group + step / tiles, query_tile = first_tile + step % tiles;
      const int query0 = query_tile * kQueries;
      cp_async_wait<0>();
      __syncthreads();  // this step's rows are there, and everyone is done with the last one's dS
      if (active) {
        float weights[kScoreTiles][4] = {}, grads[kScoreTiles][4] = {};
        multiply_parts<T, kDim>(weights, p.head_dim, [&](auto& sums, int col) {
#pragma unroll(Tile::kProductSteps)
          for (int k = col; k < col + min(kDim, kPartCols<T>); k += kDepth<T>) {
            uint32_t a[4];
            load_a<T, kDim>(a, k_tile, warp_key, k);
#pragma unroll
            for (int n = 0; n < kScoreTiles; n += 2) {
              uint32_t rows[4];
              load_b<T, kDim>(rows, q_tile, 8 * n, k);
              multiply_add<T>(sums[n], a, rows[0], rows[1]);
              multiply_add<T>(sums[n + 1], a, rows[2], rows[3]);
            }
          }
        });
        // dP^T beside the scores: neither waits for the other.
        multiply_parts<T, kDim>(grads, p.value_dim, [&](auto& sums, int col) {
#pragma unroll(Tile::kProductSteps)
          for (int k = col; k < col + min(kDim, kPartCols<T>); k += kDepth<T>) {
            uint32_t a[4];
            load_a<T, kDim>(a, v_tile, warp_key, k);
#pragma unroll
            for (int n = 0; n < kScoreTiles; n += 2) {
              uint32_t rows[4];
              load_b<T, kDim>(rows, g_tile, 8 * n, k);
              multiply_add<T>(sums[n], a, rows[0], rows[1]);
              multiply_add<T>(sums[n + 1], a, rows[2], rows[3]);
            }
          }
        });

        uint32_t kept = ~0u;
        if constexpr (!kPlain) {
          const int64_t row = (int64_t{b} * p.heads + head) * p.seqlen_q + query0;
          kept = kept_scores_trans<kScoreTiles>(p, static_cast<uint64_t>(row * p.seqlen_k + key0 + warp_key));
        }
        float derivative[kPlain ? 1 : kScoreTiles][4];
        if constexpr (!kPlain) {
          add_features<T, kScoreTiles, true>(
              p, sequence, b, weights, derivative, [&](int) { return head; },
              [&](int n, int e) { return query0 + 8 * n + lane % 4 * 2 + e % 2; },
              [&](int, int e) { return key0 + warp_key + lane / 4 + e / 2 * 8; });
        }
        const bool cut = key0 + kKeys > sequence.end_key(p, query0) ||
                         key0 < sequence.first_key(p, min(query0 + kQueries, sequence.queries) - 1);
#pragma unroll
        for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
          for (int column = 0; column < 2; column++) {
            const int row = 8 * n + lane % 4 * 2 + column, query = query0 + row;
            const RowStatistics statistics = row_statistics[row];
            if (cut) {
              const int from = sequence.first_key(p, query), to = sequence.end_key(p, query);
#pragma unroll
              for (int half = 0; half < 2; half++) {
                const int key = key0 + warp_key + lane / 4 + 8 * half;
                if (key < from || key >= to) weights[n][2 * half + column] = -INFINITY;
              }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int e = 2 * half + column;
              // With features the scores are what lse is of: their difference first, which rounds less.
              const float weight = kPlain ? exp2f(__fmaf_rn(weights[n][e], p.scale * kLog2e, -statistics.x))
                                          : exponential<T>(weights[n][e] - statistics.x, kLog2e);
              float grad = grads[n][e];
              weights[n][e] = weight;
              if constexpr (!kPlain) {
                const bool keep = kept >> (4 * n + e) & 1;
                grad = keep ? grad * p.dropout_scale : 0.0f;
                weights[n][e] = keep ? weight : 0.0f;
              }
              grad = weight * (grad - statistics.y);
              if constexpr (!kPlain) {
                // Both halves of a head of 256 have the same dS.
                if (warp_col == 0) {
                  store_mask_gradient<T>(p, sequence, b, head, query, key0 + warp_key + lane / 4 + 8 * half, grad);
                }
              }
              grads[n][e] = grad;
            }
          }
        }
        if constexpr (!kPlain) {
          if (p.grad_slopes != nullptr && warp_col == 0) {
            float part = 0.0f;
#pragma unroll
            for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const int distance =
                    query0 + 8 * n + lane % 4 * 2 + e % 2 + sequence.shift - (key0 + warp_key + lane / 4 + e / 2 * 8);
                part += grads[n][e] * fabsf(static_cast<float>(distance));
              }
            }
            part = warp_sum(part);
            // This warp's alone, step after step.
            if (lane == 0) {
              plan.slope_parts[((int64_t{b} * p.heads + head) * plan.key_tiles + key_tile) * Tile::kKeyWarps + warp] +=
                  part;
            }
          }
#pragma unroll
          for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) grads[n][e] *= derivative[n][e];
          }
        }

#pragma unroll(kUnrolledSteps<T>)
        for (int k = 0; k < kQueries / kDepth<T>; k++) {
          uint32_t p_rows[4], ds_rows[4];
          next_a<T>(p_rows, weights, k);
          next_a<T>(ds_rows, grads, k);
#pragma unroll
          for (int first = 0; first < kColTiles; first += kColumnTiles<T>) {
            if (Tile::kWide && warp_col + 8 * first >= max(p.head_dim, p.value_dim)) break;
#pragma unroll
            for (int d = first; d < min(first + kColumnTiles<T>, kColTiles); d += 2) {
              uint32_t rows[4];
              load_b_trans<T, kDim>(rows, g_tile, k * kDepth<T>, warp_col + 8 * d);
              multiply_add<T, true>(grad_v[d], p_rows, rows[0], rows[1]);
              multiply_add<T, true>(grad_v[d + 1], p_rows, rows[2], rows[3]);
              load_b_trans<T, kDim>(rows, q_tile, k * kDepth<T>, warp_col + 8 * d);
              multiply_add<T>(grad_k[d], ds_rows, rows[0], rows[1]);
              multiply_add<T>(grad_k[d + 1], ds_rows, rows[2], rows[3]);
            }
          }
        }
        if (warp_col == 0) {
#pragma unroll
          for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
              Vec<T, 2> pair;
              pair.v[0] = from_float<T>(grads[n][2 * half]);
              pair.v[1] = from_float<T>(grads[n][2 * half + 1]);
              store_vec<T, 2>(
                  SharedTile<T, kQueries>::at(ds_tile, warp_key + lane / 4 + 8 * half, 8 * n + lane % 4 * 2), pair);
            }
          }
        }
      }
      __syncthreads();  // dS is there, and everyone is done with the rows
      if (step + 1 < steps) load_step(step + 1);

      const int query_row = warp % Tile::kQueryTiles * 16, query_col = warp / Tile::kQueryTiles * Tile::kQueryCols;
      const int depth = round_up(keys, 16);  // keys beyond wrote no dS
      const int64_t heads = int64_t{p.batch} * p.heads, place = int64_t{b} * p.heads + head;
      float* sums =
          plan.sums + threadIdx.x +
          (((p.deterministic ? copy * heads : 0) + place) * plan.query_tiles + query_tile) * (kQueries * kDim);
#pragma unroll 1
      for (int col = 0; col < Tile::kQueryCols; col += Tile::kQueryStep) {
        float grad_q[Tile::kQueryStep / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < depth; k += kDepth<T>) {
          uint32_t a[4];
          load_a_trans<T, kQueries>(a, ds_tile, k, query_row);
#pragma unroll
          for (int d = 0; d < Tile::kQueryStep / 8; d += 2) {
            uint32_t rows[4];
            load_b_trans<T, kDim>(rows, k_tile, k, query_col + col + 8 * d);
            multiply_add<T>(grad_q[d], a, rows[0], rows[1]);
            multiply_add<T>(grad_q[d + 1], a, rows[2], rows[3]);
          }
        }
#pragma unroll
        for (int d = 0; d < Tile::kQueryStep / 8; d++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float* sum = sums + (col / 2 + 4 * d + e) * Tile::kThreads;
            if (p.deterministic) {
              *sum += grad_q[d][e];  // this thread's alone, turn after turn
            } else {
              atomicAdd(sum, grad_q[d][e]);
            }
          }
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // everyone is done with the keys and values, whose place the results take
    if (active) {
      const float key_scale = p.scale, value_scale = kPlain ? 1.0f : p.dropout_scale;
      const auto target = [&](const AttentionTensor& x) {
        T* first = sequence.row<T>(p, x, b, kv_head, sequence.first_k, key0);
        return [first, &x](int row) { return first + row * x.row_stride; };
      };
      store_rows<T, kDim>(k_tile, warp_key, warp_col, grad_k, key_scale, key_scale, keys, p.head_dim, plan.vector_dk,
                          target(p.grad_key));
      store_rows<T, kDim>(v_tile, warp_key, warp_col, grad_v, value_scale, value_scale, keys, p.value_dim,
                          plan.vector_dv, target(p.grad_value));
    }
    __syncthreads();  // before the next keys overwrite them
  }
}

// How a tile's sums of grad_query lie: parts of `threads` threads, in each of which groups of `together` elements of
// the accumulators change slower than the threads.
struct QuerySums {
  int queries, dim;  // of the tile
  int warp_cols;     // of the 16 rows that a warp makes
  int threads, together;
};

// grad_query from its sums, whose copies are added in order: a thread an element.
template <class T>
__global__ void __launch_bounds__(256)
    attention_backward_queries_kernel(const AttentionBackwardParams p, const BackwardPlan plan, const QuerySums lie) {
  const int head = blockIdx.x / plan.query_tiles % p.heads, tile = blockIdx.x % plan.query_tiles;
  const int b = blockIdx.x / plan.query_tiles / p.heads;
  const Sequence sequence(p, b);
  const int64_t copy_size = int64_t{p.batch} * p.heads * plan.query_tiles * lie.queries * lie.dim;
  const float* sums = plan.sums + int64_t{blockIdx.x} * lie.queries * lie.dim;
  const int rows = min(lie.queries, sequence.queries - tile * lie.queries);
  for (int i = threadIdx.x; i < rows * p.head_dim; i += 256) {
    const int row = i / p.head_dim, col = i % p.head_dim;
    // Where the accumulators hold it: the thread, the element.
    const int warp = col / lie.warp_cols * (lie.queries / 16) + row / 16;
    const int thread = warp * 32 + row % 8 * 4 + col % 8 / 2;
    const int element = col % lie.warp_cols / 8 * 4 + row % 16 / 8 * 2 + col % 2;
    const float* source =
        sums + (thread / lie.threads * (lie.warp_cols / 2) + element / lie.together * lie.together) * lie.threads +
        thread % lie.threads * lie.together + element % lie.together;
    float value = 0.0f;
    for (int copy = 0; copy < plan.copies; copy++) value += source[copy * copy_size];
    sequence.row<T>(p, p.grad_query, b, head, sequence.first_q, tile * lie.queries + row)[col] =
        from_float<T>(value * p.scale);
  }
}

// The slopes' gradients from their parts, which are added in a fixed order: a warp a slope.
template <class T>
__global__ void __launch_bounds__(128)
    attention_backward_slopes_kernel(const AttentionBackwardParams p, const BackwardPlan plan, int parts) {
  const bool of_batch = p.slopes_batch_stride != 0;  // else of all sequences
  const int slope = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (slope >= (of_batch ? p.batch : 1) * p.heads) return;
  float sum = 0.0f;
  for (int b = 0; b < (of_batch ? 1 : p.batch); b++) {
    const float* source = plan.slope_parts + (int64_t{b} * p.heads + slope) * parts;
    for (int i = lane; i < parts; i += 32) sum += source[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) p.grad_slopes[slope] = -sum;
}

template <class T, int kDim, bool kPlain>
int launch_forward(const AttentionForwardParams& p, Stream stream, const AttentionAllocate& allocate) {
  using Tile = ForwardTile<T, kDim, kPlain>;
  const int group = p.heads / p.kv_heads;
  ForwardPlan plan{};
  // Rows of several heads in one tile, where they all fit: keys and values are read once for them.
  plan.pack = int64_t{p.seqlen_q} * group <= Tile::kRows ? group : 1;
  plan.tiles = static_cast<int>(ceil_div<int64_t>(int64_t{p.seqlen_q} * plan.pack, Tile::kRows));
  const int64_t blocks = int64_t{p.batch} * (p.heads / plan.pack) * plan.tiles;
  // Fewer blocks than two a multiprocessor: the keys are split, down to two tiles a part.
  const int64_t wanted = 2 * int64_t{std::max(1, multiprocessor_count())} / std::max<int64_t>(blocks, 1);
  const int64_t key_tiles = ceil_div(p.seqlen_k, Tile::kKeys);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({wanted, key_tiles / 2, int64_t{64}})));
  if (blocks * plan.splits > kMostBlocks) return kErrorInvalidValue;
  plan.vector_q = moves_in_vectors<T>(p.query, p.head_dim);
  plan.vector_k = moves_in_vectors<T>(p.key, p.head_dim);
  plan.vector_v = moves_in_vectors<T>(p.value, p.value_dim);
  plan.vector_o = moves_in_vectors<T>(p.output, p.value_dim);
  const int64_t rows =
      p.cu_seqlens_q != nullptr ? int64_t{p.heads} * p.total_q : int64_t{p.batch} * p.heads * p.seqlen_q;
  if (plan.splits > 1) {
    plan.output = static_cast<float*>(allocate(rows * plan.splits * (p.value_dim + 1) * sizeof(float), false));
    plan.lse = plan.output + rows * plan.splits * p.value_dim;
  }
  const LaunchConfig config =
      attention_grid(blocks * plan.splits, kForwardThreads, Tile::kElements * sizeof(T), stream);
  if (int error = launch(attention_forward_kernel<T, kDim, kPlain>, config, p, plan)) return error;
  if (plan.splits == 1) return 0;
  return launch(attention_combine_kernel<T>,
                attention_grid(ceil_div<int64_t>(rows, kForwardThreads / 32), kForwardThreads, 0, stream), p, plan,
                rows);
}

// Blocks that share a head's keys: one for every tile of them; when deterministic no more than fill the GPU, of whose
// multiprocessors each holds `resident`, for each needs a copy of the sums.
inline int backward_copies(const AttentionBackwardParams& p, int key_tiles, int resident) {
  if (!p.deterministic) return key_tiles;
  const int64_t wanted =
      ceil_div<int64_t>(resident * std::max(1, multiprocessor_count()), int64_t{p.batch} * p.kv_heads);
  return static_cast<int>(std::min<int64_t>(key_tiles, wanted));
}

// The rows' statistics, the tiles by launch_tiles(plan, blocks), and grad_query from its sums.
template <class T, class LaunchTiles>
int launch_backward_passes(const AttentionBackwardParams& p, BackwardPlan plan, const QuerySums& lie, Stream stream,
                           const AttentionAllocate& allocate, LaunchTiles launch_tiles) {
  plan.query_tiles = ceil_div(p.seqlen_q, lie.queries);
  const int64_t heads = int64_t{p.batch} * p.heads, blocks = int64_t{p.batch} * p.kv_heads * plan.copies;
  const int64_t query_blocks = heads * plan.query_tiles;
  const int64_t rows = p.cu_seqlens_q != nullptr ? int64_t{p.heads} * p.total_q : heads * p.seqlen_q;
  if (std::max({blocks, query_blocks, ceil_div<int64_t>(rows, 4)}) > kMostBlocks) return kErrorInvalidValue;

  const int64_t copies = p.deterministic ? plan.copies : 1;
  plan.statistics = static_cast<RowStatistics*>(allocate(rows * sizeof(RowStatistics), false));
  plan.sums = static_cast<float*>(allocate(copies * query_blocks * lie.queries * lie.dim * sizeof(float), true));
  if (int error = launch(attention_backward_rows_kernel<T>, attention_grid(ceil_div<int64_t>(rows, 4), 128, 0, stream),
                         p, plan, rows)) {
    return error;
  }
  if (int error = launch_tiles(plan, blocks)) return error;
  plan.copies = static_cast<int>(copies);
  return launch(attention_backward_queries_kernel<T>, attention_grid(query_blocks, 256, 0, stream), p, plan, lie);
}

// The parts of the slopes' gradients that a pass leaves, so many of each sequence and head; null where none are wanted.
inline float* allocate_slope_parts(const AttentionBackwardParams& p, int parts, const AttentionAllocate& allocate) {
  if (p.grad_slopes == nullptr) return nullptr;
  return static_cast<float*>(allocate(int64_t{p.batch} * p.heads * parts * sizeof(float), true));
}

template <class T>
int launch_slopes(const AttentionBackwardParams& p, const BackwardPlan& plan, int parts, Stream stream) {
  if (p.grad_slopes == nullptr) return 0;
  const int64_t slopes = (p.slopes_batch_stride != 0 ? int64_t{p.batch} : 1) * p.heads;
  return launch(attention_backward_slopes_kernel<T>, attention_grid(ceil_div<int64_t>(slopes, 4), 128, 0, stream), p,
                plan, parts);
}

template <class T, int kDim, bool kPlain>
int launch_backward(const AttentionBackwardParams& p, Stream stream, const AttentionAllocate& allocate) {
  using Tile = BackwardTile<T, kDim, kPlain>;
  BackwardPlan plan{};
  plan.key_tiles = ceil_div(p.seqlen_k, Tile::kKeys);
  plan.copies = backward_copies(p, plan.key_tiles, 2);
  plan.lse_factor = kPlain ? kLog2e : 1.0f;
  plan.vector_q = moves_in_vectors<T>(p.query, p.head_dim);
  plan.vector_k = moves_in_vectors<T>(p.key, p.head_dim);
  plan.vector_v = moves_in_vectors<T>(p.value, p.value_dim);
  plan.vector_g = moves_in_vectors<T>(p.grad_output, p.value_dim);
  plan.vector_dk = moves_in_vectors<T>(p.grad_key, p.head_dim);
  plan.vector_dv = moves_in_vectors<T>(p.grad_value, p.value_dim);
  const int slope_parts = plan.key_tiles * Tile::kKeyWarps;
  plan.slope_parts = allocate_slope_parts(p, slope_parts, allocate);
  const QuerySums lie{Tile::kQueries, kDim, Tile::kQueryCols, Tile::kThreads, 1};
  return launch_backward_passes<T>(p, plan, lie, stream, allocate, [&](const BackwardPlan& ready, int64_t blocks) {
    const int error = launch(attention_backward_kernel<T, kDim, kPlain>,
                             attention_grid(blocks, Tile::kThreads, Tile::kBytes, stream), p, ready);
    return error ? error : launch_slopes<T>(p, ready, slope_parts, stream);
  });
}

template <class T>
int launch_hopper_backward(const AttentionBackwardParams& p, Stream stream, const AttentionAllocate& allocate) {
  BackwardPlan plan{};
  const int dim = hopper_backward_dim(p);
  plan.key_tiles = ceil_div(p.seqlen_k, hopper_backward_keys(dim));
  plan.copies = backward_copies(p, plan.key_tiles, 1);
  plan.lse_factor = is_plain(p) ? kLog2e : 1.0f;
  const int slope_parts = plan.key_tiles * kHopperBackwardWarps;
  plan.slope_parts = allocate_slope_parts(p, slope_parts, allocate);
  const QuerySums lie{kHopperBackwardQueries, dim, dim / 2, 32, 4};
  const auto launch_tiles = [&](const BackwardPlan& ready, int64_t) {
    const float* statistics = reinterpret_cast<const float*>(ready.statistics);
    const int error = hopper_backward<T>(
        p, {ready.query_tiles, ready.key_tiles, ready.copies, statistics, ready.sums, ready.slope_parts}, stream);
    return error ? error : launch_slopes<T>(p, ready, slope_parts, stream);
  };
  return launch_backward_passes<T>(p, plan, lie, stream, allocate, launch_tiles);
}

// Which architecture's forward kernel, given 16-bit tensors. Hopper's own takes what TMA reaches, except
// - few queries: its warpgroups hold 64 rows, of which most would be padding even where the heads that share keys share
//   tiles, as they do in the other kernel's smaller ones;
// - long keys for few tiles of queries: the other kernel splits the keys, which pays, at half the rate or more, where
//   more than half of the multiprocessors would be idle.
inline bool hopper_forward_serves(const AttentionForwardParams& p) {
  constexpr int kFewRows = 64, kTileRows = 128, kLongKeys = 2048;
  if (compute_capability() != 90) return false;
  const TileHeads together = tile_heads(p, kTileRows);
  if (int64_t{p.seqlen_q} * together.heads <= kFewRows) return false;
  const int64_t tiles =
      int64_t{p.batch} * (p.heads / together.heads) * ceil_div(p.seqlen_q << together.shift, kTileRows);
  if (p.seqlen_k >= kLongKeys && 2 * tiles < multiprocessor_count()) return false;
  const TensorCounts of_queries(p, true), of_keys(p, false);
  return p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && can_map(p.query, of_queries) && can_map(p.key, of_keys) &&
         can_map(p.value, of_keys) && can_map(p.output, of_queries);
}

// The same of the backward kernel.
inline bool hopper_backward_serves(const AttentionBackwardParams& p) {
  if (compute_capability() != 90) return false;
  const TensorCounts of_queries(p, true), of_keys(p, false);
  return p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && can_map(p.query, of_queries) &&
         can_map(p.grad_output, of_queries) && can_map(p.key, of_keys) && can_map(p.value, of_keys) &&
         can_map(p.grad_key, of_keys) && can_map(p.grad_value, of_keys);
}

}  // namespace attention

template <class T>
int attention_forward(const AttentionForwardParams& p, Stream stream, const AttentionAllocate& allocate) {
  using namespace attention;
  const int dim = std::max(p.head_dim, p.value_dim);
  if constexpr (sizeof(T) == 2) {
    if (hopper_forward_serves(p)) return hopper_forward<T>(p, stream);
    if (is_plain(p)) {
      if (dim <= 64) return launch_forward<T, 64, true>(p, stream, allocate);
      if (dim <= 128) return launch_forward<T, 128, true>(p, stream, allocate);
    }
  }
  if (dim <= 64) return launch_forward<T, 64, false>(p, stream, allocate);
  if (dim <= 128) return launch_forward<T, 128, false>(p, stream, allocate);
  return launch_forward<T, 256, false>(p, stream, allocate);
}

template <class T>
int attention_backward(const AttentionBackwardParams& p, Stream stream, const AttentionAllocate& allocate) {
  using namespace attention;
  const int dim = std::max(p.head_dim, p.value_dim);
  if constexpr (sizeof(T) == 2) {
    if (hopper_backward_serves(p)) return launch_hopper_backward<T>(p, stream, allocate);
    if (is_plain(p)) {
      if (dim <= 64) return launch_backward<T, 64, true>(p, stream, allocate);
      if (dim <= 128) return launch_backward<T, 128, true>(p, stream, allocate);
    }
  }
  if (dim <= 64) return launch_backward<T, 64, false>(p, stream, allocate);
  if (dim <= 128) return launch_backward<T, 128, false>(p, stream, allocate);
  return launch_backward<T, 256, false>(p, stream, allocate);
}

}  // namespace bigkern
