// Attention's forward pass on a Hopper GPU: attention.cuh's maths, by TMA and wgmma.
//
// A block owns a multiprocessor and goes from one tile of queries to the next. One warpgroup loads, by one thread; two
// or three others own 64 rows each, with their output, scores and weights in registers, and share the tiles of keys and
// values. Of a tile of queries they take the keys from the last to the first, so that what the causal mask cuts comes
// first:
//
//     producer    K(n-1) Q | K(n-2) V(n-1) | K(n-3) V(n-2) | ...                              | V(0)
//     consumer    wait Q K(n-1), issue Q K(n-1)^T
//       tile j    wait its scores, free K(j) | features, mask, maximum, exp2      <- under P V(j+1), and the others'
//                 wait K(j-1) | wait P V(j+1), free V(j+1) | scale the output, P(j) to 16 bits
//                 turn | issue Q K(j-1)^T | wait V(j), issue P(j) V(j) | pass the turn
//       end       P(0) V(0), output to shared memory, TMA store
//
// The turn (named barriers) makes the warpgroups issue one after another, so that one's softmax falls under another's
// products; without it all reach their softmax together. The wait for P V stands behind the wait for the next keys,
// whose loop ends a basic block: in one block with the softmax, ptxas was seen to move that wait above the
// exponentials, which then have nothing to hide under. benchmarks/static.py looks at the shipped code for it.
//
// Rows: where queries are few, the heads that share a key head share a tile (tile_heads), so that keys and values are
// read once for all of them. Row r is query r >> shift of head r % (1 << shift): a box of the query's and the output's
// map is columns x heads x queries, and TMA fills the places beyond the last head with zeros and does not store them.
// All that depends on a row's query or head goes by its number, dropout's bits too, and is the same either way.
//
// Order: within sections of heads whose keys and values stay in the L2 cache together, the tiles with the most keys
// come first, and every other round of the grid is dealt backwards, so that no block gets the longest of each.
//
// What TMA cannot know: packed sequences end within a tile. Scores beyond the end are masked; values beyond it, another
// sequence's, perhaps NaN, would meet weights of 0 and are zeroed by the loading warp before the products may read
// them; rows of the output beyond the end are another's, so that such a tile is stored by the threads.
//
// Instances: for each of bf16 and fp16, head_dim up to 64, 128, 192, 256, one with windows alone and one with every
// feature at run time. value_dim is padded with head_dim to the larger one, by zeros that TMA fills in.
//
// Registers (65,536 of a block): kernels start with 168 or 128 a thread; the producer gives up all but 40 or 32, and
// the consumers go to 232 (two) or 160 (three). A thread holds dim/2 of output, keys/2 of scores, keys/4 of weights.
//
// Cycles of one tile of keys, by unit, of one multiprocessor (4,096 FLOP of wgmma, 16 exp2, 128 fp32
// operations, 128 bytes of shared memory a cycle; all warpgroups together), and the bytes its loads take from L2:
//
//     dim  rows x keys   wgmma   exp2   fp32   shared memory    L2 bytes a cycle    shared    registers (S + O + P)
//      64   192 x 128     1536   1152   1200         62 %              21            112 KB    64 + 32 + 32
//     128   128 x 128     2048   1024    512         62 %              32            192 KB    64 + 64 + 32
//     128   128 x 176     2816   1408    656         59 %              32            208 KB    88 + 64 + 44
//     192   128 x 96      2304    768    480         67 %              32            192 KB    48 + 96 + 24
//     256   128 x 80      2560    640    496         70 %              32            224 KB    40 + 128 + 20
//
// So all are bound by wgmma, if L2 gives 32 bytes a cycle to each multiprocessor. At dim 64 exp2 would take the 1536
// cycles of wgmma, and the fp32 lanes 672: four exponentials of 16 are polynomials there (exp2_polynomial, 11
// instructions each), which leaves a fifth of the time or more to either unit. Six would ask 1464 cycles of the fp32
// lanes. None of this is measured.
#pragma once

#include "device/device.cuh"
#include "device/hopper.cuh"
#include "kernels/attention_hopper.cuh"

#include <algorithm>
#include <cstdint>

