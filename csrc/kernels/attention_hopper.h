// Attention on a Hopper GPU's TMA and wgmma: what the launchers of attention.cuh need to know. Plain C++.
#pragma once

#include "kernels/attention.h"

#include <cstdint>

namespace bigkern {
namespace attention {

// What a tensor of queries or of keys has of each, packed or not.
struct TensorCounts {
  int batch, heads, rows;

  TensorCounts(const AttentionOptions& p, bool of_queries) {
    const bool packed = p.cu_seqlens_q != nullptr;
    batch = packed ? 1 : p.batch;
    heads = of_queries ? p.heads : p.kv_heads;
    rows = of_queries ? (packed ? p.total_q : p.seqlen_q) : (packed ? p.total_k : p.seqlen_k);
  }
};

// Whether TMA reaches every row of a 16-bit tensor: rows, heads and batches at multiples of 16 bytes, and none of them
// repeated (a stride of 0, as expanded tensors have, is no stride of a tensor map).
inline bool can_map(const AttentionTensor& x, const TensorCounts& counts) {
  const auto reaches = [](int64_t stride, int count) {
    return count == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && reaches(x.row_stride, counts.rows) &&
         reaches(x.head_stride, counts.heads) && reaches(x.batch_stride, counts.batch);
}

// The query heads whose rows share a tile: row r is query r >> shift of head r % (1 << shift) among them. Where `heads`
// is no power of two, the places beyond it stay empty.
struct TileHeads {
  int heads, shift;
};

// Which heads share a tile of `rows` rows: all of a key head's, where that makes fewer tiles by a tenth, since each
// tile reads the keys and values once; else one. So they do where queries are few: of 16 queries each, 8 heads fill one
// tile of 128 rows instead of an eighth of 8. Long sequences fill their tiles alone, and would only lose the empty
// places.
inline TileHeads tile_heads(const AttentionOptions& p, int64_t rows) {
  constexpr int kMostShift = 6;          // 64 rows of a warpgroup are one query's at most
  constexpr int kMostQueries = 1 << 24;  // rows are numbers of 32 bits
  const int group = p.heads / p.kv_heads;
  int shift = 0;
  while (1 << shift < group && shift <= kMostShift) shift++;
  if (shift == 0 || shift > kMostShift || p.seqlen_q > kMostQueries) return {1, 0};
  // Twice the tiles of a key head; a packed sequence, whose length is not known here, leaves half of its last one
  // empty.
  const auto tiles = [&](int64_t places) {
    if (p.cu_seqlens_q != nullptr) return int64_t{2} * p.total_q * places / rows + p.batch;
    return int64_t{2} * p.batch * ((p.seqlen_q * places + rows - 1) / rows);
  };
  if (10 * tiles(1 << shift) > 9 * group * tiles(1)) return {1, 0};
  return {group, shift};
}

// 0, or an error code for error_string. Instances: __nv_bfloat16, __half.
template <class T>
int hopper_forward(const AttentionForwardParams& params, Stream stream);

}  // namespace attention
}  // namespace bigkern
