// Attention's backward pass on a Hopper GPU: attention.cuh's maths, by TMA and wgmma, between the same kernels for the
// rows' statistics and for grad_query.
//
// A block owns 128 or 64 keys of one key head and walks over tiles of 64 rows of all the heads that share them, so that
// grad_key and grad_value need no atomics. One warp loads, two warpgroups multiply. Scores are transposed (keys are the
// products' rows).
//
// Up to 128 columns a warpgroup owns 64 of 128 keys, with the gradients of them in registers. P and dS are left
// operands from registers; dS goes through shared memory once, for dQ = dS K, of which each warpgroup makes half the
// columns:
//
//     issued    dP^T = V dO^T | dV += P^T dO | dK += dS^T Q, barrier, dQ = dS K | S^T = K Q^T of the next
//     computed  P (exp2)      | dS           | dS to shared memory (before dK)  | dQ to its sums
//
// Every product has arithmetic beside it that does not wait for it; products alone stand between dK's issue and dQ's
// end. S^T is waited for before the loop goes round: ptxas gives up (C7514) where accumulators are in flight there. A
// product too many, of the rows after the last, is issued from the keys' tile, for a product in a branch costs as much.
//
// Beyond 128 columns registers hold one gradient of 64 keys a warpgroup: the first has dV, the second dK. Each makes
// the scores of half the rows, so that P goes through shared memory as dS does:
//
//     issued    barrier, dQ = dS K | dV += P^T dO or dK += dS^T Q | S^T = K Q^T, dP^T = V dO^T of the next |
//     computed                     | dQ to its sums               |                                        | P, dS
//
// P and dS, of 16 elements a thread, stand beside no product: those of the next rows would need registers beside dQ.
//
// dS has a tile for each stage, of which two suffice: the barrier before dQ tells that the other warpgroup is done with
// dQ of the rows before. grad_query is summed in fp32: a warp's part of dQ is added by a bulk reduction of its own from
// staging memory of its own or, where shared memory has no room, by each thread, four neighbours at a time. When
// deterministic each of a few blocks a head has a copy of the sums, to which a thread or its bulk reductions, which
// wait for each other from one tile of keys to the next, add in order; and the copies are added in order.
//
// What TMA cannot know: packed sequences end within a tile. The rows beyond the end, another sequence's, perhaps
// infinite, would meet weights of 0; all threads zero them before the products read them.
//
// Instances: for each of bf16 and fp16, head_dim up to 64, 128, 192 and 256, one with windows alone and one with every
// feature at run time, which up to 128 waits for dP^T before it weighs the scores, two or four accumulator tiles at a
// time. value_dim is padded with head_dim to the larger one, by zeros that TMA fills in.
//
// Registers: kernels start with 168 a thread. Up to 128 columns the loading warpgroup gives up all but 24, and the
// others go to 240; a thread holds head_dim/2 of each of dK and dV, 32 of S or dP each, 16 of P and dS as operands
// each, head_dim/4 of dQ. Beyond, 40 and 232: head_dim/2 of dK or dV, 16 of S and dP each, head_dim/4 of dQ. ptxas
// spills nothing.
//
// Cycles of one tile of rows, by unit, of one multiprocessor (4,096 FLOP of wgmma, 16 exp2, 128 bytes of shared memory
// a cycle), and the bytes that pass between it and L2:
//
//     head_dim   wgmma   exp2   shared memory                                   L2 bytes a cycle   of a block
//           64    1280    512   1664 (208 KB: operands 144, dS and dQ 48)              20            146 KB
//          128    2560    512   2944 (368 KB: operands 256, dS and dQ 80)              22            193 KB
//          192    1920    256   3008 (376 KB: operands 264, dS and P 16, dQ 48)        33            177 KB
//          256    2560    256   3712 (464 KB: operands 320, dS and P 16, dQ 64)        35            225 KB
//
// (TMA's writes are in the sum. dQ beyond 128 columns goes from registers to L2, but by the same wires.) So shared
// memory binds: 77, 87, 64 and 69 % of wgmma's rate at best, before the barrier and what is exposed. Without staging
// (`direct`), 64 and 128 columns take 1536 and 2688 cycles. None of this is measured.
#pragma once

#include "device/hopper.cuh"
#include "kernels/attention_hopper.cuh"
#include "kernels/attention_hopper_backward.h"
#include "kernels/attention_scores.cuh"

#include <cstdint>
#include <type_traits>

