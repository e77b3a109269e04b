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
// each. A block's warps take 16 keys in turn, each with its own ring of S tiles in shared memory, which it fills
// itself: between two barriers of the block, at the start and at the end, no warp waits for another.
//
//     wait K | Q K^T | ask for K, S on | softmax | wait V | output += P V | ask for V, S on
//
// At the end the warps' outputs meet in shared memory and are weighed by their sums; those of the parts in a second
// kernel, in a fixed order.
//
// Two kernels make these steps (decode_part), by rings of two kinds; decode_by_tma chooses.
//   CopiedRing: cp.async, on every GPU and for any strides. S = 2, so that three tiles a warp are always in flight:
//       48 KB a block of bf16 at head_dim 128, two or three blocks a multiprocessor, of which 36 KB would hide 1 us.
//   TmaRing (Hopper, 16 bits, caches that a tensor map describes): one lane asks TMA for the warp's next tile, in
//       panels of 64 columns, and an mbarrier a tile and stage says when it has landed. A warp has no other reader or
//       writer of its ring, so its lanes' __syncwarp() is all that stands between the last read of a tile and the next
//       transfer to its place. No instruction of the loop moves data or works out an address of a row; a copied tile
//       takes 8 cp.async a lane at head_dim 128, each with a 64-bit product and a choice of row.
//
// Clusters, in the TMA kernel. Up to 8 parts of a tile of rows are the blocks of a cluster: each leaves its sums in its
// own shared memory, and each combines a share of the columns of all of them, in the order of their ranks, whoever came
// last. The second kernel is left to calls with more parts than 8, of which each cluster then leaves one. So that small
// calls need no second launch, they take 8 parts where half of the multiprocessors have work then; a cache beyond 64
// MB, 20 us, takes as many parts as fill the GPU.
//
// Append, in the same launch. New rows are read from key and value themselves, never from the cache, so that it does
// not matter when they are written there: by the blocks of the first tile, row i by part i modulo the parts. Nothing is
// written beyond the capacity. They are written by ordinary stores and the cache is read by TMA, another proxy; but no
// fence between the two is needed. Within a launch the two never meet: TMA takes only tiles of 16 rows that lie
// within the rows before the append (`whole`), and the blocks write only behind them. The tile where the new rows begin
// is copied, old rows and new, by cp.async, as is a part's last tile, whose rows beyond the part may hold anything. The
// next launch reads the rows by TMA, and the end of a kernel makes its writes known to all proxies.
// In the ring the proxies do take turns, and in one direction: a warp's tiles ascend, so that copied ones come last and
// no transfer follows a copy's write. A copy or an output that is written where TMA wrote comes after the wait for that
// transfer; a transfer over a tile that was read comes after __syncwarp(), without a fence, as is the practice.
//
// Instances: head_dim (with value_dim padded to the larger) 64, 128 and 256 for each of float, bf16 and fp16, those of
// 16 bits for Hopper too, and a combining kernel a dtype: 18. Window, softcap and ALiBi are decided at run time, a
// branch a tile of keys.
//
// Model of the TMA kernel, an H200's 132 multiprocessors at 1.75 GHz. The aim, 80 % of a copy's 4.3 TB/s, is 15 bytes a
// cycle each: keys and values of a warp's tile, 8 KB at 128 columns of 16 bits, every 550 cycles. A tile takes a warp
// about 700, most of it latency (8 dependent products, two shuffles a row, 16 products), and 8 warps are there. In
// flight are at least 160 KB of two blocks' rings, 26 KB would hide 1 us. With 8 parts of 8 heads, 64 blocks, a
// multiprocessor has to take 31 bytes a cycle: 4 warps of 700 cycles take 47, and 80 KB are in flight where 54 must be.
// The end of a cluster costs two of its barriers and a read of others' memory, about 1 us, where a second launch and
// its reads cost 2 to 4: of 8 sequences of 8 heads and 4,096 rows, 134 MB or 39 us at 80 %, 4 parts each, 5 to 10 %.
//
// Numerics: scores, statistics and sums are fp32; P is rounded to T for the tensor cores. fp32 products are split in
// tf32 ones as in attention.cuh.
//
// Registers, by ptxas: at most 168 in 16 bits up to head_dim 128 (by TMA 128 and 138), so that three blocks of four
// warps fit, and nothing spills on any architecture. fp32 at 256 has none left: the places of its values are worked out
// anew. Expected: 80 % of the bandwidth of a copy and more. Not measured.
#pragma once

