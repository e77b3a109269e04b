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

// 0, or an error code for error_string. Instances: __nv_bfloat16, __half.
template <class T>
int hopper_forward(const AttentionForwardParams& params, Stream stream);

}  // namespace attention
}  // namespace bigkern
