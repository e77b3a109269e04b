// Fused attention, forward and backward. What csrc/torch sees of attention.cuh: plain C++.
#pragma once

#include "device/stream.h"
#include "kernels/element_types.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bigkern {

// A (batch, heads, rows, dim) tensor of T with unit inner stride; strides in elements.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

enum class AttentionMask { kNone, kBool, kSame, kFloat };  // kSame: numbers of type T

// What forward and backward have in common. Packed sequences: cu_seqlens are not null, `batch` counts the sequences,
// the tensors have one batch, and seqlen_q and seqlen_k are the longest lengths.
struct AttentionOptions {
  int batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, value_dim;  // all positive
  const int32_t* cu_seqlens_q;                                          // batch + 1, or null
  const int32_t* cu_seqlens_k;
  int total_q, total_k;  // rows of the packed tensors
  float scale;
  float softcap;  // 0: none
  // Query i stands at key p = i, or i + keys - queries with bottom_right, and sees keys p - window_left to
  // p + window_right; negative: no limit.
  int window_left, window_right;
  bool bottom_right;
  AttentionMask mask_kind;
  const void* mask;         // (batch, heads, seqlen_q, seqlen_k) by its strides, of which any may be 0
  int64_t mask_strides[4];  //
  const float* slopes;      // ALiBi, by head, or null
  int64_t slopes_batch_stride;
  float dropout_p;  // a weight is kept when its uniform number in (0, 1] is greater than this
  float dropout_scale;
  const int64_t* philox;  // seed and offset, or null: no dropout
};

struct AttentionForwardParams : AttentionOptions {
  AttentionTensor query, key, value, output;
  float* lse;  // batch x heads x seqlen_q; heads x total_q of packed sequences
};

enum class AttentionMaskGradient { kNone, kStore, kStoreFloat, kAddFloat };  // kStore: as T

struct AttentionBackwardParams : AttentionOptions {
  AttentionTensor query, key, value, output, grad_output;
  AttentionTensor grad_query, grad_key, grad_value;
  const float* lse;
  const float* grad_lse;  // contiguous like lse, or null
  AttentionMaskGradient mask_gradient_kind;
  void* mask_gradient;  // zero at the start
  int64_t mask_gradient_strides[4];
  float* grad_slopes;  // like slopes, contiguous, or null: not wanted
  bool deterministic;
};

// Device memory that lives until the launched work is done; zeroed if asked.
using AttentionAllocate = std::function<void*(size_t bytes, bool zero)>;

// Launch on the current device; 0, or an error code for error_string. Instances: float, __nv_bfloat16, __half.
template <class T>
int attention_forward(const AttentionForwardParams& params, Stream stream, const AttentionAllocate& allocate);

template <class T>
int attention_backward(const AttentionBackwardParams& params, Stream stream, const AttentionAllocate& allocate);

}  // namespace bigkern