#include "device/hopper.cuh"
#include "kernels/attention.cuh"
#include "kernels/attention_decode.h"
#include "kernels/attention_hopper.cuh"

#include <algorithm>
#include <cstdint>

namespace bigkern {
namespace attention {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;
constexpr int kCombineThreads = 128;
constexpr int kMaxDecodeCluster = 8;                          // what every Hopper GPU runs
constexpr int64_t kMostBytesOfOneLaunch = int64_t{64} << 20;  // of the caches, where one cluster a tile will do

// How a block is made: warps, tiles of keys and of values in each one's ring, and blocks that a multiprocessor shall
// have at once, for enough bytes in flight.
struct DecodeTiling {
  int warps, stages, resident;
};

// Copied by cp.async: what a block of 8 or 16 KB tiles holds must fit the 99 KB of sm_86 and sm_89.
template <int kRowBytes>
constexpr DecodeTiling kDecodeCopied = {kRowBytes <= 256   ? 4
                                        : kRowBytes <= 512 ? 2
                                                           : 1,
                                        2, kRowBytes <= 128 ? 4 : 2};
// By TMA: 96 KB a block, of which all but the tiles in use are in flight.
constexpr DecodeTiling kDecodeHopper64 = {4, 6, 2};
constexpr DecodeTiling kDecodeHopper128 = {4, 3, 2};
constexpr DecodeTiling kDecodeHopper256 = {2, 3, 2};

template <class T, int kDim, bool kTma>
struct DecodeTile {
  static constexpr DecodeTiling kTiling = !kTma         ? kDecodeCopied<kDim * sizeof(T)>
                                          : kDim == 64  ? kDecodeHopper64
                                          : kDim == 128 ? kDecodeHopper128
                                                        : kDecodeHopper256;
  static constexpr int kWarps = kTiling.warps, kStages = kTiling.stages, kThreads = 32 * kWarps;
  // Columns of a tile that lie beside each other: those of each panel follow the panel before.
  static constexpr int kPanel = kTma ? kPanelCols : kDim;
  static constexpr int kTile = kDecodeKeys * kDim;  // elements
  static constexpr int kRing = 2 * kStages * kTile;
  // The warps' outputs at the end, in the rings' place: rows apart by a quarter of the banks.
  static constexpr int kPartStride = kDim + 8;
  static constexpr int kPart = kDecodeRows * kPartStride;
  static_assert(kPart * sizeof(float) <= kRing * sizeof(T), "they stand where the rings were");
  static constexpr size_t kBytes = (kWarps * kRing + kDecodeRows * kDim) * sizeof(T) +
                                   (kWarps + kTma) * kDecodeRows * sizeof(float2) +
                                   (kTma ? kWarps * 2 * kStages * sizeof(Mbarrier) : 0);
  static_assert(!kTma || kTiling.resident * (kBytes + 1024) <= kHopperShared + 1024, "the system takes 1 KB a block");