namespace bigkern {
namespace attention {

// A row's lse and delta.
using RowPair = float2;

// What the loading warp tells the others of a stage.
struct HopperBackwardStep {
  float* sums;  // of these rows' grad_query
  int head, query0, rows;
};

// What a measured run chooses: stages of query, grad_output and dS, and whether the threads add dQ to its sums in
// global memory themselves (`direct`) or a bulk reduction does from shared memory. The candidates stand in
// benchmarks/attention.py; all of them compile without spills.
struct HopperBackwardTiling {
  int stages;
  bool direct;
};
constexpr HopperBackwardTiling kHopperBackward64 = {3, false};
constexpr HopperBackwardTiling kHopperBackward128 = {2, false};
constexpr HopperBackwardTiling kHopperBackward192 = {2, true};
constexpr HopperBackwardTiling kHopperBackward256 = {2, true};

constexpr HopperBackwardTiling hopper_backward_tiling(int dim) {
  return dim == 64    ? kHopperBackward64
         : dim == 128 ? kHopperBackward128
         : dim == 192 ? kHopperBackward192
                      : kHopperBackward256;
}

// What a block works on. In shared memory, for the warpgroups that multiply have no registers for it.
struct HopperBackwardWork {
  int b, kv_head;
  Sequence sequence;
};

// Registers are what setmaxnreg gives a thread of the warpgroup that loads and of the two that multiply.
template <int kDim>
struct HopperBackwardTile {
  static constexpr int kKeys = hopper_backward_keys(kDim), kQueries = kHopperBackwardQueries;
  static constexpr int kStages = hopper_backward_tiling(kDim).stages;
  static constexpr bool kDirect = hopper_backward_tiling(kDim).direct;
  // Whether the warpgroups share all keys, and each has one of their gradients and half of the scores' queries.
  static constexpr bool kShareKeys = kKeys == 64;
  static constexpr int kLoaderRegisters = kShareKeys ? 40 : 24, kRegisters = kShareKeys ? 232 : 240;

  static constexpr int kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers), kWarps = kHopperBackwardWarps;
  static constexpr int kKeyBytes = kTileBytes<kKeys, kDim>, kQueryBytes = kTileBytes<kQueries, kDim>;
  // Of dS, and of P where the other warpgroup wants it.
  static constexpr int kScoreBytes = kTileBytes<kKeys, kQueries>, kStageScoreBytes = (1 + kShareKeys) * kScoreBytes;
  static constexpr int kSumBytes = kDirect ? 0 : kQueries * kDim * 4;
  static constexpr int kBytes = 2 * kKeyBytes + kStages * (2 * kQueryBytes + kStageScoreBytes) + kSumBytes +
                                kStages * static_cast<int>(kQueries * sizeof(RowPair) + sizeof(HopperBackwardStep)) +
                                sizeof(HopperBackwardWork) + 128;
  static_assert(kKeys == (kShareKeys ? 64 : 64 * kConsumers) && kQueries == 64, "a warpgroup's products have 64 rows");
  static_assert(kStages >= 2, "dS is written while the last one is read");
  static_assert(kBytes <= kHopperShared && kWarpgroup * (kLoaderRegisters + kConsumers * kRegisters) <= 65536,
                "beyond a multiprocessor");
};

struct HopperBackwardMaps {
  TensorMap query, key, value, grad_output;
};

template <int kStages>
struct HopperBackwardBarriers {
  Mbarrier keys_full, keys_empty, full[kStages], empty[kStages];
};

template <int kDim>
struct HopperBackwardShared {
  using Tile = HopperBackwardTile<kDim>;
  char *k_tile, *v_tile, *q_tiles, *g_tiles;
  char* score_tiles;  // keys x queries: dS, and P behind it
  float* sums;
  RowPair* row_statistics;
  HopperBackwardStep* steps;
  HopperBackwardWork* work;
  HopperBackwardBarriers<Tile::kStages>* barriers;

  __device__ __forceinline__ HopperBackwardShared() {
    SharedMemory memory;
    k_tile = memory.take<char>(Tile::kKeyBytes, kAtomBytes);
    v_tile = memory.take<char>(Tile::kKeyBytes, kAtomBytes);
    q_tiles = memory.take<char>(Tile::kStages * Tile::kQueryBytes, kAtomBytes);
    g_tiles = memory.take<char>(Tile::kStages * Tile::kQueryBytes, kAtomBytes);
    score_tiles = memory.take<char>(Tile::kStages * Tile::kStageScoreBytes, kAtomBytes);
    if constexpr (!Tile::kDirect) sums = memory.take<float>(Tile::kQueries * kDim, 128);
    row_statistics = memory.take<RowPair>(Tile::kStages * Tile::kQueries);
    steps = memory.take<HopperBackwardStep>(Tile::kStages);
    work = memory.take<HopperBackwardWork>(1);
    barriers = memory.take<HopperBackwardBarriers<Tile::kStages>>(1);
  }
};

// The rows of all heads of a group that see any of a tile's keys, tile by tile.
template <int kKeys>
struct HopperBackwardSteps {
  int keys, tiles, count;
  int first_tile;

