// The entry point through which the planted-bug trials call the decoding kernels, emulated.
#include "kernels/attention_decode.cuh"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace {

// One key head and one batch element, head_dim up to 64.
template <class Element, bool kTma>
int run(const Element* query, Element* key_cache, Element* value_cache, const Element* key, const Element* value,
        Element* output, int heads, int queries, int capacity, int length, int seqlen_new, int dim, int splits,
        char* error, int size) {
  const auto rows = [dim](const Element* data, int count) {
    return bigkern::AttentionTensor{const_cast<Element*>(data), 0, int64_t{count} * dim, dim};
  };
  std::vector<float> lse(heads * queries);
  std::vector<std::unique_ptr<char[]>> workspace;
  const int64_t lengths[1] = {length};
  bigkern::AttentionDecodeParams p{};
  p.batch = p.kv_heads = 1;
  p.heads = heads;
  p.seqlen_q = queries;
  p.seqlen_new = seqlen_new;
  p.capacity = capacity;
  p.head_dim = p.value_dim = dim;
  p.query = rows(query, queries);
  p.output = rows(output, queries);
  p.key_cache = rows(key_cache, capacity);
  p.value_cache = rows(value_cache, capacity);
  p.key = rows(key, seqlen_new);
  p.value = rows(value, seqlen_new);
  p.lse = lse.data();
  p.lengths = {lengths, true};
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.window_left = -1;
  p.window_right = 0;
  p.splits = splits;
  const int code = bigkern::attention::launch_decode_tiled<Element, 64, kTma>(p, nullptr, [&](size_t bytes) -> void* {
    workspace.push_back(std::make_unique<char[]>(bytes));
    std::memset(workspace.back().get(), 0xff, bytes);  // NaN: unwritten workspace must show
    return workspace.back().get();
  });
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}

}  // namespace

// Copied rings in fp32, and TMA's in bf16: an instance of each. 0, or an error code whose message lands in `error`.
extern "C" int run_attention_decode(const float* query, float* key_cache, float* value_cache, const float* key,
                                    const float* value, float* output, int heads, int queries, int capacity, int length,
                                    int seqlen_new, int dim, int splits, char* error, int size) {
  return run<float, false>(query, key_cache, value_cache, key, value, output, heads, queries, capacity, length,
                           seqlen_new, dim, splits, error, size);
}

extern "C" int run_attention_decode_hopper(const __nv_bfloat16* query, __nv_bfloat16* key_cache,
                                           __nv_bfloat16* value_cache, const __nv_bfloat16* key,
                                           const __nv_bfloat16* value, __nv_bfloat16* output, int heads, int queries,
                                           int capacity, int length, int seqlen_new, int dim, int splits, char* error,
                                           int size) {
  return run<__nv_bfloat16, true>(query, key_cache, value_cache, key, value, output, heads, queries, capacity, length,
                                  seqlen_new, dim, splits, error, size);
}
