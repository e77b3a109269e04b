// Attention's backward pass on a Hopper GPU: what the launcher of attention.cuh needs to know. Plain C++.
#pragma once

#include "kernels/attention.h"

namespace bigkern {
namespace attention {

// Keys a block works on, by the columns of their tiles, and queries it takes at a time.
constexpr int hopper_backward_keys(int dim) {
  return dim <= 128 ? 128 : 64;
}
constexpr int kHopperBackwardQueries = 64;
constexpr int kHopperBackwardWarps = 8;  // that multiply

// As BackwardPlan of attention.cuh: `copies` blocks share a head's keys, each turn about, and their sums of grad_query
// lie behind each other when deterministic. A tile's sums: warp, four elements of an accumulator, lane, element.
struct HopperBackwardPlan {
  int query_tiles, key_tiles, copies;
  const float* statistics;  // lse (in powers of two for the plain kernel) and delta of every row
  float* sums;
  float* slope_parts;  // of each sequence and head: tile of keys, of kHopperBackwardWarps warps
};

// Columns of the tiles: head_dim and value_dim padded to 64, 128, 192 or 256.
inline int hopper_backward_dim(const AttentionOptions& p) {
  return ((p.head_dim > p.value_dim ? p.head_dim : p.value_dim) + 63) / 64 * 64;
}

// 0, or an error code for error_string. Instances: __nv_bfloat16, __half.
template <class T>
int hopper_backward(const AttentionBackwardParams& params, const HopperBackwardPlan& plan, Stream stream);

}  // namespace attention
}  // namespace bigkern
