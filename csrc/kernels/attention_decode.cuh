// Attention of a few queries over a long cache of keys and values (a step of generating text), and the append to it.
//
// Maths, for query row i at position p of a sequence of `end` rows (those in use before, and the new ones):
//     s_ij = scale q_i . k_j      softcap: s = softcap tanh(s / softcap)      s -= slope |p - j|
//     output_i = sum over the rows j that i may see of exp(s_ij - lse_i) v_j      lse_i = log(sum over j of exp(s_ij))
//
// Floor: the bytes of the rows in use, batch kv_heads rows (head_dim + value_dim) sizeof(T), read once, over the
// bandwidth of memory: 0.11 ms for 537 MB (batch 16, 8 heads, 8,192 rows of 2 x 128 bf16) at 4.8 TB/s. Arithmetic is
// 2 FLOP an element and row of queries, far below what tensor cores do in that time.
//
// Tiling. The rows of queries that share a key head, (query, head) pairs, are the 16 rows of one mma: a key is read
// from memory and from shared memory once for all of them. More of them make more tiles, each of which reads the keys
// again; decoding has few. A sequence is cut in `splits` parts of its own length (as it is on the device), a block
// each. A block's warps take 16 keys in turn, each with its own ring in shared memory, filled by cp.async: between two
// barriers of the block, at the start and at the end, no warp waits for another.
//
//     wait K | Q K^T | ask for K two on | softmax | wait V | output += P V | ask for V two on
//
// so that three tiles a warp are always in flight: 48 KB a block of bf16 at head_dim 128, two or three blocks a
// multiprocessor, of which 36 KB would hide 1 us of latency. At the end the warps' outputs meet in shared memory and
// are weighed by their sums; those of the parts in a second kernel, in a fixed order.
//
// Append, in the same launch. New rows are read from key and value themselves, never from the cache, so that it does
// not matter when they are written there: by the blocks of the first tile, row i by part i modulo the parts. Nothing is
// written beyond the capacity.
//
// Instances: head_dim (with value_dim padded to the larger) 64, 128 and 256 for each of float, bf16 and fp16, and a
// combining kernel a dtype: 12. Window, softcap and ALiBi are decided at run time, a branch a tile of keys.
//
// Numerics: scores, statistics and sums are fp32; P is rounded to T for the tensor cores. fp32 products are split in
// tf32 ones as in attention.cuh.
//
// Registers, by ptxas: at most 168 in 16 bits up to head_dim 128, so that three blocks of four warps fit, and nothing
// spills on any architecture. fp32 at 256 has none left: the places of its values are worked out anew. Expected: 80 %
// of the bandwidth of a copy and more. Not measured.
#pragma once

#include "device/device.cuh"
#include "kernels/attention.cuh"
#include "kernels/attention_decode.h"

#include <algorithm>
#include <cstdint>

namespace bigkern {
namespace attention {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;
constexpr int kCombineThreads = 128;

template <class T, int kDim>
struct DecodeTile {
  static constexpr int kRowBytes = kDim * sizeof(T);
  // What a block of 8 or 16 KB tiles holds must fit the 99 KB of sm_86 and sm_89.
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : kRowBytes <= 512 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;
  static constexpr int kTile = kDecodeKeys * kDim;  // elements
  static constexpr int kRing = 2 * kStages * kTile;
  // The warps' outputs at the end, in the rings' place: rows apart by a quarter of the banks.
  static constexpr int kPartStride = kDim + 8;
  static constexpr int kPart = kDecodeRows * kPartStride;
  static_assert(kPart * sizeof(float) <= kRing * sizeof(T), "they stand where the rings were");
  static constexpr size_t kBytes =
      (kWarps * kRing + kDecodeRows * kDim) * sizeof(T) + kWarps * kDecodeRows * sizeof(float2);
  // Blocks that a multiprocessor shall have at once, for enough bytes in flight.
  static constexpr int kResident = kRowBytes <= 128 ? 4 : 2;
};

// Parts of a row's result lie behind each other in `output`, `cols` floats each, and in `lse`.
struct DecodePlan {
  int tiles, splits, cols;
  bool vector_q, vector_k, vector_v, vector_o;
  float* output;
  float* lse;
};

__device__ __forceinline__ int row_number(const AttentionRows& rows, int b, int otherwise, int most) {
  if (rows.data == nullptr) return otherwise;
  const int64_t row = rows.wide ? static_cast<const int64_t*>(rows.data)[b] : static_cast<const int32_t*>(rows.data)[b];
  return static_cast<int>(min(max(row, int64_t{0}), int64_t{most}));
}

template <class T>
__device__ __forceinline__ T* head_of(const AttentionTensor& x, int b, int head) {
  return static_cast<T*>(x.data) + b * x.batch_stride + head * x.head_stride;
}

// The rows of one head, of which those from `length` on are the new ones.
template <class T>
struct CacheRows {
  T* cache;
  const T* fresh;
  int64_t cache_stride, fresh_stride;
  int length;