  __device__ __forceinline__ HopperBackwardSteps(const AttentionOptions& p, const Sequence& sequence, int key0) {
    constexpr int kQueries = kHopperBackwardQueries;
    keys = min(kKeys, sequence.keys - key0);
    const int first = p.window_right < 0 ? 0 : max(0, key0 - sequence.shift - p.window_right);
    const int end =
        p.window_left < 0 ? sequence.queries : min(sequence.queries, key0 + keys - sequence.shift + p.window_left);
    first_tile = first / kQueries;
    tiles = max(0, ceil_div(end, kQueries) - first_tile);
    count = end > first ? tiles * (p.heads / p.kv_heads) : 0;
  }
};

// Zeros for the rows of a tile from `rows` on, which belong to the next sequence: a weight of 0 does not silence an
// infinity there. By all consumers; the barrier is the caller's.
template <int kRows, int kCols>
__device__ __forceinline__ void clear_rows(char* tile, int rows, int thread) {
#pragma unroll 1
  for (int chunk = thread; chunk < kRows * kCols / 8; chunk += 2 * kWarpgroup) {
    if (chunk / 8 % kRows >= rows) *reinterpret_cast<uint4*>(tile + 16 * chunk) = make_uint4(0, 0, 0, 0);
  }
}

// Issues sums = a^T b: `a` a tile of kDepth rows and 64 columns, `b` kCols columns of a tile of kDepth rows.
template <class T, int kCols, int kDepth>
__device__ __forceinline__ void multiply_depth(float (&sums)[kCols / 2], const void* a, const void* b) {
  const uint64_t left = wgmma_descriptor(a, kDepth * kPanelRowBytes, kAtomBytes, 128);
  const uint64_t right = wgmma_descriptor(b, kDepth * kPanelRowBytes, kAtomBytes, 128);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    wgmma_ss<T, kCols, true, true>(sums, left + k * kPanelRowBytes / 16, right + k * kPanelRowBytes / 16, k > 0);
  }
}

// Issues sums += a b: `a` a tile of 64 rows and kDepth columns, one panel; `b` a tile of kDepth rows and kCols columns.
template <class T, int kCols, int kDepth>
__device__ __forceinline__ void multiply_panel(float (&sums)[kCols / 2], const void* a, const void* b) {
  static_assert(kDepth <= kPanelCols, "one panel");
  const uint64_t left = wgmma_descriptor(a, 0, kAtomBytes, 128);
  const uint64_t right = wgmma_descriptor(b, kDepth * kPanelRowBytes, kAtomBytes, 128);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    wgmma_ss<T, kCols, false, true>(sums, left + k * 2 / 16, right + k * kPanelRowBytes / 16, true);
  }
}

// kCount elements of wgmma's accumulators from kFirst on, as a product of its own has them.
template <int kFirst, int kCount, int kAll>
__device__ __forceinline__ float (&part_of(float (&accumulators)[kAll])) [kCount] {
  static_assert(kFirst + kCount <= kAll, "within the accumulators");
  return reinterpret_cast<float (&)[kCount]>(accumulators[kFirst]);
}

// The loading warp: key and value once, then query, grad_output and their statistics, a stage ahead of the products.
template <class T, int kDim>
__device__ __forceinline__ void load_backward_tiles(const HopperBackwardMaps& maps, const AttentionBackwardParams& p,
                                                    const HopperBackwardPlan& plan, const Sequence& sequence, int b,
                                                    int kv_head, int copy, const HopperBackwardShared<kDim>& shared) {
  using Tile = HopperBackwardTile<kDim>;
  auto& barriers = *shared.barriers;
  const int lane = threadIdx.x % 32, batch = p.cu_seqlens_q != nullptr ? 0 : b;
  Ring<Tile::kStages> ring;
  uint32_t turn = 0;
#pragma unroll 1
  for (int key0 = copy * Tile::kKeys; key0 < sequence.keys; key0 += plan.copies * Tile::kKeys, turn ^= 1) {
    const HopperBackwardSteps<Tile::kKeys> steps(p, sequence, key0);
    if (lane == 0) {
      mbarrier_wait(&barriers.keys_empty, turn ^ 1);
      load_panels<Tile::kKeys, kDim>(shared.k_tile, maps.key, &barriers.keys_full, sequence.first_k + key0, kv_head,
                                     batch);
      load_panels<Tile::kKeys, kDim>(shared.v_tile, maps.value, &barriers.keys_full, sequence.first_k + key0, kv_head,
                                     batch);
    }
#pragma unroll 1
    for (int step = 0; step < steps.count; step++, ring.advance()) {
      const int head = kv_head * (p.heads / p.kv_heads) + step / steps.tiles;
      const int query_tile = steps.first_tile + step % steps.tiles, query0 = query_tile * Tile::kQueries;
      Mbarrier* full = &barriers.full[ring.stage];
      mbarrier_wait(&barriers.empty[ring.stage], ring.phase ^ 1);
      if (lane == 0) {
        const int row = sequence.first_q + query0, bytes = ring.stage * Tile::kQueryBytes;
        load_panels<Tile::kQueries, kDim>(shared.q_tiles + bytes, maps.query, full, row, head, batch);
        load_panels<Tile::kQueries, kDim>(shared.g_tiles + bytes, maps.grad_output, full, row, head, batch);
        const int64_t place = ((p.deterministic ? int64_t{copy} * p.batch : 0) + b) * p.heads + head;
        shared.steps[ring.stage] = {plan.sums + (place * plan.query_tiles + query_tile) * (Tile::kQueries * kDim), head,
                                    query0, sequence.queries - query0};
      }
      const RowPair* source =
          reinterpret_cast<const RowPair*>(plan.statistics) + sequence.statistics(p, b, head) + query0;
#pragma unroll
      for (int row = lane; row < Tile::kQueries; row += 32) {
        shared.row_statistics[ring.stage * Tile::kQueries + row] =
            query0 + row < sequence.queries ? source[row] : make_float2(INFINITY, 0.0f);
      }
      mbarrier_arrive(full);
    }
  }
}

