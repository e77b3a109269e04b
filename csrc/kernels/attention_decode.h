// Attention of a few queries over a cache, which new rows join. What csrc/torch sees of attention_decode.cuh: plain
// C++.
#pragma once

#include "device/stream.h"
#include "kernels/attention.h"
#include "kernels/element_types.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bigkern {

// A row number for each batch element, of 32 or 64 bits; without data all have the same.
struct AttentionRows {
  const void* data;
  bool wide;
};

struct AttentionDecodeParams {
  int batch, heads, kv_heads, seqlen_q, capacity, head_dim, value_dim;  // all positive
  int seqlen_new;                                                       // rows of key and value; may be 0
  AttentionTensor query, output;                                        // (batch, heads, seqlen_q, dim)
  AttentionTensor key_cache, value_cache;                               // (batch, kv_heads, capacity, dim)
  AttentionTensor key, value;                                           // (batch, kv_heads, seqlen_new, dim)
  float* lse;                                                           // batch x heads x seqlen_q
  AttentionRows lengths;  // rows in use before the append; all of them have the capacity without
  AttentionRows starts;   // first row in use; 0 without
  float scale;
  float softcap;  // 0: none
  // Query i stands at row p = rows in use - seqlen_q + i and sees rows p - window_left to p + window_right; negative:
  // no limit.
  int window_left, window_right;
  const float* slopes;  // ALiBi, by head, or null
  int64_t slopes_batch_stride;
  int splits;  // parts of each sequence; 0: enough to fill the GPU
};

// Launch on the current device; 0, or an error code for error_string. Instances: float, __nv_bfloat16, __half.
// `allocate` gives device memory that lives until the launched work is done.
template <class T>
int attention_decode_forward(const AttentionDecodeParams& params, Stream stream,
                             const std::function<void*(size_t bytes)>& allocate);

}  // namespace bigkern