  // Of an element of a tile: where its panel begins, and its column there.
  static __device__ __forceinline__ int panel(int col) {
    return kPanel == kDim ? 0 : col / kPanel * (kDecodeKeys * kPanel);
  }
  static __device__ __forceinline__ int panel_col(int col) { return kPanel == kDim ? col : col % kPanel; }
};

// Parts of a row's result that blocks leave in memory, `parts` of them, lie behind each other in `output`, `cols`
// floats each, and in `lse`. Each comes from the `cluster` of the `splits` blocks that combine theirs before.
struct DecodePlan {
  int tiles, splits, cluster, parts, cols;
  bool vector_q, vector_k, vector_v, vector_o;
  float* output;
  float* lse;
};

// The caches, in panels of a tile of keys.
struct DecodeMaps {
  TensorMap key, value;
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
template <class T, int kDim, class Tile>
__device__ __forceinline__ void load_keys(T* tile, const CacheRows<T>& rows, int first, int end, int cols,
                                          bool vectors) {
  constexpr int kVec = kVecElements<T>, kChunks = kDim / kVec;
  const auto at = [tile](int row, int col) {
    return SharedTile<T, Tile::kPanel>::at(tile + Tile::panel(col), row, Tile::panel_col(col));
  };
  const int lane = threadIdx.x % 32;
  if (vectors) {
#pragma unroll(kDim * sizeof(T) > 512 ? 1 : 4)
    for (int i = 0; i < kDecodeKeys * kChunks / 32; i++) {
      const int chunk = i * 32 + lane, row = chunk / kChunks, col = chunk % kChunks * kVec;
      const bool inside = first + row < end && col < cols;
      cp_async16(at(row, col), inside ? rows.row(first + row) + col : rows.cache, inside);
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
      store_vec<T, kVec>(at(row, col), values);
    }
  }
}

// value / total of a row without keys.
__device__ __forceinline__ float inverse_or_zero(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

// Which of a stage's two tiles.
enum WhichCache { kKeyCache, kValueCache };

// A warp's ring of tiles and the rows that go through it, up to `to`. Tiles are asked for in ascending order, `stage`
// goes round, and `phase` changes with every round.
template <class T, int kDim, class Tile>
struct DecodeRing {
  T* tiles;
  const CacheRows<T>& keys;
  const CacheRows<T>& values;
  const AttentionDecodeParams& p;
  const DecodePlan& plan;
  int to;

  __device__ __forceinline__ T* tile(WhichCache which, int stage) const {
    return tiles + (2 * stage + which) * Tile::kTile;
  }
  __device__ __forceinline__ void copy(WhichCache which, int first, int stage) const {
    if (which == kKeyCache) {
      load_keys<T, kDim, Tile>(tile(which, stage), keys, first, to, p.head_dim, plan.vector_k);
    } else {
      load_keys<T, kDim, Tile>(tile(which, stage), values, first, to, p.value_dim, plan.vector_v);
    }
  }
};

// Filled by cp.async. A group is committed for every tile, there or not, so that those to wait for can be counted.
template <class T, int kDim>
struct CopiedRing : DecodeRing<T, kDim, DecodeTile<T, kDim, false>> {
  using Tile = DecodeTile<T, kDim, false>;

  __device__ __forceinline__ void ask(WhichCache which, int first, int stage) const {
    if (first < this->to) this->copy(which, first, stage);
    cp_async_commit();
  }
  __device__ __forceinline__ void wait_queries() const { cp_async_wait<2 * Tile::kStages>(); }
  __device__ __forceinline__ void wait(WhichCache, int, int, uint32_t) const {
    cp_async_wait<2 * Tile::kStages - 1>();
    __syncwarp();
  }
};

// Filled by TMA, whose transfers one lane asks for: the tiles of 16 rows that the cache held before the launch. The
// others, a part's last ones, are copied.
template <class T, int kDim>
struct TmaRing : DecodeRing<T, kDim, DecodeTile<T, kDim, true>> {
  using Tile = DecodeTile<T, kDim, true>;
  const DecodeMaps& maps;
  Mbarrier* landed;  // two for each stage
  int head, batch, whole_to;

  // The mbarriers are this warp's alone.
  __device__ __forceinline__ void start() const {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < 2 * Tile::kStages; i++) mbarrier_init(&landed[i], 1);
      fence_barrier_init();
    }
    __syncwarp();
  }
  __device__ __forceinline__ void ask(WhichCache which, int first, int stage) const {
    if (whole(first)) {
      if (threadIdx.x % 32 == 0) {
        const TensorMap& map = which == kKeyCache ? maps.key : maps.value;
        load_panels<kDecodeKeys, kDim>(this->tile(which, stage), map, &landed[2 * stage + which], first, head, batch);
      }
    } else if (first < this->to) {
      this->copy(which, first, stage);
      cp_async_commit();
    }
  }
  __device__ __forceinline__ void wait_queries() const { cp_async_wait<0>(); }
  __device__ __forceinline__ void wait(WhichCache which, int first, int stage, uint32_t phase) const {
    if (whole(first)) {
      mbarrier_wait(&landed[2 * stage + which], phase);
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ bool whole(int first) const { return first + kDecodeKeys <= whole_to; }
};

// Four columns of a row of the output, from parts that are weighed by their sums.
struct Weighed {
  float top, total, value[4];

  __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }
  __device__ __forceinline__ float lse() const { return total == 0.0f ? -INFINITY : base() + logf(total); }
};

// statistics(i) are a part's largest score and sum, part(i) its columns.
template <class T, class Statistics, class Part>
__device__ __forceinline__ Weighed weigh(int count, Statistics statistics, Part part) {
  Weighed all = {-INFINITY};
#pragma unroll 4
  for (int i = 0; i < count; i++) all.top = fmaxf(all.top, statistics(i).x);
#pragma unroll 4
  for (int i = 0; i < count; i++) {
    const float2 own = statistics(i);
    const float share = exponential<T>(own.x - all.base(), kLog2e);
    all.total += share * own.y;
    const Vec<float, 4> x = part(i);
#pragma unroll
    for (int j = 0; j < 4; j++) all.value[j] += share * x.v[j];
  }
  return all;
}

// What a block does; `maps` is null where it copies.
template <class T, int kDim, bool kTma>
__device__ __forceinline__ void decode_part(const AttentionDecodeParams& p, const DecodePlan& plan,
                                            const DecodeMaps* maps) {
  using Tile = DecodeTile<T, kDim, kTma>;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kDimTiles = kDim / 8;
  SharedMemory shared;
  T* rings = shared.take<T>(kWarps * Tile::kRing, kTma ? kAtomBytes : 128);
  T* q_tile = shared.take<T>(kDecodeRows * kDim, 128);
  float2* statistics = shared.take<float2>((kWarps + kTma) * kDecodeRows);

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
  const auto make_ring = [&] {
    const DecodeRing<T, kDim, Tile> base = {rings + warp * Tile::kRing, keys, values, p, plan, to};
    if constexpr (kTma) {
      Mbarrier* landed = shared.take<Mbarrier>(kWarps * 2 * Tile::kStages) + warp * 2 * Tile::kStages;
      return TmaRing<T, kDim>{base, *maps, landed, kv_head, b, min(to, length)};
    } else {
      return CopiedRing<T, kDim>{base};
    }
  };
  const auto ring = make_ring();
  if constexpr (kTma) ring.start();
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
    ring.ask(kKeyCache, key0 + stage * kWarps * kDecodeKeys, stage);
    ring.ask(kValueCache, key0 + stage * kWarps * kDecodeKeys, stage);
  }
  if (tile == 0) {
    for (int i = split; i < end - length; i += plan.splits) {
      keys.template append<kThreads>(i, p.head_dim, plan.vector_k);
      values.template append<kThreads>(i, p.value_dim, plan.vector_v);
    }
  }
  ring.wait_queries();
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