// With features: the scores of kTiles accumulator tiles from kFirst on to the dropped weights, and dP to dS by scale
// q . k. The derivatives of all at once would not fit the registers. Returns what the thread adds to the negative
// gradient of the head's slope, where it is wanted.
template <class T, int kFirst, int kTiles, int kCount, class Hide>
__device__ __forceinline__ float weigh_scores(const AttentionBackwardParams& p, const Sequence& sequence, int b,
                                              int head, int query0, int key0, const RowPair* statistics, uint32_t kept,
                                              bool cut, Hide hide, float (&all_scores)[kCount],
                                              float (&all_grads)[kCount]) {
  auto& scores = tiles_of<kFirst, kTiles>(all_scores);
  auto& grads = tiles_of<kFirst, kTiles>(all_grads);
  const int lane = threadIdx.x % 32;
  const auto query_of = [&](int i, int e) { return query0 + 8 * (kFirst + i) + lane % 4 * 2 + e % 2; };
  const auto key_of = [&](int, int e) { return key0 + lane / 4 + e / 2 * 8; };
  float derivative[kTiles][4];
  add_features<T, kTiles, true>(p, sequence, b, scores, derivative, [&](int) { return head; }, query_of, key_of);
  if (cut) {
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) scores[i][e] = hide(4 * (kFirst + i) + e, scores[i][e]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const RowPair row = statistics[8 * (kFirst + i) + e % 2];
      const bool keep = kept >> (4 * (kFirst + i) + e) & 1;
      // The scores are what lse is of: their difference first, which rounds less.
      const float weight = exp2_approx((scores[i][e] - row.x) * kLog2e);
      const float grad = weight * ((keep ? grads[i][e] * p.dropout_scale : 0.0f) - row.y);
      scores[i][e] = keep ? weight : 0.0f;
      store_mask_gradient<T>(p, sequence, b, head, query_of(i, e), key_of(i, e), grad);
      grads[i][e] = grad;
    }
  }
  float slope_part = 0.0f;
  if (p.grad_slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        slope_part += grads[i][e] * fabsf(static_cast<float>(query_of(i, e) + sequence.shift - key_of(i, e)));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) grads[i][e] *= derivative[i][e];
  }
  return slope_part;
}

// One of the two warpgroups that multiply. Its scores are those of 64 keys: of its own and all queries of a tile, or,
// where the warpgroups share the keys, of half of the queries.
template <class T, int kDim, bool kPlain>
struct HopperBackwardConsumer {
  using Tile = HopperBackwardTile<kDim>;
  using Steps = HopperBackwardSteps<Tile::kKeys>;
  static constexpr int kKeys = Tile::kKeys, kQueries = Tile::kQueries;
  static constexpr int kScores = kQueries / (Tile::kShareKeys ? 2 : 1) / 2;
  static constexpr int kAll = 1, kAllThreads = Tile::kConsumers * kWarpgroup;  // the named barrier of both

  const AttentionBackwardParams& p;
  const HopperBackwardPlan& plan;
  const HopperBackwardShared<kDim>& shared;
  const Sequence& sequence;
  const int &b, &kv_head;
  const int thread = threadIdx.x - kWarpgroup, lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kWarpgroup / 32;
  const int group = threadIdx.x / kWarpgroup - 1;
  // Of the tile, what the warp's scores begin with.
  const int group_key = Tile::kShareKeys ? 0 : 64 * group;
  const int warp_key = Tile::kShareKeys ? threadIdx.x / 32 % 4 * 16 : 16 * warp;
  const int group_query = Tile::kShareKeys ? 2 * kScores * group : 0;
  Ring<Tile::kStages> ring = {};

  __device__ __forceinline__ const char* q_tile() const { return shared.q_tiles + ring.stage * Tile::kQueryBytes; }
  __device__ __forceinline__ const char* g_tile() const { return shared.g_tiles + ring.stage * Tile::kQueryBytes; }

