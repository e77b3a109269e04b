// Attention's backward pass on a Hopper GPU: attention.cuh's maths, by TMA and wgmma, between the same kernels for the
// rows' statistics and for grad_query.
//
// A block owns 128 keys of one key head and walks over tiles of 64 rows of all the heads that share them, so that
// grad_key and grad_value need no atomics. One warp loads. Two warpgroups own 64 keys each, with the gradients of them
// in registers. Scores are transposed (keys are the products' rows), so that P and dS are left operands from registers;
// dS goes through shared memory once, for dQ = dS K, of which each warpgroup makes half the columns:
//
//     issued    dP^T = V dO^T | dV += P^T dO | dK += dS^T Q, barrier, dQ = dS K | S^T = K Q^T of the next
//     computed  P (exp2)      | dS           | dS to shared memory (before dK)  | dQ to shared memory, bulk reduction
//
// Every product has arithmetic beside it that does not wait for it; products alone stand between dK's issue and dQ's
// end. S^T is waited for before the loop goes round: ptxas gives up (C7514) where accumulators are in flight there. A
// product too many, of the rows after the last, is issued from the keys' tile, for a product in a branch costs as much.
//
// dS has a tile for each stage, of which two suffice: the barrier before dQ tells that the other warpgroup is done with
// dQ of the rows before. A warp adds its part of dQ by a bulk reduction of its own, from its own staging memory.
// grad_query is summed in fp32: when deterministic each of a few blocks a head has a copy of the sums, whose
// reductions wait for each other from one tile of keys to the next, and the copies are added in order.
//
// What TMA cannot know: packed sequences end within a tile. The rows beyond the end, another sequence's, perhaps
// infinite, would meet weights of 0; all threads zero them before the products read them.
//
// Instances: for each of bf16 and fp16, head_dim up to 64 and 128, one with windows alone and one with every feature at
// run time, which waits for dP^T before it weighs the scores, four accumulator tiles at a time. value_dim is padded
// with head_dim to the larger one, by zeros that TMA fills in.
//
// Registers: kernels start with 168 a thread; the loading warpgroup gives up all but 24, and the others go to 240, of
// which ptxas uses 238 (head_dim 128) and 200 or 208 (64), without spilling. A thread holds head_dim/2 of each of dK
// and dV, 32 of S or dP each, 16 of P and dS as operands each, head_dim/4 of dQ.
//
// Cycles of one tile of rows, by unit, of one multiprocessor (4,096 FLOP of wgmma, 16 exp2, 128 bytes of shared memory
// a cycle), and the bytes that pass between it and L2:
//
//     head_dim   wgmma   exp2   shared memory                             L2 bytes a cycle   shared memory of a block
//           64    1280    512   1664 (208 KB: operands 144, dS and dQ 48)        20                  146 KB
//          128    2560    512   2944 (368 KB: operands 256, dS and dQ 80)        22                  193 KB
//
// So shared memory binds: 77 % and 87 % of wgmma's rate at best, before the barrier and what products alone expose.
// None of this is measured.
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

// Registers are what setmaxnreg gives a thread of the warpgroup that loads and of the two that multiply.
template <int kDim>
struct HopperBackwardTile {
  static constexpr int kKeys = kHopperBackwardKeys, kQueries = kHopperBackwardQueries;
  static constexpr int kStages = kDim == 64 ? 3 : 2;  // of query, grad_output and dS
  static constexpr int kLoaderRegisters = 24, kRegisters = 240;

  static constexpr int kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers), kWarps = 4 * kConsumers;
  static constexpr int kKeyBytes = kTileBytes<kKeys, kDim>, kQueryBytes = kTileBytes<kQueries, kDim>;
  static constexpr int kScoreBytes = kTileBytes<kKeys, kQueries>, kSumBytes = kQueries * kDim * 4;
  static constexpr int kBytes = 2 * kKeyBytes + 2 * kStages * kQueryBytes + kStages * kScoreBytes + kSumBytes +
                                kStages * static_cast<int>(kQueries * sizeof(RowPair) + sizeof(HopperBackwardStep)) +
                                128;
  static_assert(kKeys == 64 * kConsumers && kQueries == 64, "a warpgroup's products have 64 rows");
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