  __device__ __forceinline__ CacheRows(const AttentionTensor& cache, const AttentionTensor& fresh, int b, int head,
                                       int length)
      : cache(head_of<T>(cache, b, head)),
        fresh(fresh.data == nullptr ? nullptr : head_of<T>(fresh, b, head)),
        cache_stride(cache.row_stride),
        fresh_stride(fresh.row_stride),
        length(length) {}

  __device__ __forceinline__ const T* row(int row) const {
    return row < length ? cache + row * cache_stride : fresh + (row - length) * fresh_stride;
  }

  // Writes new row i to the cache.
  template <int kThreads>
  __device__ __forceinline__ void append(int i, int cols, bool vectors) const {
    const T* source = fresh + i * fresh_stride;
    T* target = cache + (int64_t{length} + i) * cache_stride;
    if (vectors) {
      constexpr int kVec = kVecElements<T>;
      for (int col = threadIdx.x * kVec; col < cols; col += kThreads * kVec) {
        store_vec<T, kVec>(target + col, load_vec<T, kVec>(source + col));
      }
    } else {
      for (int col = threadIdx.x; col < cols; col += kThreads) target[col] = source[col];
    }
  }
};

// Starts the copy of the rows [first, end), of at most kDecodeKeys, to a warp's tile; zeros below.
template <class T, int kDim>
__device__ __forceinline__ void load_keys(T* tile, const CacheRows<T>& rows, int first, int end, int cols,
                                          bool vectors) {
  using Tile = SharedTile<T, kDim>;
  constexpr int kVec = Tile::kVec, kChunks = Tile::kChunks;
  const int lane = threadIdx.x % 32;
  if (vectors) {
#pragma unroll(kDim * sizeof(T) > 512 ? 1 : 4)
    for (int i = 0; i < kDecodeKeys * kChunks / 32; i++) {
      const int chunk = i * 32 + lane, row = chunk / kChunks, col = chunk % kChunks * kVec;
      const bool inside = first + row < end && col < cols;
      cp_async16(Tile::at(tile, row, col), inside ? rows.row(first + row) + col : rows.cache, inside);
    }
  } else {
#pragma unroll 1
    for (int chunk = lane; chunk < kDecodeKeys * kChunks; chunk += 32) {
      const int row = chunk / kChunks, col = chunk % kChunks * kVec;
      Vec<T, kVec> values;
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        values.v[j] = first + row < end && col + j < cols ? rows.row(first + row)[col + j] : from_float<T>(0.0f);
      }
      store_vec<T, kVec>(Tile::at(tile, row, col), values);
    }
  }
}

// value / total of a row without keys.
__device__ __forceinline__ float inverse_or_zero(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

template <class T, int kDim>
__global__ void __launch_bounds__(DecodeTile<T, kDim>::kThreads, kDim <= 128 && sizeof(T) == 2 ? 3 : 1)
    attention_decode_forward_kernel(const AttentionDecodeParams p, const DecodePlan plan) {
  using Tile = DecodeTile<T, kDim>;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kDimTiles = kDim / 8;
  SharedMemory shared;
  T* rings = shared.take<T>(kWarps * Tile::kRing, 128);
  T* q_tile = shared.take<T>(kDecodeRows * kDim, 128);
  float2* statistics = shared.take<float2>(kWarps * kDecodeRows);

  // The block's place: parts fastest, then tiles of rows, then heads.
  unsigned place = blockIdx.x;
  const int split = place % plan.splits;
  place /= plan.splits;
  const int tile = place % plan.tiles;
  place /= plan.tiles;
  const int kv_head = place % p.kv_heads, b = place / p.kv_heads;
  const int group = p.heads / p.kv_heads;
  const int row0 = tile * kDecodeRows, rows = min(kDecodeRows, p.seqlen_q * group - row0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int length = row_number(p.lengths, b, p.capacity, p.capacity);
  const int end = min(length + p.seqlen_new, p.capacity), start = row_number(p.starts, b, 0, p.capacity);
  const int shift = end - p.seqlen_q;  // position of query 0
  const auto first_key = [&](int query) {
    return p.window_left < 0 ? start : max(start, query + shift - p.window_left);
  };
  const auto end_key = [&](int query) {
    return p.window_right < 0 ? end : max(0, min(end, query + shift + p.window_right + 1));
  };
  // This part of the keys that any row of the tile sees, in tiles that the warps take in turn.
  int from = first_key(row0 / group), to = end_key((row0 + rows - 1) / group);
  const int part = ceil_div(max(0, to - from), plan.splits * kWarps * kDecodeKeys) * kWarps * kDecodeKeys;
  from = static_cast<int>(min(int64_t{from} + int64_t{part} * split, int64_t{to}));
  to = static_cast<int>(min(int64_t{from} + part, int64_t{to}));

  const CacheRows<T> keys(p.key_cache, p.key, b, kv_head, length), values(p.value_cache, p.value, b, kv_head, length);
  T* ring = rings + warp * Tile::kRing;
  const auto ask_keys = [&](int first, int stage) {
    if (first < to) load_keys<T, kDim>(ring + 2 * stage * Tile::kTile, keys, first, to, p.head_dim, plan.vector_k);
    cp_async_commit();
  };
  const auto ask_values = [&](int first, int stage) {
    if (first < to) {
      load_keys<T, kDim>(ring + (2 * stage + 1) * Tile::kTile, values, first, to, p.value_dim, plan.vector_v);
    }
    cp_async_commit();
  };
  if (from < to) {
    load_tile<T, kDim, kDecodeRows, kThreads>(q_tile, rows, p.head_dim, plan.vector_q, [&](int row) {
      const int query = (row0 + row) / group, head = kv_head * group + (row0 + row) % group;
      return head_of<T>(p.query, b, head) + query * p.query.row_stride;
    });
  }
  cp_async_commit();
  int key0 = from + warp * kDecodeKeys;
#pragma unroll
  for (int stage = 0; stage < Tile::kStages; stage++) {
    ask_keys(key0 + stage * kWarps * kDecodeKeys, stage);
    ask_values(key0 + stage * kWarps * kDecodeKeys, stage);
  }
  if (tile == 0) {
    for (int i = split; i < end - length; i += plan.splits) {
      keys.template append<kThreads>(i, p.head_dim, plan.vector_k);
      values.template append<kThreads>(i, p.value_dim, plan.vector_v);
    }
  }
  cp_async_wait<2 * Tile::kStages>();
  __syncthreads();  // the queries are there

  float out[kDimTiles][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  int row_from[2], row_to[2];
  float slope[2] = {}, position[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = min(row0 + lane / 4 + 8 * half, row0 + rows - 1), query = row / group;
    row_from[half] = first_key(query);
    row_to[half] = end_key(query);
    position[half] = static_cast<float>(query + shift);
    if (p.slopes != nullptr) slope[half] = p.slopes[b * p.slopes_batch_stride + kv_head * group + row % group];
  }

  int stage = 0;
#pragma unroll 1
  for (; key0 < to; key0 += kWarps * kDecodeKeys) {
    const int later = key0 + Tile::kStages * kWarps * kDecodeKeys;
    T* k_tile = ring + 2 * stage * Tile::kTile;
    const int v_place = warp * Tile::kRing + (2 * stage + 1) * Tile::kTile;
    cp_async_wait<2 * Tile::kStages - 1>();
    __syncwarp();  // the keys are there
    float scores[2][4] = {};
    multiply_parts<T, kDim>(scores, p.head_dim, [&](auto& sums, int col) {
#pragma unroll(kProductSteps<T>)
      for (int k = col; k < col + min(kDim, kPartCols<T>); k += kDepth<T>) {
        uint32_t a[4], key[4];
        load_a<T, kDim>(a, q_tile, 0, k);
        load_b<T, kDim>(key, k_tile, 0, k);
        multiply_add<T>(sums[0], a, key[0], key[1]);
        multiply_add<T>(sums[1], a, key[2], key[3]);
      }
    });
    __syncwarp();  // everyone is done with them
    ask_keys(later, stage);

#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) scores[n][e] *= p.scale;
    }
    if (p.softcap > 0.0f) {
      const float inverse = 1.0f / p.softcap;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) scores[n][e] = p.softcap * tanhf(scores[n][e] * inverse);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = scores[n][2 * half + e];
          const int key = key0 + 8 * n + lane % 4 * 2 + e;
          // A slope of 0 times the distance is 0, whether there are slopes or not.
          x -= slope[half] * fabsf(position[half] - static_cast<float>(key));
          if (key < row_from[half] || key >= row_to[half] || key >= to) x = -INFINITY;
          top = fmaxf(top, x);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      // The difference first: exactly 0 for the largest, however large it is.
      const float base = top == -INFINITY ? 0.0f : top;
      const float rescale = exponential<T>(maximum[half] - base, kLog2e);
      maximum[half] = top;
      sum[half] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = scores[n][2 * half + e];
          x = exponential<T>(x - base, kLog2e);
          sum[half] += x;
        }
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; d++) {
        out[d][2 * half] *= rescale;
        out[d][2 * half + 1] *= rescale;
      }
    }

    cp_async_wait<2 * Tile::kStages - 1>();
    __syncwarp();  // the values are there
#pragma unroll(kUnrolledSteps<T>)
    for (int k = 0; k < kDecodeKeys / kDepth<T>; k++) {
      uint32_t weights[4];
      next_a<T>(weights, scores, k);
#pragma unroll
      for (int first = 0; first < kDimTiles; first += kColumnTiles<T>) {
        if (sizeof(T) == 4 && 8 * first >= p.value_dim) break;
#pragma unroll
        for (int d = first; d < min(first + kColumnTiles<T>, kDimTiles); d += 2) {
          uint32_t value[4];
          load_b_trans<T, kDim>(value, rings, k * kDepth<T>, 8 * d, v_place);
          multiply_add<T, true>(out[d], weights, value[0], value[1]);
          multiply_add<T, true>(out[d + 1], weights, value[2], value[3]);
        }
      }
    }
    __syncwarp();  // everyone is done with them
    ask_values(later, stage);
    stage = (stage + 1) % Tile::kStages;
  }