  __device__ __forceinline__ void all_arrive() const { named_barrier(kAll, kAllThreads); }

  __device__ __forceinline__ void await_keys(const Steps& steps, uint32_t turn) const {
    mbarrier_wait(&shared.barriers->keys_full, turn);
    // Of packed sequences the rows behind the last are the next one's.
    if (p.cu_seqlens_q != nullptr && steps.keys < kKeys) {
      clear_rows<kKeys, kDim>(shared.k_tile, steps.keys, thread);
      clear_rows<kKeys, kDim>(shared.v_tile, steps.keys, thread);
      fence_proxy_async();
      all_arrive();
    }
  }

  __device__ __forceinline__ void await_rows() const {
    mbarrier_wait(&shared.barriers->full[ring.stage], ring.phase);
    const int rows = shared.steps[ring.stage].rows;
    if (p.cu_seqlens_q != nullptr && rows < kQueries) {
      clear_rows<kQueries, kDim>(shared.q_tiles + ring.stage * Tile::kQueryBytes, rows, thread);
      clear_rows<kQueries, kDim>(shared.g_tiles + ring.stage * Tile::kQueryBytes, rows, thread);
      fence_proxy_async();
      all_arrive();
    }
  }

  // Whether the window hides any of the scores, and the score that it leaves of number i.
  __device__ __forceinline__ bool is_cut(int key0, int query0) const {
    return key0 + group_key + 64 > sequence.end_key(p, query0) ||
           key0 + group_key < sequence.first_key(p, min(query0 + 2 * kScores, sequence.queries) - 1);
  }
  __device__ __forceinline__ float hide(int key0, int query0, int i, float score) const {
    const int query = query0 + i / 4 * 8 + lane % 4 * 2 + i % 2, key = key0 + warp_key + lane / 4 + i / 2 % 2 * 8;
    return (key >= sequence.first_key(p, query)) & (key < sequence.end_key(p, query)) ? score : -INFINITY;
  }

  // Plain scores to weights.
  __device__ __forceinline__ void weigh_plain(int key0, int query0, const RowPair* statistics,
                                              float (&scores)[kScores]) const {
    if (is_cut(key0, query0)) {
#pragma unroll
      for (int i = 0; i < kScores; i++) scores[i] = hide(key0, query0, i, scores[i]);
    }
#pragma unroll
    for (int i = 0; i < kScores; i++) {
      scores[i] = exp2_approx(__fmaf_rn(scores[i], p.scale * kLog2e, -statistics[i / 4 * 8 + i % 2].x));
    }
  }

  // With features, the scores to weights and dP to dS.
  static constexpr int kTilesAtOnce = kDim == 128 ? 2 : 4;
  __device__ __forceinline__ void weigh(int key0, int query0, int head, const RowPair* statistics, uint32_t kept,
                                        float (&scores)[kScores], float (&grads)[kScores]) const {
    const bool cut = is_cut(key0, query0);
    float slope_part = 0.0f;
    const auto some = [&](auto first) {
      slope_part += weigh_scores<T, decltype(first)::value * kTilesAtOnce, kTilesAtOnce>(
          p, sequence, b, head, query0, key0 + warp_key, statistics, kept, cut,
          [&](int i, float score) { return hide(key0, query0, i, score); }, scores, grads);
    };
    some(std::integral_constant<int, 0>{});
    if constexpr (kScores / 4 > kTilesAtOnce) some(std::integral_constant<int, 1>{});
    if constexpr (kScores / 4 > 2 * kTilesAtOnce) {
      some(std::integral_constant<int, 2>{});
      some(std::integral_constant<int, 3>{});
    }
    if (p.grad_slopes != nullptr) {
      slope_part = warp_sum(slope_part);
      // This warp's alone, tile of rows after tile of rows.
      const int64_t place = (int64_t{b} * p.heads + head) * plan.key_tiles + key0 / kKeys;
      if (lane == 0) plan.slope_parts[place * Tile::kWarps + warp] += slope_part;
    }
  }
  __device__ __forceinline__ uint32_t kept(int key0, int query0, int head) const {
    const int64_t row = (int64_t{b} * p.heads + head) * p.seqlen_q + query0;
    return kept_scores_trans<kScores / 4>(p, static_cast<uint64_t>(row * p.seqlen_k + key0 + warp_key));
  }

  __device__ __forceinline__ void store_scores(char* tile, const uint32_t (&packed)[kScores / 8][4]) const {
#pragma unroll
    for (int i = 0; i < kScores / 8; i++) {
      stmatrix_x4(panel_chunk<kKeys>(tile, warp_key + lane % 16, group_query + 16 * i + lane / 16 * 8), packed[i]);
    }
  }

