// Runs attention on zeros and counts the tensor-core products that its warps issue: benchmarks/attention_counters.py
// turns the counts into its table.
#include "device/device.cuh"

#include <atomic>
#include <memory>
#include <vector>

namespace bigkern {

static std::atomic<int64_t> products{0};

inline void counted_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  products += threadIdx.x % 32 == 0;  // once a warp
  mma_m16n8k16_bf16(d, a, b);
}

}  // namespace bigkern

#define mma_m16n8k16_bf16 counted_product
#include "kernels/attention.cuh"
#undef mma_m16n8k16_bf16

// The GPU that is counted is none of those whose kernels stand in sources of their own.
namespace bigkern::attention {

template <>
int hopper_forward<__nv_bfloat16>(const AttentionForwardParams&, Stream) {
  return kErrorInvalidValue;
}

template <>
int hopper_backward<__nv_bfloat16>(const AttentionBackwardParams&, const HopperBackwardPlan&, Stream) {
  return kErrorInvalidValue;
}

}  // namespace bigkern::attention

// (batch, heads, queries or keys, head_dim) in bf16. A window's side below 0 has no limit; with dropout the kernels are
// those that serve every feature.
extern "C" int attention_counters(int batch, int heads, int kv_heads, int queries, int keys, int head_dim,
                                  int window_left, int window_right, float dropout_p, int backward, int64_t* counted) {
  using namespace bigkern;
  using T = __nv_bfloat16;
  std::vector<std::unique_ptr<char[]>> memory;
  const AttentionAllocate allocate = [&](size_t bytes, bool) -> void* {
    memory.push_back(std::make_unique<char[]>(bytes + 16));
    const auto address = reinterpret_cast<uintptr_t>(memory.back().get());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  };
  const auto tensor = [&](int64_t tensor_heads, int64_t rows) -> AttentionTensor {
    void* const data = allocate(batch * tensor_heads * rows * head_dim * sizeof(T), false);
    return {data, tensor_heads * rows * head_dim, rows * head_dim, head_dim};
  };
  const int64_t philox[2] = {1, 0};
  AttentionOptions options{};
  options.batch = batch, options.heads = heads, options.kv_heads = kv_heads;
  options.seqlen_q = options.total_q = queries;
  options.seqlen_k = options.total_k = keys;
  options.head_dim = options.value_dim = head_dim;
  options.scale = 1.0f;
  options.window_left = window_left, options.window_right = window_right;
  options.dropout_p = dropout_p;
  options.dropout_scale = 1.0f / (1.0f - dropout_p);
  options.philox = dropout_p > 0.0f ? philox : nullptr;
  const AttentionTensor query = tensor(heads, queries), key = tensor(kv_heads, keys), value = tensor(kv_heads, keys);
  const AttentionTensor output = tensor(heads, queries);
  float* const lse = static_cast<float*>(allocate(int64_t{batch} * heads * queries * sizeof(float), false));
  products = 0;
  int code = 0;
  if (backward) {
    AttentionBackwardParams p{options};
    p.query = query, p.key = key, p.value = value, p.output = output;
    p.grad_output = tensor(heads, queries);
    p.grad_query = tensor(heads, queries), p.grad_key = tensor(kv_heads, keys), p.grad_value = tensor(kv_heads, keys);
    p.lse = lse;
    code = attention_backward<T>(p, nullptr, allocate);
  } else {
    AttentionForwardParams p{options};
    p.query = query, p.key = key, p.value = value, p.output = output;
    p.lse = lse;
    code = attention_forward<T>(p, nullptr, allocate);
  }
  *counted = products;
  return code;
}