  // The warps' outputs, side by side where the rings were.
  cp_async_wait<0>();
  __syncthreads();
  float* parts = reinterpret_cast<float*>(rings);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    const float total = group_sum<4>(sum[half]);
    if (lane % 4 == 0) statistics[warp * kDecodeRows + row] = make_float2(maximum[half], total);
#pragma unroll
    for (int d = 0; d < kDimTiles; d++) {
      const Vec<float, 2> pair = {out[d][2 * half], out[d][2 * half + 1]};
      store_vec<float, 2>(parts + warp * Tile::kPart + row * Tile::kPartStride + 8 * d + lane % 4 * 2, pair);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (kDim / 4); i += kThreads) {
    const int row = i / (kDim / 4), col = i % (kDim / 4) * 4;
    if (col >= p.value_dim) continue;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; w++) top = fmaxf(top, statistics[w * kDecodeRows + row].x);
    const float base = top == -INFINITY ? 0.0f : top;
    float total = 0.0f, value[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float2 own = statistics[w * kDecodeRows + row];
      const float share = exponential<T>(own.x - base, kLog2e);
      total += share * own.y;
      const Vec<float, 4> x = load_vec<float, 4>(parts + w * Tile::kPart + row * Tile::kPartStride + col);
#pragma unroll
      for (int j = 0; j < 4; j++) value[j] += share * x.v[j];
    }
    const float inverse = inverse_or_zero(total);
    const float lse = total == 0.0f ? -INFINITY : base + logf(total);
    const int query = (row0 + row) / group, head = kv_head * group + (row0 + row) % group;
    const int64_t number = (int64_t{b} * p.heads + head) * p.seqlen_q + query;
    if (plan.splits > 1) {
      const int64_t place_of_part = number * plan.splits + split;
      if (col == 0) plan.lse[place_of_part] = lse;
      Vec<float, 4> x;
#pragma unroll
      for (int j = 0; j < 4; j++) x.v[j] = value[j] * inverse;
      store_vec<float, 4>(plan.output + place_of_part * plan.cols + col, x);
    } else {
      if (col == 0) p.lse[number] = lse;
      T* target = head_of<T>(p.output, b, head) + query * p.output.row_stride + col;
      if (plan.vector_o) {
        Vec<T, 4> x;
#pragma unroll
        for (int j = 0; j < 4; j++) x.v[j] = from_float<T>(value[j] * inverse);
        store_vec<T, 4>(target, x);
      } else {
        for (int j = 0; j < 4 && col + j < p.value_dim; j++) target[j] = from_float<T>(value[j] * inverse);
      }
    }
  }
}