  // dQ = dS K, of which a warpgroup makes whole panels of columns and half of the one in the middle.
  static constexpr int kWholeCols = kDim / 2 / kPanelCols * kPanelCols, kHalfCols = kDim / 2 % kPanelCols;
  __device__ __forceinline__ void multiply_sums(float (&grad_q)[kDim / 4], const char* ds_tile) const {
    constexpr int kPanelBytes = kKeys * kPanelRowBytes;
    if constexpr (kWholeCols > 0) {
      multiply_depth<T, kWholeCols, kKeys>(part_of<0, kWholeCols / 2>(grad_q), ds_tile,
                                           shared.k_tile + group * ((kDim - kWholeCols) / kPanelCols * kPanelBytes));
    }
    if constexpr (kHalfCols > 0) {
      multiply_depth<T, kHalfCols, kKeys>(
          part_of<kWholeCols / 2, kHalfCols / 2>(grad_q), ds_tile,
          shared.k_tile + kWholeCols / kPanelCols * kPanelBytes + group * kHalfCols * 2);
    }
  }

  // A warp's sums lie as accumulators of consecutive columns do, so that one copy of contiguous bytes adds them.
  __device__ __forceinline__ void add_sums(const float (&grad_q)[kDim / 4], float* sums) const {
    float* warp_sums = sums + warp * (8 * kDim);
    const auto place = [&](int i) {
      // The second warpgroup's half comes before its whole panels.
      const int first = kHalfCols == 0 || kWholeCols == 0 || group == 0 ? 0
                        : i < kWholeCols / 2                            ? kHalfCols / 2
                                                                        : -kWholeCols / 2;
      return 32 * (i + first) + 4 * lane;
    };
    if constexpr (Tile::kDirect) {
#pragma unroll
      for (int i = 0; i < kDim / 4; i += 4) {
        reduce_add(warp_sums + place(i), {grad_q[i], grad_q[i + 1], grad_q[i + 2], grad_q[i + 3]});
      }
    } else {
      float* staged = shared.sums + warp * (8 * kDim);
      if (lane == 0) bulk_wait_read<0>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kDim / 4; i += 4) {
        store_vec<float, 4>(staged + place(i), {grad_q[i], grad_q[i + 1], grad_q[i + 2], grad_q[i + 3]});
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        bulk_reduce_add(warp_sums, staged, 8 * kDim * 4);
        bulk_commit();
      }
    }
  }

  // Gradients take the place of key or value, from where the warp's 16 rows go to global memory.
  __device__ __forceinline__ void store_gradient(float (&gradient)[kDim / 2], float scale, char* tile,
                                                 const AttentionTensor& target, int cols, int key0) const {
    uint32_t packed[kDim / 16][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; i++) gradient[i] *= scale;
    pack_left<T>(packed, gradient);
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
      stmatrix_x4(panel_chunk<kKeys>(tile, warp_key + lane % 16, 16 * i + lane / 16 * 8), packed[i]);
    }
    __syncwarp();
    T* rows = sequence.row<T>(p, target, b, kv_head, sequence.first_k, key0);
