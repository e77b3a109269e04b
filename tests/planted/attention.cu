// The entry point through which the planted-bug trials call the attention kernels, emulated.
#include "kernels/attention.cuh"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

// fp32, one head, head_dim up to 64 (one instance compiles fast): the forward pass, then the backward pass on what it
// saved. 0, or an error code whose message lands in `error`.
extern "C" int run_attention(const float* query, const float* key, const float* value, const float* grad_output,
                             float* output, float* grad_query, float* grad_key, float* grad_value, float* grad_slope,
                             int queries, int keys, int dim, int causal, float slope, float dropout_p, int64_t seed,
                             int64_t offset, char* error, int size) {
  const auto rows = [dim](const float* data) { return bigkern::AttentionTensor{const_cast<float*>(data), 0, 0, dim}; };
  std::vector<float> lse(queries);
  const int64_t philox[2] = {seed, offset};
  std::vector<std::unique_ptr<char[]>> workspace;
  const bigkern::AttentionAllocate allocate = [&](size_t bytes, bool zero) -> void* {
    workspace.push_back(std::make_unique<char[]>(bytes));
    std::memset(workspace.back().get(), zero ? 0 : 0xff, bytes);  // NaN: unwritten workspace must show
    return workspace.back().get();
  };
  bigkern::AttentionForwardParams forward{};
  forward.batch = forward.heads = forward.kv_heads = 1;
  forward.seqlen_q = queries;
  forward.seqlen_k = keys;
  forward.head_dim = forward.value_dim = dim;
  forward.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  forward.window_left = -1;
  forward.window_right = causal ? 0 : -1;
  forward.dropout_p = dropout_p;
  forward.dropout_scale = 1.0f / (1.0f - dropout_p);
  forward.philox = dropout_p > 0 ? philox : nullptr;
  forward.slopes = &slope;
  forward.query = rows(query);
  forward.key = rows(key);
  forward.value = rows(value);
  forward.output = rows(output);
  forward.lse = lse.data();
  int code = bigkern::attention::launch_forward<float, 64, false>(forward, nullptr, allocate);
  bigkern::AttentionBackwardParams backward{};
  static_cast<bigkern::AttentionOptions&>(backward) = forward;
  backward.query = forward.query;
  backward.key = forward.key;
  backward.value = forward.value;
  backward.output = forward.output;
  backward.grad_output = rows(grad_output);
  backward.grad_query = rows(grad_query);
  backward.grad_key = rows(grad_key);
  backward.grad_value = rows(grad_value);
  backward.lse = lse.data();
  backward.grad_slopes = grad_slope;
  if (code == 0) code = bigkern::attention::launch_backward<float, 64, false>(backward, nullptr, allocate);
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}