namespace bigkern {
namespace attention {

// What a measured run chooses: keys a tile, warpgroups of 64 queries, and of 16 exponentials those that are polynomials
// on the fp32 lanes. The candidates stand in benchmarks/attention.py; all of them compile without spills.
struct HopperForwardTiling {
  int keys, consumers, exp2_on_fma;
};
constexpr HopperForwardTiling kHopperForward64 = {128, 3, 4};
constexpr HopperForwardTiling kHopperForward128 = {128, 2, 0};
constexpr HopperForwardTiling kHopperForward192 = {96, 2, 0};
constexpr HopperForwardTiling kHopperForward256 = {80, 2, 0};

// Features take more registers and make the softmax, not the products, the longer part.
constexpr HopperForwardTiling hopper_forward_tiling(int dim, bool plain) {
  if (!plain) return {dim <= 192 ? 64 : 48, 2, 0};
  return dim == 64    ? kHopperForward64
         : dim == 128 ? kHopperForward128
         : dim == 192 ? kHopperForward192
                      : kHopperForward256;
}

template <int kStages, int kConsumers>
struct HopperForwardBarriers {
  Mbarrier q_full[kConsumers], q_empty[kConsumers];
  Mbarrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Mbarrier v_tail;  // values of which rows are yet to be zeroed
};

template <int kDim, bool kPlain>
struct HopperForwardTile {
  static constexpr HopperForwardTiling kTiling = hopper_forward_tiling(kDim, kPlain);
  static constexpr int kKeys = kTiling.keys, kConsumers = kTiling.consumers, kStages = 2;
  static constexpr int kExp2OnFma = kTiling.exp2_on_fma;
  static constexpr int kRows = 64 * kConsumers, kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kQueryBytes = kTileBytes<64, kDim>, kKeyBytes = kTileBytes<kKeys, kDim>;  // of one warpgroup
  using Barriers = HopperForwardBarriers<kStages, kConsumers>;
  static constexpr int kLeastBytes = kConsumers * kQueryBytes + 2 * kStages * kKeyBytes + sizeof(Barriers);
  // The output is staged in shared memory of its own, or in the queries' where there is no room.
  static constexpr bool kOwnOutput = kLeastBytes + kConsumers * kQueryBytes <= kHopperShared;
  static constexpr int kBytes = kLeastBytes + (kOwnOutput ? kConsumers * kQueryBytes : 0);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160, kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static_assert(kBytes <= kHopperShared && kKeyBytes % kAtomBytes == 0 && kKeys % 16 == 0, "fits, in whole atoms");
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "the register file");
};

struct HopperForwardMaps {
  TensorMap query, key, value, output;
};

struct HopperForwardPlan {
  TileHeads together;  // heads that share tiles
  int tiles;           // of those heads' rows
  int section;         // heads, or groups that share tiles
  int count;           // tiles of all heads
};

// The map of a tensor of queries, to load or store in panels of 64 rows: (cols, heads that share tiles, rows, the other
// heads, batch). can_map() holds.
template <class T>
TensorMap rows_map(const AttentionTensor& x, const TensorCounts& counts, int cols, const TileHeads& together) {
  const int others = counts.heads / together.heads;
  const uint64_t dims[5] = {static_cast<uint64_t>(cols), static_cast<uint64_t>(together.heads),
                            static_cast<uint64_t>(counts.rows), static_cast<uint64_t>(others),
                            static_cast<uint64_t>(counts.batch)};
  const uint64_t strides[4] = {map_stride<T>(x.head_stride, together.heads), map_stride<T>(x.row_stride, counts.rows),
                               map_stride<T>(x.head_stride * together.heads, others),
                               map_stride<T>(x.batch_stride, counts.batch)};
  const uint32_t places = uint32_t{1} << together.shift;
  const uint32_t box[5] = {kPanelCols, places, 64 / places, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  return make_tensor_map<T>(x.data, 5, dims, strides, box, steps, 128);
}

// One tile of rows of the heads that share tiles: which keys it sees, in tiles from `first` to before `end`.
struct HopperForwardWork {
  TileHeads together;
  int b, heads, kv_head, row0, first, end;  // `heads`: which of those that share tiles
  Sequence sequence;

  template <class Tile>
  static __device__ __forceinline__ HopperForwardWork at(const AttentionForwardParams& p, const HopperForwardPlan& plan,
                                                         int number) {
    const int in_section = plan.tiles * plan.section, first_head = number / in_section * plan.section;
    const int of_batch = p.heads / plan.together.heads;
    const int place = number % in_section, heads = min(plan.section, p.batch * of_batch - first_head);
    const int head = first_head + place % heads, row0 = (plan.tiles - 1 - place / heads) * Tile::kRows;
    const int b = head / of_batch, kv_head = head % of_batch * plan.together.heads / (p.heads / p.kv_heads);
    HopperForwardWork work{plan.together, b, head % of_batch, kv_head, row0, 0, 0, Sequence(p, b)};
    if (work.some_rows()) {
      const int last = work.query(min(row0 + Tile::kRows, work.rows()) - 1);
      const int from = work.sequence.first_key(p, work.query(row0)), to = work.sequence.end_key(p, last);
      if (to > from) work.first = from / Tile::kKeys, work.end = ceil_div(to, Tile::kKeys);
    }
    return work;
  }

  __device__ __forceinline__ int rows() const { return sequence.queries << together.shift; }
  __device__ __forceinline__ int query(int row) const { return row >> together.shift; }
  // An empty place is taken for the last head's: what is read for it exists, and what it becomes is not stored.
  __device__ __forceinline__ int head(int row) const {
    return heads * together.heads + min(row & ((1 << together.shift) - 1), together.heads - 1);
  }
  __device__ __forceinline__ bool has(int row) const {
    return row < rows() && (row & ((1 << together.shift) - 1)) < together.heads;
  }

  template <class T>
  __device__ __forceinline__ T* output_row(const AttentionForwardParams& p, int row) const {
    return sequence.row<T>(p, p.output, b, head(row), sequence.first_q, query(row));
  }
  __device__ __forceinline__ float* lse(const AttentionForwardParams& p, int row) const {
    return p.lse + sequence.statistics(p, b, head(row)) + query(row);
  }

  __device__ __forceinline__ bool some_rows() const { return row0 < rows(); }
  __device__ __forceinline__ bool some_keys() const { return first < end; }
};

// The number of this block's tile in a round of the grid; at or beyond the count: no more.
__device__ __forceinline__ int64_t deal(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

template <class Tile>
struct HopperForwardShared {
  char *q, *k, *v, *output;
  typename Tile::Barriers* barriers;

  __device__ __forceinline__ HopperForwardShared() {
    SharedMemory memory;
    q = memory.take<char>(Tile::kConsumers * Tile::kQueryBytes, kAtomBytes);
    k = memory.take<char>(Tile::kStages * Tile::kKeyBytes, kAtomBytes);
    v = memory.take<char>(Tile::kStages * Tile::kKeyBytes, kAtomBytes);
    output = q;
    if constexpr (Tile::kOwnOutput) output = memory.take<char>(Tile::kConsumers * Tile::kQueryBytes, kAtomBytes);
    barriers = memory.take<typename Tile::Barriers>(1);
  }
};

// Zeros in rows from `row` on of a tile, by one warp, for products to read.
template <int kRows, int kCols>
__device__ __forceinline__ void zero_rows(void* tile, int row) {
  constexpr int kChunks = kCols / 8;
  for (int i = row * kChunks + threadIdx.x % 32; i < kRows * kChunks; i += 32) {
    *reinterpret_cast<uint4*>(panel_chunk<kRows>(tile, i / kChunks, i % kChunks * 8)) = uint4{0, 0, 0, 0};
  }
  fence_proxy_async();
}

// The producer's part, by one warp.
template <class Tile, int kDim>
__device__ __forceinline__ void load_forward(const AttentionForwardParams& p, const HopperForwardPlan& plan,
                                             const HopperForwardMaps& maps, const HopperForwardShared<Tile>& shared) {
  constexpr int kKeys = Tile::kKeys;
  auto& bars = *shared.barriers;
  const bool leader = threadIdx.x == 0, packed = p.cu_seqlens_q != nullptr;
  Ring<Tile::kStages> keys, values;
  uint32_t q_phase = 0, tail_phase = 0;
  if (leader) {
    prefetch_tensor_map(maps.key);
    prefetch_tensor_map(maps.query);
    prefetch_tensor_map(maps.value);
    prefetch_tensor_map(maps.output);
  }
  for (int64_t round = 0, number; (number = deal(round)) < plan.count; round++) {
    const auto work = HopperForwardWork::at<Tile>(p, plan, static_cast<int>(number));
    if (!work.some_keys()) continue;
    const int batch = packed ? 0 : work.b, first_k = work.sequence.first_k;
    const auto load_keys = [&](int tile) {
      if (leader) {
        mbarrier_wait(&bars.k_empty[keys.stage], keys.phase ^ 1);
        load_panels<kKeys, kDim>(shared.k + keys.stage * Tile::kKeyBytes, maps.key, &bars.k_full[keys.stage],
                                 first_k + tile * kKeys, work.kv_head, batch);
      }
      keys.advance();
    };
    const auto load_values = [&](int tile) {
      char* target = shared.v + values.stage * Tile::kKeyBytes;
      Mbarrier* full = &bars.v_full[values.stage];
      const int rows = work.sequence.keys - tile * kKeys;
      const bool tail = packed && rows < kKeys;
      if (leader) {
        mbarrier_wait(&bars.v_empty[values.stage], values.phase ^ 1);
        load_panels<kKeys, kDim>(target, maps.value, tail ? &bars.v_tail : full, first_k + tile * kKeys, work.kv_head,
                                 batch);
      }
      if (tail) {
        mbarrier_wait(&bars.v_tail, tail_phase);
        tail_phase ^= 1;
        zero_rows<kKeys, kDim>(target, rows);
        __syncwarp();
        if (leader) mbarrier_arrive(full);
      }
      values.advance();
    };
    load_keys(work.end - 1);
    if (leader) {
#pragma unroll 1
      for (int w = 0; w < Tile::kConsumers; w++) {
        mbarrier_wait(&bars.q_empty[w], q_phase ^ 1);
        load_panels<64, kDim>(shared.q + w * Tile::kQueryBytes, maps.query, &bars.q_full[w], 0,
                              work.sequence.first_q + work.query(work.row0 + 64 * w), work.heads, batch);
      }
    }
    q_phase ^= 1;
#pragma unroll 1
    for (int tile = work.end - 2; tile >= work.first; tile--) {
      load_keys(tile);
      load_values(tile + 1);
    }
    load_values(work.first);
  }
}

// Adds a tile of keys to the running softmax: scores become weights. maximum is in powers of two, already scaled by
// `factor`; sum is this thread's part; rescale is what the output so far must be multiplied by. Bit 4 i + e % 4 of
// kept says whether element e of 8-column tile i of a chunk stays.
template <class T, int kKeys, int kExp2OnFma, bool kPlain>
__device__ __forceinline__ void softmax_tile(const AttentionForwardParams& p, const HopperForwardWork& work, int row0,
                                             int key0, float factor, float (&scores)[kKeys / 2], float (&maximum)[2],
                                             float (&sum)[2], float (&rescale)[2]) {
  constexpr int kTiles = kKeys / 8;
  const int lane = threadIdx.x % 32, row = row0 + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  const Sequence& sequence = work.sequence;
  uint32_t kept = ~0u;
  if constexpr (!kPlain) {
    static_assert(kTiles <= 8, "a bit for each score");
    float derivative[1][4];
    add_features<T, kTiles, false>(
        p, sequence, work.b, tiles_of<0, kTiles>(scores), derivative, [&](int e) { return work.head(row + e / 2 * 8); },
        [&](int, int e) { return work.query(row + e / 2 * 8); },
        [&](int i, int e) { return key0 + 8 * i + lane % 4 * 2 + e % 2; });
    if (p.philox != nullptr) {
      const auto first = [&](int row) {
        const int64_t head = int64_t{work.b} * p.heads + work.head(row);
        return static_cast<uint64_t>((head * p.seqlen_q + work.query(row)) * p.seqlen_k);
      };
      kept = kept_scores<kTiles>(p, first(row), first(row + 8), key0);
    }
  }
  // Between these keys every row of the warpgroup sees every key.
  const int last = work.query(max(min(row0 + 64, work.rows()) - 1, row0));
  if (key0 < sequence.first_key(p, last) || key0 + kKeys > sequence.end_key(p, work.query(row0))) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int query = work.query(row + 8 * half);
      const int from = sequence.first_key(p, query) - key0 - lane % 4 * 2;
      const int to = sequence.end_key(p, query) - key0 - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (8 * i + e < from || 8 * i + e >= to) scores[4 * i + 2 * half + e] = -INFINITY;
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      top = fmaxf(top, fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(maximum[half], top * factor);
    const float base = top == -INFINITY ? 0.0f : top;
    rescale[half] = exp2_approx(maximum[half] - base);
    maximum[half] = top;
    float total = sum[half] * rescale[half];
    // One rounding of the product: weights, their sum and lse are those of the same maximum, whatever its own rounding.
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) {
        float& x = scores[4 * i + e];
        x = __fmaf_rn(x, factor, -base);
        // Evenly among the others, so that both units have work all along.
        const bool on_fma = (2 * i + e % 2) * kExp2OnFma % 16 < kExp2OnFma;
        x = on_fma ? exp2_polynomial(x) : exp2_approx(x);
        total += x;
        if constexpr (!kPlain) x = kept >> (4 * i + e) & 1 ? x : 0.0f;
      }
    }
    sum[half] = total;
  }
}

// A warpgroup's 64 rows of output to `stage`, and from there to memory.
template <class T, class Tile, int kDim>
__device__ __forceinline__ void store_forward(const AttentionForwardParams& p, const HopperForwardMaps& maps,
                                              const HopperForwardWork& work, int row0, char* stage, Mbarrier* q_empty,
                                              int barrier, const float (&out)[kDim / 2], const float (&inverse)[2]) {
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
  const bool leader = thread == 0, packed = p.cu_seqlens_q != nullptr;
  // The last tile's output has left the stage or, where the queries lie there, all warps have read them.
  if (Tile::kOwnOutput && leader) bulk_wait_read<0>();
  named_barrier(barrier, kWarpgroup);
#pragma unroll
  for (int i = 0; i < kDim / 8; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      char* chunk = panel_chunk<64>(stage, thread / 32 * 16 + lane / 4 + 8 * half, 8 * i);
      *reinterpret_cast<uint32_t*>(chunk + lane % 4 * 4) =
          pack_pair<T>(out[4 * i + 2 * half] * inverse[half], out[4 * i + 2 * half + 1] * inverse[half]);
    }
  }
  fence_proxy_async();
  named_barrier(barrier, kWarpgroup);
  const bool by_threads = packed && work.rows() - row0 < 64;  // the rows beyond are another sequence's
  if (by_threads) {
    constexpr int kChunks = kDim / 8;
#pragma unroll 1
    for (int i = thread; i < 64 * kChunks; i += kWarpgroup) {
      const int row = i / kChunks, col = i % kChunks * 8;
      if (!work.has(row0 + row) || col >= p.value_dim) continue;
      store_vec<T, 8>(work.output_row<T>(p, row0 + row) + col,
                      load_vec<T, 8>(reinterpret_cast<const T*>(panel_chunk<64>(stage, row, col))));
    }
    if constexpr (!Tile::kOwnOutput) named_barrier(barrier, kWarpgroup);
  }
  if (leader) {
    if (!by_threads) {
      store_panels<64, kDim>(maps.output, stage, p.value_dim, 0, work.sequence.first_q + work.query(row0), work.heads,
                             packed ? 0 : work.b);
      bulk_commit();
    }
    if constexpr (!Tile::kOwnOutput) {
      bulk_wait_read<0>();
      mbarrier_arrive(q_empty);
    }
  }
}