#pragma unroll 1
    for (int chunk = lane; chunk < 16 * kDim / 8; chunk += 32) {
      const int row = warp_key + chunk / (kDim / 8), col = chunk % (kDim / 8) * 8;
      if (row >= sequence.keys - key0) break;
      if (col < cols) {
        store_vec<T, 8>(rows + row * target.row_stride + col,
                        load_vec<T, 8>(reinterpret_cast<T*>(panel_chunk<kKeys>(tile, row, col))));
      }
    }
  }
  __device__ __forceinline__ float value_scale() const { return kPlain ? 1.0f : p.dropout_scale; }

  // Up to 128 columns: a warpgroup has both gradients of its own 64 keys.
  __device__ __forceinline__ void own_keys(const Steps& steps, int key0) {
    float grad_k[kDim / 2] = {}, grad_v[kDim / 2] = {}, scores[kScores], grads[kScores];
    const char* k_rows = shared.k_tile + group * 64 * kPanelRowBytes;
    const char* v_rows = shared.v_tile + group * 64 * kPanelRowBytes;
    if (steps.count > 0) {
      await_rows();
      wgmma_fence();
      multiply_rows<T, kDim, kKeys, kQueries>(scores, k_rows, q_tile());
      wgmma_commit();
      wgmma_wait<0>(scores);
      int left = steps.count;
      do {
        const char *q_rows = q_tile(), *g_rows = g_tile();
        const RowPair* statistics = shared.row_statistics + ring.stage * kQueries + lane % 4 * 2;
        const HopperBackwardStep& step = shared.steps[ring.stage];
        char* ds_tile = shared.score_tiles + ring.stage * Tile::kStageScoreBytes;
        uint32_t weights_left[kQueries / 16][4], grads_left[kQueries / 16][4];
        float grad_q[kDim / 4];

        wgmma_fence();
        multiply_rows<T, kDim, kKeys, kQueries>(grads, v_rows, g_rows);
        wgmma_commit();
        const int query0 = step.query0;
        if constexpr (kPlain) {
          weigh_plain(key0, query0, statistics, scores);
        } else {
          const uint32_t kept_bits = kept(key0, query0, step.head);
          wgmma_wait<0>(grads);
          weigh(key0, query0, step.head, statistics, kept_bits, scores, grads);
        }
        pack_left<T>(weights_left, scores);
        wgmma_fence();
        multiply_columns<T, kDim, kQueries>(grad_v, weights_left, g_rows);
        wgmma_commit();
        if constexpr (kPlain) {
          wgmma_wait<1>(grads);
#pragma unroll
          for (int i = 0; i < kScores; i++) grads[i] = scores[i] * (grads[i] - statistics[i / 4 * 8 + i % 2].y);
        }
        pack_left<T>(grads_left, grads);

        store_scores(ds_tile, grads_left);
        fence_proxy_async();
        wgmma_fence();
        multiply_columns<T, kDim, kQueries>(grad_k, grads_left, q_rows);
        wgmma_commit();
        float* sums = step.sums;
        all_arrive();  // dS is there, and both are done with the last dQ
        wgmma_fence();
        multiply_sums(grad_q, ds_tile);
        wgmma_commit();
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(&shared.barriers->empty[ring.stage]);
        ring.advance();
        const bool more = --left > 0;
        if (more) await_rows();
        wgmma_fence();
        multiply_rows<T, kDim, kKeys, kQueries>(scores, k_rows, more ? q_tile() : shared.k_tile);
        wgmma_commit();
        wgmma_wait<1>(grad_q);
        add_sums(grad_q, sums);
        wgmma_wait<0>(scores);
      } while (left > 0);
    }
    all_arrive();
    store_gradient(grad_k, p.scale, shared.k_tile, p.grad_key, p.head_dim, key0);
    store_gradient(grad_v, value_scale(), shared.v_tile, p.grad_value, p.value_dim, key0);
  }

  // Beyond: one has the gradient of all values, the other that of all keys.
  __device__ __forceinline__ void share_keys(const Steps& steps, int key0) {
    constexpr int kRows = 2 * kScores;  // of queries
    const bool of_values = group == 0;
    float gradient[kDim / 2] = {}, both[2 * kScores];
    auto& scores = part_of<0, kScores>(both);
    auto& grads = part_of<kScores, kScores>(both);
    // S^T = K Q^T and dP^T = V dO^T.
    const auto issue_scores = [&](const char* q_rows, const char* g_rows) {
      const int bytes = group_query * kPanelRowBytes;
      wgmma_fence();
      multiply_rows<T, kDim, kKeys, kQueries, kRows>(scores, shared.k_tile, q_rows + bytes);
      multiply_rows<T, kDim, kKeys, kQueries, kRows>(grads, shared.v_tile, g_rows + bytes);
      wgmma_commit();
    };
    if (steps.count > 0) {
      await_rows();
      issue_scores(q_tile(), g_tile());
      wgmma_wait<0>(both);
      int left = steps.count;
      do {
        const char* rows = of_values ? g_tile() : q_tile();
        const RowPair* statistics = shared.row_statistics + ring.stage * kQueries + group_query + lane % 4 * 2;
        const HopperBackwardStep& step = shared.steps[ring.stage];
        char* ds_tile = shared.score_tiles + ring.stage * Tile::kStageScoreBytes;
        char* p_tile = ds_tile + Tile::kScoreBytes;
        const int query0 = step.query0 + group_query;
        if constexpr (kPlain) {
          weigh_plain(key0, query0, statistics, scores);
#pragma unroll
          for (int i = 0; i < kScores; i++) grads[i] = scores[i] * (grads[i] - statistics[i / 4 * 8 + i % 2].y);
        } else {
          weigh(key0, query0, step.head, statistics, kept(key0, query0, step.head), scores, grads);
        }
        uint32_t packed[kScores / 8][4];
        pack_left<T>(packed, grads);
        store_scores(ds_tile, packed);
        pack_left<T>(packed, scores);
        store_scores(p_tile, packed);
        float* sums = step.sums;
        fence_proxy_async();
        all_arrive();  // dS and P are there, and both are done with those before the last
        float grad_q[kDim / 4];
        wgmma_fence();
        multiply_sums(grad_q, ds_tile);
        wgmma_commit();
        multiply_panel<T, kDim, kQueries>(gradient, of_values ? p_tile : ds_tile, rows);
        wgmma_commit();
        wgmma_wait<1>(grad_q);
        add_sums(grad_q, sums);
        Mbarrier* empty = &shared.barriers->empty[ring.stage];
        ring.advance();
        const bool more = --left > 0;
        if (more) await_rows();
        issue_scores(more ? q_tile() : shared.k_tile, more ? g_tile() : shared.v_tile);
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(empty);
        wgmma_wait<0>(both);
      } while (left > 0);
    }
    all_arrive();
    store_gradient(gradient, of_values ? value_scale() : p.scale, of_values ? shared.v_tile : shared.k_tile,
                   of_values ? p.grad_value : p.grad_key, of_values ? p.value_dim : p.head_dim, key0);
  }
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(HopperBackwardTile<kDim>::kThreads, 1)
    attention_hopper_backward_kernel(const __grid_constant__ HopperBackwardMaps maps, const AttentionBackwardParams p,
                                     const HopperBackwardPlan plan) {
  if constexpr (kHopper) {
    using Tile = HopperBackwardTile<kDim>;
    const HopperBackwardShared<kDim> shared;
    auto& barriers = *shared.barriers;
    const int copy = blockIdx.x % plan.copies;
    const int kv_head = blockIdx.x / plan.copies % p.kv_heads, b = blockIdx.x / plan.copies / p.kv_heads;
    if (threadIdx.x == 0) {
      mbarrier_init(&barriers.keys_full, 2);
      mbarrier_init(&barriers.keys_empty, Tile::kWarps);
      for (int i = 0; i < Tile::kStages; i++) {
        mbarrier_init(&barriers.full[i], 2 + 32);
        mbarrier_init(&barriers.empty[i], Tile::kWarps);
      }
      fence_barrier_init();
      *shared.work = {b, kv_head, Sequence(p, b)};
    }
    __syncthreads();
    const Sequence& sequence = shared.work->sequence;
    if (threadIdx.x < kWarpgroup) {
      set_max_registers_dec<Tile::kLoaderRegisters>();
      if (threadIdx.x < 32) load_backward_tiles<T, kDim>(maps, p, plan, sequence, b, kv_head, copy, shared);
      return;
    }
    set_max_registers_inc<Tile::kRegisters>();
    HopperBackwardConsumer<T, kDim, kPlain> consumer{p,
                                                     plan,
                                                     shared,
                                                     sequence,
                                                     Tile::kShareKeys ? shared.work->b : b,
                                                     Tile::kShareKeys ? shared.work->kv_head : kv_head};
    uint32_t turn = 0;
#pragma unroll 1
    for (int key0 = copy * Tile::kKeys; key0 < sequence.keys; key0 += plan.copies * Tile::kKeys, turn ^= 1) {
      const HopperBackwardSteps<Tile::kKeys> steps(p, sequence, key0);
      // Where keys are shared, there is no register to count turns.
      const uint32_t key_turn = Tile::kShareKeys ? key0 / (plan.copies * Tile::kKeys) % 2 : turn;
      consumer.await_keys(steps, key_turn);
      if constexpr (Tile::kShareKeys) {
        consumer.share_keys(steps, key0);
      } else {
        consumer.own_keys(steps, key0);
      }
      fence_proxy_async();  // before TMA overwrites what has been written here
      __syncwarp();
      if (consumer.lane == 0) {
        if constexpr (!Tile::kDirect) bulk_wait<0>();  // the next keys' sums come after these
        mbarrier_arrive(&barriers.keys_empty);
      }
    }
  }
}