// Adds the parts of a row, each by its share exp(lse of the part - lse): a block a row, whose warps take the parts in
// turn.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    attention_decode_combine_kernel(const AttentionDecodeParams p, const DecodePlan plan) {
  constexpr int kWarps = kCombineThreads / 32;
  BK_SHARED(float4, sums, [kWarps][32]);
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* part_lse = plan.lse + row * plan.splits;
  float top = -INFINITY;
  for (int i = lane; i < plan.splits; i += 32) top = fmaxf(top, part_lse[i]);
  top = warp_max(top);
  const float base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int i = lane; i < plan.splits; i += 32) total += expf(part_lse[i] - base);
  total = warp_sum(total);
  if (threadIdx.x == 0) p.lse[row] = total == 0.0f ? -INFINITY : base + logf(total);
  const float inverse = inverse_or_zero(total);

  const int query = static_cast<int>(row % p.seqlen_q);
  const int head = static_cast<int>(row / p.seqlen_q % p.heads);
  const int b = static_cast<int>(row / p.seqlen_q / p.heads);
  T* target = head_of<T>(p.output, b, head) + query * p.output.row_stride;
  for (int col0 = 0; col0 < plan.cols; col0 += 128) {
    const int col = col0 + lane * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (col < plan.cols) {
      for (int i = warp; i < plan.splits; i += kWarps) {
        const float share = expf(part_lse[i] - base);
        if (share == 0.0f) continue;  // a part without keys has written nothing
        const Vec<float, 4> x = load_vec<float, 4>(plan.output + (row * plan.splits + i) * plan.cols + col);
        sum.x += share * x.v[0];
        sum.y += share * x.v[1];
        sum.z += share * x.v[2];
        sum.w += share * x.v[3];
      }
    }
    __syncthreads();  // the last columns' readers are done
    sums[warp][lane] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < min(128, p.value_dim - col0); i += kCombineThreads) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) value += reinterpret_cast<const float*>(sums[w])[i];
      target[col0 + i] = from_float<T>(value * inverse);
    }
  }
}

