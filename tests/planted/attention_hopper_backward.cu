// The entry point through which the planted-bug trials call attention's backward kernel for Hopper, emulated.
#include "kernels/attention_hopper_backward.cuh"

#include <cstring>

// The tiles' columns; see VARIANTS in test_planted_bugs.py.
#ifndef BK_TILE_COLS
#define BK_TILE_COLS 64
#endif

// bf16, head_dim up to the tiles' columns, from the rows' statistics to the sums of grad_query, which are zero: tensors
// of (heads, rows, dim), one key head; packed sequences where `sequences` > 0; with dropout the kernel that serves
// every feature. 0, or an error code whose message lands in `error`.
extern "C" int run_attention_hopper_backward(const void* query, const void* key, const void* value,
                                             const void* grad_output, const float* statistics, float* sums,
                                             void* grad_key, void* grad_value, const int32_t* cu_q, const int32_t* cu_k,
                                             int sequences, int heads, int queries, int keys, int dim, int causal,
                                             int copies, int longest_q, int longest_k, float dropout_p, int64_t seed,
                                             int64_t offset, char* error, int size) {
  using namespace bigkern;
  const auto rows = [dim](const void* data, int count) {
    return AttentionTensor{const_cast<void*>(data), 0, int64_t{dim} * count, dim};
  };
  const int64_t philox[2] = {seed, offset};
  AttentionBackwardParams p{};
  p.batch = sequences > 0 ? sequences : 1;
  p.heads = heads;
  p.kv_heads = 1;
  p.seqlen_q = longest_q;
  p.seqlen_k = longest_k;
  p.total_q = queries;
  p.total_k = keys;
  p.head_dim = p.value_dim = dim;
  p.cu_seqlens_q = sequences > 0 ? cu_q : nullptr;
  p.cu_seqlens_k = sequences > 0 ? cu_k : nullptr;
  p.scale = 0.125f;
  p.window_left = -1;
  p.window_right = causal ? 0 : -1;
  p.dropout_p = dropout_p;
  p.dropout_scale = 1.0f / (1.0f - dropout_p);
  p.philox = dropout_p > 0 ? philox : nullptr;
  p.query = rows(query, queries);
  p.key = rows(key, keys);
  p.value = rows(value, keys);
  p.grad_output = rows(grad_output, queries);
  p.grad_key = rows(grad_key, keys);
  p.grad_value = rows(grad_value, keys);
  p.deterministic = true;
  const int query_tiles = ceil_div(longest_q, attention::kHopperBackwardQueries);
  const int key_tiles = ceil_div(longest_k, attention::hopper_backward_keys(BK_TILE_COLS));
  const attention::HopperBackwardPlan plan{query_tiles, key_tiles, copies, statistics, sums, nullptr};
  const int code = dropout_p > 0 ? attention::launch_hopper_tiles<__nv_bfloat16, BK_TILE_COLS, false>(p, plan, nullptr)
                                 : attention::launch_hopper_tiles<__nv_bfloat16, BK_TILE_COLS, true>(p, plan, nullptr);
  if (code != 0) std::strncpy(error, error_string(code), size - 1);
  return code;
}