template <class T, int kDim, bool kPlain>
int launch_hopper_tiles(const AttentionBackwardParams& p, const HopperBackwardPlan& plan, Stream stream) {
  using Tile = HopperBackwardTile<kDim>;
  const TensorCounts of_queries(p, true), of_keys(p, false);
  const HopperBackwardMaps maps{panel_map<T>(p.query, of_queries, p.head_dim, Tile::kQueries),
                                panel_map<T>(p.key, of_keys, p.head_dim, Tile::kKeys),
                                panel_map<T>(p.value, of_keys, p.value_dim, Tile::kKeys),
                                panel_map<T>(p.grad_output, of_queries, p.value_dim, Tile::kQueries)};
  return launch(attention_hopper_backward_kernel<T, kDim, kPlain>,
                attention_grid(int64_t{p.batch} * p.kv_heads * plan.copies, Tile::kThreads, Tile::kBytes, stream), maps,
                p, plan);
}

template <class T>
int hopper_backward(const AttentionBackwardParams& p, const HopperBackwardPlan& plan, Stream stream) {
  const auto with_dim = [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    const int dim = hopper_backward_dim(p);
    if (dim == 64) return launch_hopper_tiles<T, 64, kPlain>(p, plan, stream);
    if (dim == 128) return launch_hopper_tiles<T, 128, kPlain>(p, plan, stream);
    if (dim == 192) return launch_hopper_tiles<T, 192, kPlain>(p, plan, stream);
    return launch_hopper_tiles<T, 256, kPlain>(p, plan, stream);
  };
  return is_plain(p) ? with_dim(std::true_type{}) : with_dim(std::false_type{});
}

}  // namespace attention
}  // namespace bigkern