  Ring<Tile::kStages> at;
#pragma unroll 1
  for (; key0 < to; key0 += kWarps * kDecodeKeys) {
    const int later = key0 + Tile::kStages * kWarps * kDecodeKeys;
    T* k_tile = ring.tile(kKeyCache, at.stage);
    const int v_place = static_cast<int>(ring.tile(kValueCache, at.stage) - rings);
    ring.wait(kKeyCache, key0, at.stage, at.phase);
    float scores[2][4] = {};
    multiply_parts<T, kDim>(scores, p.head_dim, [&](auto& sums, int col) {
#pragma unroll(kProductSteps<T>)
      for (int k = col; k < col + min(kDim, kPartCols<T>); k += kDepth<T>) {
        uint32_t a[4], key[4];
        load_a<T, kDim>(a, q_tile, 0, k);
        load_b<T, Tile::kPanel>(key, k_tile + Tile::panel(k), 0, Tile::panel_col(k));
        multiply_add<T>(sums[0], a, key[0], key[1]);
        multiply_add<T>(sums[1], a, key[2], key[3]);
      }
    });
    __syncwarp();  // everyone is done with them
    ring.ask(kKeyCache, later, at.stage);

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

    ring.wait(kValueCache, key0, at.stage, at.phase);
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
          load_b_trans<T, Tile::kPanel>(value, rings, k * kDepth<T>, Tile::panel_col(8 * d),
                                        v_place + Tile::panel(8 * d));
          multiply_add<T, true>(out[d], weights, value[0], value[1]);
          multiply_add<T, true>(out[d + 1], weights, value[2], value[3]);
        }
      }
    }
    __syncwarp();  // everyone is done with them
    ring.ask(kValueCache, later, at.stage);
    at.advance();
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
  const auto each_vector = [&](int first, int step, auto function) {
#pragma unroll 1
    for (int i = first; i < rows * (kDim / 4); i += step) {
      const int row = i / (kDim / 4), col = i % (kDim / 4) * 4;
      if (col < p.value_dim) function(row, col);
    }
  };
  const auto of_warps = [&](int row, int col) {
    return weigh<T>(
        kWarps, [&](int w) { return statistics[w * kDecodeRows + row]; },
        [&](int w) { return load_vec<float, 4>(parts + w * Tile::kPart + row * Tile::kPartStride + col); });
  };
  const int part_number = split / plan.cluster;
  const auto store = [&](int row, int col, const Weighed& all) {
    const float inverse = inverse_or_zero(all.total);
    const int query = (row0 + row) / group, head = kv_head * group + (row0 + row) % group;
    const int64_t number = (int64_t{b} * p.heads + head) * p.seqlen_q + query;
    if (plan.parts > 1) {
      const int64_t place_of_part = number * plan.parts + part_number;
      if (col == 0) plan.lse[place_of_part] = all.lse();
      Vec<float, 4> x;
#pragma unroll
      for (int j = 0; j < 4; j++) x.v[j] = all.value[j] * inverse;
      store_vec<float, 4>(plan.output + place_of_part * plan.cols + col, x);
    } else {
      if (col == 0) p.lse[number] = all.lse();
      T* target = head_of<T>(p.output, b, head) + query * p.output.row_stride + col;
      if (plan.vector_o) {
        Vec<T, 4> x;
#pragma unroll
        for (int j = 0; j < 4; j++) x.v[j] = from_float<T>(all.value[j] * inverse);
        store_vec<T, 4>(target, x);
      } else {
        for (int j = 0; j < 4 && col + j < p.value_dim; j++) target[j] = from_float<T>(all.value[j] * inverse);
      }
    }
  };
  if (!kTma || plan.cluster == 1) {
    each_vector(threadIdx.x, kThreads, [&](int row, int col) { store(row, col, of_warps(row, col)); });
    return;
  }
  if constexpr (kTma) {
    // The warps' sums in the first one's place, where only this thread reads these columns; then the blocks', of which
    // each takes some.
    float2* of_block = statistics + kWarps * kDecodeRows;
    each_vector(threadIdx.x, kThreads, [&](int row, int col) {
      const Weighed all = of_warps(row, col);
      if (col == 0) of_block[row] = make_float2(all.top, all.total);
      const Vec<float, 4> x = {all.value[0], all.value[1], all.value[2], all.value[3]};
      store_vec<float, 4>(parts + row * Tile::kPartStride + col, x);
    });
    cluster_sync();  // all blocks' sums are there
    each_vector(threadIdx.x + cluster_rank() * kThreads, plan.cluster * kThreads, [&](int row, int col) {
      store(row, col,
            weigh<T>(
                plan.cluster, [&](int rank) { return ld_cluster<float2>(cluster_address(of_block + row, rank)); },
                [&](int rank) {
                  return ld_cluster<Vec<float, 4>>(cluster_address(parts + row * Tile::kPartStride + col, rank));
                }));
    });
    cluster_sync();  // a block's memory lasts as long as the block
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(DecodeTile<T, kDim, false>::kThreads, kDim <= 128 && sizeof(T) == 2 ? 3 : 1)
    attention_decode_forward_kernel(const AttentionDecodeParams p, const DecodePlan plan) {
  decode_part<T, kDim, false>(p, plan, nullptr);
}

template <class T, int kDim>
__global__ void __launch_bounds__(DecodeTile<T, kDim, true>::kThreads, DecodeTile<T, kDim, true>::kTiling.resident)
    attention_decode_hopper_forward_kernel(const AttentionDecodeParams p, const DecodePlan plan,
                                           const __grid_constant__ DecodeMaps maps) {
  if constexpr (kHopper) decode_part<T, kDim, true>(p, plan, &maps);
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
  const float* part_lse = plan.lse + row * plan.parts;
  float top = -INFINITY;
  for (int i = lane; i < plan.parts; i += 32) top = fmaxf(top, part_lse[i]);
  top = warp_max(top);
  const float base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int i = lane; i < plan.parts; i += 32) total += expf(part_lse[i] - base);
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
      for (int i = warp; i < plan.parts; i += kWarps) {
        const float share = expf(part_lse[i] - base);
        if (share == 0.0f) continue;  // a part without keys has written nothing
        const Vec<float, 4> x = load_vec<float, 4>(plan.output + (row * plan.parts + i) * plan.cols + col);
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

// The caches, as attention's keys are counted.
inline TensorCounts cache_counts(const AttentionDecodeParams& p) {
  AttentionOptions options{};
  options.batch = p.batch;
  options.kv_heads = p.kv_heads;
  options.seqlen_k = p.capacity;
  return TensorCounts(options, false);
}

// Whether the kernel of Hopper GPUs serves a call: 16 bits, and caches that TMA reaches.
template <class T>
bool decode_by_tma(const AttentionDecodeParams& p) {
  const TensorCounts counts = cache_counts(p);
  return sizeof(T) == 2 && compute_capability() == 90 && can_map(p.key_cache, counts) && can_map(p.value_cache, counts);
}

// Of the parts, those whose blocks combine theirs in a cluster: all of them if they may, else as many as divide them.
inline int decode_cluster(int splits) {
  int cluster = kMaxDecodeCluster;
  while (splits % cluster != 0) cluster--;
  return cluster;
}

template <class T, int kDim, bool kTma>
int launch_decode_tiled(const AttentionDecodeParams& p, Stream stream, const std::function<void*(size_t)>& allocate) {
  using Tile = DecodeTile<T, kDim, kTma>;
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
    const int multiprocessors = std::max(1, multiprocessor_count());
    plan.splits =
        decode_splits(blocks, int64_t{Tile::kTiling.resident} * multiprocessors, std::min<int64_t>(most, 128));
    if (kTma && plan.splits > kMaxDecodeCluster) {
      const int64_t bytes = blocks * keys * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(T));
      const bool half = 2 * kMaxDecodeCluster * blocks >= multiprocessors;
      plan.splits = half && bytes <= kMostBytesOfOneLaunch ? kMaxDecodeCluster
                                                           : plan.splits / kMaxDecodeCluster * kMaxDecodeCluster;
    }
  }
  plan.cluster = kTma ? decode_cluster(plan.splits) : 1;
  plan.parts = plan.splits / plan.cluster;
  plan.vector_q = moves_in_vectors<T>(p.query, p.head_dim);
  plan.vector_k = moves_in_vectors<T>(p.key_cache, p.head_dim) && moves_in_vectors<T>(p.key, p.head_dim);
  plan.vector_v = moves_in_vectors<T>(p.value_cache, p.value_dim) && moves_in_vectors<T>(p.value, p.value_dim);
  plan.vector_o = moves_in_vectors<T>(p.output, p.value_dim);
  plan.cols = round_up(p.value_dim, 4);
  const int64_t outputs = int64_t{p.batch} * p.heads * p.seqlen_q;
  if (rows > kMostBlocks - kDecodeRows || blocks * plan.splits > kMostBlocks || outputs > kMostBlocks) {
    return kErrorInvalidValue;
  }
  if (plan.parts > 1) {
    plan.output = static_cast<float*>(allocate(outputs * plan.parts * (plan.cols + 1) * sizeof(float)));
    plan.lse = plan.output + outputs * plan.parts * plan.cols;
  }
  LaunchConfig config = attention_grid(blocks * plan.splits, Tile::kThreads, Tile::kBytes, stream);
  config.cluster = plan.cluster;
  int error;
  if constexpr (kTma) {
    const TensorCounts counts = cache_counts(p);
    const DecodeMaps maps = {panel_map<T>(p.key_cache, counts, p.head_dim, kDecodeKeys),
                             panel_map<T>(p.value_cache, counts, p.value_dim, kDecodeKeys)};
    error = launch(attention_decode_hopper_forward_kernel<T, kDim>, config, p, plan, maps);
  } else {
    error = launch(attention_decode_forward_kernel<T, kDim>, config, p, plan);
  }
  if (error != 0 || plan.parts == 1) return error;
  return launch(attention_decode_combine_kernel<T>, attention_grid(outputs, kCombineThreads, 0, stream), p, plan);
}

template <class T, int kDim>
int launch_decode(const AttentionDecodeParams& p, Stream stream, const std::function<void*(size_t)>& allocate) {
  if constexpr (sizeof(T) == 2) {
    if (decode_by_tma<T>(p)) return launch_decode_tiled<T, kDim, true>(p, stream, allocate);
  }
  return launch_decode_tiled<T, kDim, false>(p, stream, allocate);
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