// A warpgroup's 64 rows where none of the tile's sees a key. Not through shared memory: the queries of the next tile
// may be on their way to where the output would be staged.
template <class T>
__device__ __forceinline__ void store_zeros(const AttentionForwardParams& p, const HopperForwardWork& work, int row0) {
  const int lane = threadIdx.x % 32, col = lane * 8;
#pragma unroll 1
  for (int row = row0 + threadIdx.x % kWarpgroup / 32; row < row0 + 64; row += 4) {
    if (!work.has(row)) continue;
    if (col < p.value_dim) store_vec<T, 8>(work.output_row<T>(p, row) + col, Vec<T, 8>{});
    if (lane == 0) *work.lse(p, row) = -INFINITY;
  }
}

// A consumer warpgroup's part.
template <class T, class Tile, int kDim, bool kPlain>
__device__ __forceinline__ void attend_forward(const AttentionForwardParams& p, const HopperForwardPlan& plan,
                                               const HopperForwardMaps& maps, const HopperForwardShared<Tile>& shared,
                                               int w) {
  constexpr int kKeys = Tile::kKeys, kConsumers = Tile::kConsumers;
  constexpr int kTurn = 1, kOwn = kTurn + kConsumers;  // named barriers: turn of a warpgroup, and its own
  auto& bars = *shared.barriers;
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
  const char* q = shared.q + w * Tile::kQueryBytes;
  const float factor = kPlain ? p.scale * kLog2e : kLog2e;
  Ring<Tile::kStages> keys, values;
  uint32_t q_phase = 0;
  if (w == kConsumers - 1) named_barrier_arrive(kTurn, 2 * kWarpgroup);  // warpgroup 0 goes first
#pragma unroll 1
  for (int64_t round = 0, number; (number = deal(round)) < plan.count; round++) {
    const auto work = HopperForwardWork::at<Tile>(p, plan, static_cast<int>(number));
    if (!work.some_rows()) continue;
    const int row0 = work.row0 + 64 * w;
    if (!work.some_keys()) {
      store_zeros<T>(p, work, row0);
      continue;
    }
    float out[kDim / 2], scores[kKeys / 2], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, rescale[2];
    uint32_t weights[kKeys / 16][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; i++) out[i] = 0.0f;
    const auto issue_scores = [&] {
      wgmma_fence();
      multiply_rows<T, kDim, 64, kKeys>(scores, q, shared.k + keys.stage * Tile::kKeyBytes);
      wgmma_commit();
    };
    const auto free_values = [&] {
      if (lane == 0) mbarrier_arrive(&bars.v_empty[values.stage]);
      values.advance();
    };
    // Scales the output and makes P of the last tile, once the product in flight no longer needs either.
    bool in_flight = false;
    const auto make_weights = [&] {
      wgmma_wait<0>(out);
      if (in_flight) free_values();
      in_flight = true;
#pragma unroll
      for (int i = 0; i < kDim / 2; i++) out[i] *= rescale[i / 2 % 2];
      pack_left<T>(weights, scores);
    };
    const auto issue_output = [&] {
      mbarrier_wait(&bars.v_full[values.stage], values.phase);
      wgmma_fence();  // again, since the wait is a loop: ptxas would add one
      multiply_columns<T, kDim, kKeys>(out, weights, shared.v + values.stage * Tile::kKeyBytes);
      wgmma_commit();
    };
    mbarrier_wait(&bars.q_full[w], q_phase);
    q_phase ^= 1;
    mbarrier_wait(&bars.k_full[keys.stage], keys.phase);
    issue_scores();
    wgmma_wait<0>(scores);
#pragma unroll 1
    for (int tile = work.end - 1;; tile--) {
      wgmma_wait<1>(scores);
      if (lane == 0) mbarrier_arrive(&bars.k_empty[keys.stage]);
      keys.advance();
      softmax_tile<T, kKeys, Tile::kExp2OnFma, kPlain>(p, work, row0, tile * kKeys, factor, scores, maximum, sum,
                                                       rescale);
      if (tile == work.first) break;
      mbarrier_wait(&bars.k_full[keys.stage], keys.phase);
      make_weights();
      named_barrier(kTurn + w, 2 * kWarpgroup);
      issue_scores();
      issue_output();
      named_barrier_arrive(kTurn + (w + 1) % kConsumers, 2 * kWarpgroup);
    }
    if (Tile::kOwnOutput && lane == 0) mbarrier_arrive(&bars.q_empty[w]);
    make_weights();
    issue_output();
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row0 + thread / 32 * 16 + lane / 4 + 8 * half;
      const float total = group_sum<4>(sum[half]);
      inverse[half] = total == 0.0f ? 0.0f : p.dropout_scale / total;
      if (lane % 4 == 0 && work.has(row)) {
        *work.lse(p, row) = total == 0.0f ? -INFINITY : maximum[half] * kLn2 + logf(total);
      }
    }
    wgmma_wait<0>(out);
    free_values();
    store_forward<T, Tile, kDim>(p, maps, work, row0, shared.output + w * Tile::kQueryBytes, &bars.q_empty[w], kOwn + w,
                                 out, inverse);
  }
  if (thread == 0) bulk_wait_read<0>();              // the block's shared memory must outlive the stores' reads
  if (w == 0) named_barrier(kTurn, 2 * kWarpgroup);  // the last turn, which no one else takes
}

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(HopperForwardTile<kDim, kPlain>::kThreads, 1)
    attention_hopper_forward_kernel(const __grid_constant__ HopperForwardMaps maps, const AttentionForwardParams p,
                                    const HopperForwardPlan plan) {
  if constexpr (kHopper) {
    using Tile = HopperForwardTile<kDim, kPlain>;
    const HopperForwardShared<Tile> shared;
    auto& bars = *shared.barriers;
    if (threadIdx.x == 0) {
      for (int w = 0; w < Tile::kConsumers; w++) {
        mbarrier_init(&bars.q_full[w], 1);
        mbarrier_init(&bars.q_empty[w], Tile::kOwnOutput ? 4 : 1);  // a warp each, or the one that stored
      }
      for (int stage = 0; stage < Tile::kStages; stage++) {
        mbarrier_init(&bars.k_full[stage], 1);
        mbarrier_init(&bars.v_full[stage], 1);
        mbarrier_init(&bars.k_empty[stage], 4 * Tile::kConsumers);
        mbarrier_init(&bars.v_empty[stage], 4 * Tile::kConsumers);
      }
      mbarrier_init(&bars.v_tail, 1);
      fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
      set_max_registers_dec<Tile::kProducerRegisters>();
      if (threadIdx.x < 32) load_forward<Tile, kDim>(p, plan, maps, shared);
    } else {
      set_max_registers_inc<Tile::kConsumerRegisters>();
      attend_forward<T, Tile, kDim, kPlain>(p, plan, maps, shared, warpgroup - 1);
    }
  } else {
    __trap();  // the launcher was told of a Hopper GPU: the build was not for sm_90a
  }
}