// The rows of all heads of a group that see any of a tile's keys, tile by tile.
struct HopperBackwardSteps {
  int keys, tiles, count;
  int first_tile;

  __device__ __forceinline__ HopperBackwardSteps(const AttentionOptions& p, const Sequence& sequence, int key0) {
    constexpr int kQueries = kHopperBackwardQueries;
    keys = min(kHopperBackwardKeys, sequence.keys - key0);
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

// The loading warp: key and value once, then query, grad_output and their statistics, a stage ahead of the products.
template <class T, int kDim>
__device__ __forceinline__ void load_backward_tiles(
    const HopperBackwardMaps& maps, const AttentionBackwardParams& p, const HopperBackwardPlan& plan,
    const Sequence& sequence, int b, int kv_head, int copy, char* k_tile, char* v_tile, char* q_tiles, char* g_tiles,
    RowPair* row_statistics, HopperBackwardStep* stages,
    HopperBackwardBarriers<HopperBackwardTile<kDim>::kStages>& barriers) {
  using Tile = HopperBackwardTile<kDim>;
  const int lane = threadIdx.x % 32, batch = p.cu_seqlens_q != nullptr ? 0 : b;
  Ring<Tile::kStages> ring;
  uint32_t turn = 0;
#pragma unroll 1
  for (int key0 = copy * Tile::kKeys; key0 < sequence.keys; key0 += plan.copies * Tile::kKeys, turn ^= 1) {
    const HopperBackwardSteps steps(p, sequence, key0);
    if (lane == 0) {
      mbarrier_wait(&barriers.keys_empty, turn ^ 1);
      load_panels<Tile::kKeys, kDim>(k_tile, maps.key, &barriers.keys_full, sequence.first_k + key0, kv_head, batch);
      load_panels<Tile::kKeys, kDim>(v_tile, maps.value, &barriers.keys_full, sequence.first_k + key0, kv_head, batch);
    }
#pragma unroll 1
    for (int step = 0; step < steps.count; step++, ring.advance()) {
      const int head = kv_head * (p.heads / p.kv_heads) + step / steps.tiles;
      const int query_tile = steps.first_tile + step % steps.tiles, query0 = query_tile * Tile::kQueries;
      Mbarrier* full = &barriers.full[ring.stage];
      mbarrier_wait(&barriers.empty[ring.stage], ring.phase ^ 1);
      if (lane == 0) {
        const int row = sequence.first_q + query0;
        load_panels<Tile::kQueries, kDim>(q_tiles + ring.stage * Tile::kQueryBytes, maps.query, full, row, head, batch);
        load_panels<Tile::kQueries, kDim>(g_tiles + ring.stage * Tile::kQueryBytes, maps.grad_output, full, row, head,
                                          batch);
        const int64_t place = ((p.deterministic ? int64_t{copy} * p.batch : 0) + b) * p.heads + head;
        stages[ring.stage] = {plan.sums + (place * plan.query_tiles + query_tile) * (Tile::kQueries * kDim), head,
                              query0, sequence.queries - query0};
      }
      const RowPair* source =
          reinterpret_cast<const RowPair*>(plan.statistics) + sequence.statistics(p, b, head) + query0;
#pragma unroll
      for (int row = lane; row < Tile::kQueries; row += 32) {
        row_statistics[ring.stage * Tile::kQueries + row] =
            query0 + row < sequence.queries ? source[row] : make_float2(INFINITY, 0.0f);
      }
      mbarrier_arrive(full);
    }
  }
}

// With features: the scores of 4 accumulator tiles from kFirst on to the dropped weights, and dP to dS by scale q . k.
// The derivatives of all 8 at once would not fit the registers.
template <class T, int kFirst, int kCount, class Hide>
__device__ __forceinline__ void weigh_scores(const AttentionBackwardParams& p, const Sequence& sequence, int b,
                                             int head, int query0, int key0, const RowPair* statistics, uint32_t kept,
                                             bool cut, Hide hide, float (&all_scores)[kCount],
                                             float (&all_grads)[kCount]) {
  constexpr int kTiles = 4;
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
      grads[i][e] = grad * derivative[i][e];
    }
  }
}

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(HopperBackwardTile<kDim>::kThreads, 1)
    attention_hopper_backward_kernel(const __grid_constant__ HopperBackwardMaps maps, const AttentionBackwardParams p,
                                     const HopperBackwardPlan plan) {
  if constexpr (kHopper) {
    using Tile = HopperBackwardTile<kDim>;
    constexpr int kKeys = Tile::kKeys, kQueries = Tile::kQueries, kScores = kQueries / 2;
    SharedMemory shared;
    char* k_tile = shared.take<char>(Tile::kKeyBytes, kAtomBytes);
    char* v_tile = shared.take<char>(Tile::kKeyBytes, kAtomBytes);
    char* q_tiles = shared.take<char>(Tile::kStages * Tile::kQueryBytes, kAtomBytes);
    char* g_tiles = shared.take<char>(Tile::kStages * Tile::kQueryBytes, kAtomBytes);
    char* ds_tiles = shared.take<char>(Tile::kStages * Tile::kScoreBytes, kAtomBytes);  // keys x queries
    float* staged_sums = shared.take<float>(kQueries * kDim, 128);
    RowPair* row_statistics = shared.take<RowPair>(Tile::kStages * kQueries);
    HopperBackwardStep* stages = shared.take<HopperBackwardStep>(Tile::kStages);
    auto& barriers = *shared.take<HopperBackwardBarriers<Tile::kStages>>(1);
    if (threadIdx.x == 0) {
      mbarrier_init(&barriers.keys_full, 2);
      mbarrier_init(&barriers.keys_empty, Tile::kWarps);
      for (int i = 0; i < Tile::kStages; i++) {
        mbarrier_init(&barriers.full[i], 2 + 32);
        mbarrier_init(&barriers.empty[i], Tile::kWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();

    const int copy = blockIdx.x % plan.copies;
    const int kv_head = blockIdx.x / plan.copies % p.kv_heads, b = blockIdx.x / plan.copies / p.kv_heads;
    const Sequence sequence(p, b);
    if (threadIdx.x < kWarpgroup) {
      set_max_registers_dec<Tile::kLoaderRegisters>();
      if (threadIdx.x < 32) {
        load_backward_tiles<T, kDim>(maps, p, plan, sequence, b, kv_head, copy, k_tile, v_tile, q_tiles, g_tiles,
                                     row_statistics, stages, barriers);
      }
      return;
    }
    set_max_registers_inc<Tile::kRegisters>();

    constexpr int kAll = 1;  // the named barrier of both consumers
    constexpr int kConsumerThreads = Tile::kConsumers * kWarpgroup;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kWarpgroup / 32, group = threadIdx.x / kWarpgroup - 1;
    const int warp_key = 16 * warp;  // of the tile
    const char* k_rows = k_tile + group * 64 * kPanelRowBytes;
    const char* v_rows = v_tile + group * 64 * kPanelRowBytes;
    const char* k_cols =
        k_tile + group * (kDim / 2) / kPanelCols * (kKeys * kPanelRowBytes) + group * (kDim / 2) % kPanelCols * 2;
    float* warp_sums = staged_sums + warp * (8 * kDim);

    float grad_k[kDim / 2], grad_v[kDim / 2], scores[kScores], grads[kScores];
    Ring<Tile::kStages> ring;
    uint32_t turn = 0;
#pragma unroll 1
    for (int key0 = copy * kKeys; key0 < sequence.keys; key0 += plan.copies * kKeys, turn ^= 1) {
      const HopperBackwardSteps steps(p, sequence, key0);
      const int warp_key0 = key0 + warp_key, group_key0 = key0 + group * 64;
#pragma unroll
      for (int i = 0; i < kDim / 2; i++) grad_k[i] = grad_v[i] = 0.0f;
      mbarrier_wait(&barriers.keys_full, turn);
      // Of packed sequences the rows behind the last are the next one's.
      if (p.cu_seqlens_q != nullptr && steps.keys < kKeys) {
        clear_rows<kKeys, kDim>(k_tile, steps.keys, threadIdx.x - kWarpgroup);
        clear_rows<kKeys, kDim>(v_tile, steps.keys, threadIdx.x - kWarpgroup);
        fence_proxy_async();
        named_barrier(kAll, kConsumerThreads);
      }
      const auto await_rows = [&] {
        mbarrier_wait(&barriers.full[ring.stage], ring.phase);
        const int rows = stages[ring.stage].rows;
        if (p.cu_seqlens_q != nullptr && rows < kQueries) {
          clear_rows<kQueries, kDim>(q_tiles + ring.stage * Tile::kQueryBytes, rows, threadIdx.x - kWarpgroup);
          clear_rows<kQueries, kDim>(g_tiles + ring.stage * Tile::kQueryBytes, rows, threadIdx.x - kWarpgroup);
          fence_proxy_async();
          named_barrier(kAll, kConsumerThreads);
        }
      };

      if (steps.count > 0) {
        await_rows();
        wgmma_fence();
        multiply_rows<T, kDim, kKeys, kQueries>(scores, k_rows, q_tiles + ring.stage * Tile::kQueryBytes);
        wgmma_commit();
        wgmma_wait<0>(scores);
        int left = steps.count;
        do {
          const char* q_tile = q_tiles + ring.stage * Tile::kQueryBytes;
          const char* g_tile = g_tiles + ring.stage * Tile::kQueryBytes;
          const RowPair* statistics = row_statistics + ring.stage * kQueries + lane % 4 * 2;
          const HopperBackwardStep& stage = stages[ring.stage];
          char* ds_tile = ds_tiles + ring.stage * Tile::kScoreBytes;
          uint32_t weights_left[kQueries / 16][4], grads_left[kQueries / 16][4];
          float grad_q[kDim / 4];

          wgmma_fence();
          multiply_rows<T, kDim, kKeys, kQueries>(grads, v_rows, g_tile);
          wgmma_commit();
          const int query0 = stage.query0;
          const bool cut = group_key0 + 64 > sequence.end_key(p, query0) ||
                           group_key0 < sequence.first_key(p, min(query0 + kQueries, sequence.queries) - 1);
          const auto hide = [&](int i, float score) {
            const int query = query0 + i / 4 * 8 + lane % 4 * 2 + i % 2, key = warp_key0 + lane / 4 + i / 2 % 2 * 8;
            return (key >= sequence.first_key(p, query)) & (key < sequence.end_key(p, query)) ? score : -INFINITY;
          };
          if constexpr (kPlain) {
            if (cut) {
#pragma unroll
              for (int i = 0; i < kScores; i++) scores[i] = hide(i, scores[i]);
            }
#pragma unroll
            for (int i = 0; i < kScores; i++) {
              scores[i] = exp2_approx(__fmaf_rn(scores[i], p.scale * kLog2e, -statistics[i / 4 * 8 + i % 2].x));
            }
          } else {
            const int64_t row = (int64_t{b} * p.heads + stage.head) * p.seqlen_q + query0;
            const uint32_t kept =
                kept_scores_trans<kScores / 4>(p, static_cast<uint64_t>(row * p.seqlen_k + warp_key0));
            wgmma_wait<0>(grads);
            const auto weigh = [&](auto first) {
              weigh_scores<T, decltype(first)::value>(p, sequence, b, stage.head, query0, warp_key0, statistics, kept,
                                                      cut, hide, scores, grads);
            };
            weigh(std::integral_constant<int, 0>{});
            weigh(std::integral_constant<int, 4>{});
          }
          pack_left<T>(weights_left, scores);
          wgmma_fence();
          multiply_columns<T, kDim, kQueries>(grad_v, weights_left, g_tile);
          wgmma_commit();
          if constexpr (kPlain) {
            wgmma_wait<1>(grads);
#pragma unroll
            for (int i = 0; i < kScores; i++) grads[i] = scores[i] * (grads[i] - statistics[i / 4 * 8 + i % 2].y);
          }
          pack_left<T>(grads_left, grads);

#pragma unroll
          for (int i = 0; i < kQueries / 16; i++) {
            stmatrix_x4(panel_chunk<kKeys>(ds_tile, warp_key + lane % 16, 16 * i + lane / 16 * 8), grads_left[i]);
          }
          fence_proxy_async();
          wgmma_fence();
          multiply_columns<T, kDim, kQueries>(grad_k, grads_left, q_tile);
          wgmma_commit();
          float* sums = stage.sums;
          named_barrier(kAll, kConsumerThreads);  // dS is there, and both are done with the last dQ
          wgmma_fence();
          multiply_depth<T, kDim / 2, kKeys>(grad_q, ds_tile, k_cols);
          wgmma_commit();
          wgmma_wait<1>();
          if (lane == 0) mbarrier_arrive(&barriers.empty[ring.stage]);
          ring.advance();
          const bool more = --left > 0;
          if (more) await_rows();
          wgmma_fence();
          multiply_rows<T, kDim, kKeys, kQueries>(scores, k_rows,
                                                  more ? q_tiles + ring.stage * Tile::kQueryBytes : k_tile);
          wgmma_commit();
          wgmma_wait<1>(grad_q);

          // A warp's sums lie as its accumulators do, so that one copy of contiguous bytes adds them.
          if (lane == 0) bulk_wait_read<0>();
          __syncwarp();
#pragma unroll
          for (int i = 0; i < kDim / 4; i += 4) {
            store_vec<float, 4>(warp_sums + 32 * i + 4 * lane,
                                {grad_q[i], grad_q[i + 1], grad_q[i + 2], grad_q[i + 3]});
          }
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) {
            bulk_reduce_add(sums + warp * (8 * kDim), warp_sums, 8 * kDim * 4);
            bulk_commit();
          }
          wgmma_wait<0>(scores);
        } while (left > 0);
      }

      // grad_key and grad_value take the place of key and value.
      named_barrier(kAll, kConsumerThreads);
      const float value_scale = kPlain ? 1.0f : p.dropout_scale;
#pragma unroll
      for (int i = 0; i < kDim / 2; i++) grad_k[i] *= p.scale, grad_v[i] *= value_scale;
      uint32_t packed[kDim / 16][4];
      const int stored_row = warp_key + lane % 16, stored_col = lane / 16 * 8;
      pack_left<T>(packed, grad_k);
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        stmatrix_x4(panel_chunk<kKeys>(k_tile, stored_row, 16 * i + stored_col), packed[i]);
      }
      pack_left<T>(packed, grad_v);
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        stmatrix_x4(panel_chunk<kKeys>(v_tile, stored_row, 16 * i + stored_col), packed[i]);
      }
      __syncwarp();
      T* grad_key = sequence.row<T>(p, p.grad_key, b, kv_head, sequence.first_k, key0);
      T* grad_value = sequence.row<T>(p, p.grad_value, b, kv_head, sequence.first_k, key0);
#pragma unroll 1
      for (int chunk = lane; chunk < 16 * kDim / 8; chunk += 32) {
        const int row = warp_key + chunk / (kDim / 8), col = chunk % (kDim / 8) * 8;
        if (row >= steps.keys) break;
        if (col < p.head_dim) {
          store_vec<T, 8>(grad_key + row * p.grad_key.row_stride + col,
                          load_vec<T, 8>(reinterpret_cast<T*>(panel_chunk<kKeys>(k_tile, row, col))));
        }
        if (col < p.value_dim) {
          store_vec<T, 8>(grad_value + row * p.grad_value.row_stride + col,
                          load_vec<T, 8>(reinterpret_cast<T*>(panel_chunk<kKeys>(v_tile, row, col))));
        }
      }
      fence_proxy_async();  // before TMA overwrites what has been written here
      __syncwarp();
      if (lane == 0) {
        bulk_wait<0>();  // the next keys' sums come after these
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
  if (hopper_backward_dim(p) == 64) {
    return is_plain(p) ? launch_hopper_tiles<T, 64, true>(p, plan, stream)
                       : launch_hopper_tiles<T, 64, false>(p, plan, stream);
  }
  return is_plain(p) ? launch_hopper_tiles<T, 128, true>(p, plan, stream)
                     : launch_hopper_tiles<T, 128, false>(p, plan, stream);
}

}  // namespace attention
}  // namespace bigkern
