// What attention's Hopper kernels share, forward and backward: how rows of a head come to shared memory by TMA, and how
// wgmma multiplies them there.
//
// A tile of rows lies as panels of 64 columns, one behind the other: row r of a panel is 128 bytes at 128 r, swizzled
// over 128 bytes. One panel is one TMA box of a (cols, rows, heads, batch) map, which fills columns and rows beyond the
// tensor with zeros; a map whose panels were a dimension of their own would load a tile in one instruction, but read
// the next head's columns where head_dim is not a multiple of 64. Both products read the same tile: with its rows as
// the product's (K-major) or as its depth (MN-major).
#pragma once

#include "device/hopper.cuh"
#include "kernels/attention_hopper.h"
#include "kernels/attention_scores.cuh"

#include <cstdint>

namespace bigkern {
namespace attention {

constexpr int kPanelCols = 64, kPanelRowBytes = 128, kWarpgroup = 128;
constexpr uint32_t kAtomBytes = 1024;     // 8 rows of a panel, after which the swizzle repeats
constexpr int kHopperShared = 227 << 10;  // what a block may have

template <int kRows, int kCols>
constexpr int kTileBytes = kRows * kCols * 2;

// The stride of a tensor map's dimension in bytes; of one element it is never used, and may be 0 in the tensor.
template <class T>
uint64_t map_stride(int64_t stride, int count) {
  return count == 1 ? uint64_t{16} : static_cast<uint64_t>(stride) * sizeof(T);
}

// The map of a tensor `cols` wide, to load or store in panels of box_rows rows (at most 256). can_map() holds.
template <class T>
TensorMap panel_map(const AttentionTensor& x, const TensorCounts& counts, int cols, int box_rows) {
  const uint64_t dims[4] = {static_cast<uint64_t>(cols), static_cast<uint64_t>(counts.rows),
                            static_cast<uint64_t>(counts.heads), static_cast<uint64_t>(counts.batch)};
  const uint64_t strides[3] = {map_stride<T>(x.row_stride, counts.rows), map_stride<T>(x.head_stride, counts.heads),
                               map_stride<T>(x.batch_stride, counts.batch)};
  const uint32_t box[4] = {kPanelCols, static_cast<uint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return make_tensor_map<T>(x.data, 4, dims, strides, box, steps, 128);
}

// A place in a ring of kStages stages, and the parity of the barriers' phase there.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// By one thread: kCols / 64 panels of kRows rows from a place on, which is the map's coordinates after the column: row,
// head, batch. The whole tile's bytes are counted on `barrier`.
template <int kRows, int kCols, class... Place>
__device__ __forceinline__ void load_panels(void* tile, const TensorMap& map, Mbarrier* barrier, Place... place) {
  mbarrier_arrive_expect_tx(barrier, kTileBytes<kRows, kCols>);
#pragma unroll
  for (int col = 0; col < kCols; col += kPanelCols) {
    tma_load(static_cast<char*>(tile) + col * kRows * 2, map, barrier, {col, place...});
  }
}

// By one thread, which commits: the panels of kRows rows, those that lie beyond `cols` left out.
template <int kRows, int kCols, class... Place>
__device__ __forceinline__ void store_panels(const TensorMap& map, const void* tile, int cols, Place... place) {
#pragma unroll
  for (int col = 0; col < kCols; col += kPanelCols) {
    if (col < cols) tma_store(map, static_cast<const char*>(tile) + col * kRows * 2, {col, place...});
  }
}

// The 16 bytes from column `col`, a multiple of 8, of row `row` on, in a tile of kRows rows; the tile begins at a
// multiple of kAtomBytes.
template <int kRows>
__device__ __forceinline__ char* panel_chunk(void* tile, int row, int col) {
  return static_cast<char*>(tile) + col / kPanelCols * kRows * kPanelRowBytes + row * kPanelRowBytes +
         ((col % kPanelCols / 8 ^ row % 8) << 4);
}

// Issues scores = a b^T over kDim columns. `a` is the first of 64 rows (a multiple of 64) of a tile of kRowsA rows, `b`
// the first of kRows rows (a multiple of 8) of a tile of kRowsB rows.
template <class T, int kDim, int kRowsA, int kRowsB, int kRows = kRowsB>
__device__ __forceinline__ void multiply_rows(float (&scores)[kRows / 2], const void* a, const void* b) {
  const uint64_t left = wgmma_descriptor(a, 0, kAtomBytes, 128), right = wgmma_descriptor(b, 0, kAtomBytes, 128);
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    const int panel = k / kPanelCols, bytes = k % kPanelCols * 2;
    // A descriptor counts 16 bytes.
    wgmma_ss<T, kRows>(scores, left + (panel * kRowsA * kPanelRowBytes + bytes) / 16,
                       right + (panel * kRowsB * kPanelRowBytes + bytes) / 16, k > 0);
  }
}

// Issues sums += a b: `a` in registers, 64 x kDepth; `b` a tile of kDepth rows, kCols columns from the start of one of
// its panels on.
template <class T, int kCols, int kDepth>
__device__ __forceinline__ void multiply_columns(float (&sums)[kCols / 2], const uint32_t (&a)[kDepth / 16][4],
                                                 const void* b) {
  const uint64_t right = wgmma_descriptor(b, kDepth * kPanelRowBytes, kAtomBytes, 128);
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    wgmma_rs<T, kCols, true>(sums, a[k], right + k * 16 * kPanelRowBytes / 16, true);
  }
}

// Accumulators as the left operand of the next product.
template <class T, int kCount>
__device__ __forceinline__ void pack_left(uint32_t (&a)[kCount / 8][4], const float (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) {
    a[i / 4][i % 4] = pack_pair<T>(accumulators[2 * i], accumulators[2 * i + 1]);
  }
}

// Columns 8 kFirst on of wgmma's accumulators in the form that attention_scores.cuh knows.
template <int kFirst, int kTiles, int kCount>
__device__ __forceinline__ float (&tiles_of(float (&accumulators)[kCount])) [kTiles][4] {
  static_assert(4 * (kFirst + kTiles) <= kCount, "within the accumulators");
  return reinterpret_cast<float (&)[kTiles][4]>(accumulators[4 * kFirst]);
}

}  // namespace attention
}  // namespace bigkern