template <class T, int kDim, bool kPlain>
int launch_hopper_forward(const AttentionForwardParams& p, Stream stream) {
  using Tile = HopperForwardTile<kDim, kPlain>;
  constexpr int64_t kCacheBytes = 32 << 20;  // of the L2 cache, for keys and values
  HopperForwardPlan plan{};
  plan.together = tile_heads(p, Tile::kRows);
  plan.tiles = ceil_div(p.seqlen_q << plan.together.shift, Tile::kRows);
  const int64_t heads = int64_t{p.batch} * (p.heads / plan.together.heads), count = heads * plan.tiles;
  if (count > kMostBlocks) return kErrorInvalidValue;
  plan.count = static_cast<int>(count);
  const int64_t head_bytes = int64_t{p.seqlen_k} * (p.head_dim + p.value_dim) * sizeof(T);
  const int64_t section = p.heads / p.kv_heads / plan.together.heads * std::max<int64_t>(1, kCacheBytes / head_bytes);
  plan.section = static_cast<int>(std::min({section, heads, kMostBlocks / plan.tiles}));
  const TensorCounts of_queries(p, true), of_keys(p, false);
  const HopperForwardMaps maps{rows_map<T>(p.query, of_queries, p.head_dim, plan.together),
                               panel_map<T>(p.key, of_keys, p.head_dim, Tile::kKeys),
                               panel_map<T>(p.value, of_keys, p.value_dim, Tile::kKeys),
                               rows_map<T>(p.output, of_queries, p.value_dim, plan.together)};
  const int64_t blocks = std::min<int64_t>(count, std::max(1, multiprocessor_count()));
  return launch(attention_hopper_forward_kernel<T, kDim, kPlain>,
                attention_grid(blocks, Tile::kThreads, Tile::kBytes, stream), maps, p, plan);
}

template <class T>
int hopper_forward(const AttentionForwardParams& p, Stream stream) {
  const auto with_dim = [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    const int dim = std::max(p.head_dim, p.value_dim);
    if (dim <= 64) return launch_hopper_forward<T, 64, kPlain>(p, stream);
    if (dim <= 128) return launch_hopper_forward<T, 128, kPlain>(p, stream);
    if (dim <= 192) return launch_hopper_forward<T, 192, kPlain>(p, stream);
    return launch_hopper_forward<T, 256, kPlain>(p, stream);
  };
  return is_plain(p) ? with_dim(std::true_type{}) : with_dim(std::false_type{});
}

}  // namespace attention
}  // namespace bigkern
