// The entry point through which the planted-bug trials call the Hopper attention kernels, emulated.
#include "kernels/attention_hopper_forward.cuh"

#include <cstring>

// bf16, head_dim 64 without features (one instance compiles fast), tensors of (heads or kv_heads, rows, 64); packed
// sequences where `sequences` > 0. 0, or an error code whose message lands in `error`.
extern "C" int run_attention_hopper(const void* query, const void* key, const void* value, void* output, float* lse,
                                    const int32_t* cu_q, const int32_t* cu_k, int sequences, int heads, int kv_heads,
                                    int queries, int keys, int causal, char* error, int size) {
  using namespace bigkern;
  const auto rows = [](const void* data, int count) {
    return AttentionTensor{const_cast<void*>(data), 0, int64_t{64} * count, 64};
  };
  AttentionForwardParams p{};
  p.batch = sequences > 0 ? sequences : 1;
  p.heads = heads, p.kv_heads = kv_heads;
  p.seqlen_q = p.total_q = queries;
  p.seqlen_k = p.total_k = keys;
  p.head_dim = p.value_dim = 64;
  p.cu_seqlens_q = sequences > 0 ? cu_q : nullptr;
  p.cu_seqlens_k = sequences > 0 ? cu_k : nullptr;
  p.scale = 0.125f;
  p.window_left = -1;
  p.window_right = causal ? 0 : -1;
  p.bottom_right = true;
  p.dropout_scale = 1.0f;
  p.query = rows(query, queries);
  p.key = rows(key, keys);
  p.value = rows(value, keys);
  p.output = rows(output, queries);
  p.lse = lse;
  const int code = attention::launch_hopper_forward<__nv_bfloat16, 64, true>(p, nullptr);
  if (code != 0) std::strncpy(error, error_string(code), size - 1);
  return code;
}