// Parts that fill the multiprocessors' places best: the fewest whose last wave leaves hardly more places empty than any
// other number's would.
inline int decode_splits(int64_t blocks, int64_t places, int64_t most) {
  const auto use = [&](int64_t splits) {
    const int64_t all = blocks * splits;
    return static_cast<double>(all) / static_cast<double>(ceil_div(all, places) * places);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; splits++) best = std::max(best, use(splits));
  int64_t splits = 1;
  while (use(splits) < 0.85 * best) splits++;
  return static_cast<int>(splits);
}

template <class T, int kDim>
int launch_decode(const AttentionDecodeParams& p, Stream stream, const std::function<void*(size_t)>& allocate) {
  using Tile = DecodeTile<T, kDim>;
  DecodePlan plan{};
  const int64_t rows = int64_t{p.seqlen_q} * (p.heads / p.kv_heads);
  plan.tiles = static_cast<int>(ceil_div<int64_t>(rows, kDecodeRows));
  const int64_t blocks = int64_t{p.batch} * p.kv_heads * plan.tiles;
  plan.splits = p.splits;
  if (plan.splits == 0) {
    // No part shorter than two tiles a warp, were the cache full.
    int64_t keys = p.capacity;
    if (p.window_left >= 0 && p.window_right >= 0) {
      keys = std::min(keys, int64_t{p.seqlen_q} + p.window_left + p.window_right);
    }
    const int64_t most = std::max<int64_t>(1, keys / (2 * Tile::kWarps * kDecodeKeys));
    plan.splits = decode_splits(blocks, int64_t{Tile::kResident} * std::max(1, multiprocessor_count()),
                                std::min<int64_t>(most, 128));
  }
  plan.vector_q = moves_in_vectors<T>(p.query, p.head_dim);
  plan.vector_k = moves_in_vectors<T>(p.key_cache, p.head_dim) && moves_in_vectors<T>(p.key, p.head_dim);
  plan.vector_v = moves_in_vectors<T>(p.value_cache, p.value_dim) && moves_in_vectors<T>(p.value, p.value_dim);
  plan.vector_o = moves_in_vectors<T>(p.output, p.value_dim);
  plan.cols = round_up(p.value_dim, 4);
  const int64_t outputs = int64_t{p.batch} * p.heads * p.seqlen_q;
  if (rows > kMostBlocks - kDecodeRows || blocks * plan.splits > kMostBlocks || outputs > kMostBlocks) {
    return kErrorInvalidValue;
  }
  if (plan.splits > 1) {
    plan.output = static_cast<float*>(allocate(outputs * plan.splits * (plan.cols + 1) * sizeof(float)));
    plan.lse = plan.output + outputs * plan.splits * plan.cols;
  }
  if (int error = launch(attention_decode_forward_kernel<T, kDim>,
                         attention_grid(blocks * plan.splits, Tile::kThreads, Tile::kBytes, stream), p, plan)) {
    return error;
  }
  if (plan.splits == 1) return 0;
  return launch(attention_decode_combine_kernel<T>, attention_grid(outputs, kCombineThreads, 0, stream), p, plan);
}

}  // namespace attention

template <class T>
int attention_decode_forward(const AttentionDecodeParams& p, Stream stream,
                             const std::function<void*(size_t)>& allocate) {
  using namespace attention;
  const int dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 64) return launch_decode<T, 64>(p, stream, allocate);
  if (dim <= 128) return launch_decode<T, 128>(p, stream, allocate);
  return launch_decode<T, 256>(p, stream, allocate);
}

}  // namespace bigkern
