// Registers decoding's raw op; its schema is in bigkern/ops/attention_decode/_schema.py.
#include "kernels/attention_decode.h"
#include "torch/common.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>

namespace bigkern {
namespace {

using binding::DeviceScope;
using binding::refuse;
using binding::ScalarType;
using binding::Tensor;
using torch::stable::new_empty;

constexpr const char* kOp = "attention_decode_forward";
constexpr int64_t kMaxHeadDim = 256, kMaxSplits = 1024;
constexpr int64_t kMost = std::numeric_limits<int>::max() / 4;

void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  if (tensor.is_cuda() != like.is_cuda() || tensor.get_device_index() != like.get_device_index()) {
    refuse(kOp, ": ", name, " is ", binding::describe(tensor), "; expected the device of query, ",
           binding::describe(like));
  }
}

// (batch, heads, rows, dim) of the query's dtype with unit inner stride, as the kernels see it.
AttentionTensor view(const char* name, const Tensor& tensor, const Tensor& query, int64_t heads, int64_t rows,
                     int64_t dim) {
  check_device(name, tensor, query);
  if (tensor.scalar_type() != query.scalar_type() || tensor.dim() != 4 || tensor.size(0) != query.size(0) ||
      tensor.size(1) != heads || tensor.size(2) != rows || tensor.size(3) != dim) {
    refuse(kOp, ": ", name, " is ", binding::describe(tensor), "; expected ",
           torch::headeronly::toString(query.scalar_type()), " [", query.size(0), ", ", heads, ", ", rows, ", ", dim,
           "]");
  }
  if (dim > 1 && tensor.numel() > 0 && tensor.stride(3) != 1) {
    refuse(kOp, ": ", name, " has inner stride ", tensor.stride(3), "; expected 1: pass a contiguous tensor");
  }
  // Of a dimension of one element torch may report any stride.
  const auto stride = [&](int64_t i) { return tensor.size(i) > 1 ? tensor.stride(i) : 0; };
  return {const_cast<void*>(tensor.const_data_ptr()), stride(0), stride(1), stride(2)};
}

AttentionRows row_numbers(const char* name, const std::optional<Tensor>& rows, const Tensor& query) {
  if (!rows) return {nullptr, false};
  check_device(name, *rows, query);
  const ScalarType dtype = rows->scalar_type();
  if ((dtype != ScalarType::Int && dtype != ScalarType::Long) || rows->dim() != 1 || rows->size(0) != query.size(0) ||
      !rows->is_contiguous()) {
    refuse(kOp, ": ", name, " is ", binding::describe(*rows), "; expected a contiguous Int or Long [", query.size(0),
           "]");
  }
  return {rows->const_data_ptr(), dtype == ScalarType::Long};
}

int narrow(const char* name, int64_t value) {
  if (value > kMost) refuse(kOp, ": ", name, " is ", value, "; supported are up to ", kMost);
  return static_cast<int>(value);
}

int window_side(int64_t side) {
  return side < 0 ? -1 : static_cast<int>(std::min(side, kMost));
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                   const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                                   const std::optional<Tensor>& cache_seqlens,
                                   const std::optional<Tensor>& cache_starts, const std::optional<Tensor>& alibi_slopes,
                                   int64_t window_left, int64_t window_right, double softcap, double scale,
                                   int64_t splits) {
  if (query.dim() != 4 || key_cache.dim() != 4 || value_cache.dim() != 4) {
    refuse(kOp, ": query is ", binding::describe(query), ", key_cache ", binding::describe(key_cache), ", value_cache ",
           binding::describe(value_cache), "; expected four dimensions");
  }
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), head_dim = query.size(3);
  const int64_t kv_heads = key_cache.size(1), capacity = key_cache.size(2), value_dim = value_cache.size(3);
  AttentionDecodeParams params{};
  params.query = view("query", query, query, heads, seqlen_q, head_dim);
  params.key_cache = view("key_cache", key_cache, query, kv_heads, capacity, head_dim);
  params.value_cache = view("value_cache", value_cache, query, kv_heads, capacity, value_dim);
  // Nothing to append to either where one is missing; the kernel's lengths would be those without it.
  if (key.has_value() != value.has_value()) refuse(kOp, ": key and value go together");
  if (key) {
    if (!cache_seqlens) refuse(kOp, ": cache_seqlens is missing; key goes behind the rows it counts");
    const int64_t seqlen_new = key->dim() == 4 ? key->size(2) : 0;
    params.key = view("key", *key, query, kv_heads, seqlen_new, head_dim);
    params.value = view("value", *value, query, kv_heads, seqlen_new, value_dim);
    params.seqlen_new = narrow("seqlen_new", seqlen_new);
  }
  if (head_dim > kMaxHeadDim || value_dim > kMaxHeadDim) {
    refuse(kOp, ": head_dim is ", head_dim, " and the value's ", value_dim, "; supported are up to ", kMaxHeadDim);
  }
  if (query.numel() == 0 || key_cache.numel() == 0 || value_cache.numel() == 0) {
    refuse(kOp, ": query is ", binding::describe(query), ", key_cache ", binding::describe(key_cache), ", value_cache ",
           binding::describe(value_cache), "; expected elements in each");
  }
  if (heads % kv_heads != 0) {
    refuse(kOp, ": query has ", heads, " heads and key_cache ", kv_heads,
           "; the first must be a multiple of the second");
  }
  if (splits < 0 || splits > kMaxSplits) refuse(kOp, ": splits is ", splits, "; expected 0 to ", kMaxSplits);
  params.lengths = row_numbers("cache_seqlens", cache_seqlens, query);
  params.starts = row_numbers("cache_starts", cache_starts, query);
  if (alibi_slopes) {
    const Tensor& slopes = *alibi_slopes;
    check_device("alibi_slopes", slopes, query);
    const bool by_batch = slopes.dim() == 2;
    if (slopes.scalar_type() != ScalarType::Float || slopes.dim() < 1 || slopes.dim() > 2 ||
        slopes.size(slopes.dim() - 1) != heads || (by_batch && slopes.size(0) != batch) || !slopes.is_contiguous()) {
      refuse(kOp, ": alibi_slopes is ", binding::describe(slopes), "; expected a contiguous Float [", heads, "] or [",
             batch, ", ", heads, "]");
    }
    params.slopes = static_cast<const float*>(slopes.const_data_ptr());
    params.slopes_batch_stride = by_batch ? heads : 0;
  }
  params.batch = narrow("batch", batch);
  params.heads = narrow("heads", heads);
  params.kv_heads = narrow("kv_heads", kv_heads);
  params.seqlen_q = narrow("seqlen_q", seqlen_q);
  params.capacity = narrow("capacity", capacity);
  params.head_dim = static_cast<int>(head_dim);
  params.value_dim = static_cast<int>(value_dim);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.window_left = window_side(window_left);
  params.window_right = window_side(window_right);
  params.splits = static_cast<int>(splits);

  Tensor output = torch::stable::transpose(new_empty(query, {batch, seqlen_q, heads, value_dim}), 1, 2);
  Tensor lse = new_empty(query, {batch, heads, seqlen_q}, ScalarType::Float);
  params.output = view("output", output, query, heads, seqlen_q, value_dim);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  const DeviceScope device(query);
  binding::Workspace workspace(query);
  const int code = binding::dispatch_type(kOp, query.scalar_type(), [&](auto type) {
    return attention_decode_forward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {output, lse};
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("attention_decode_forward", TORCH_BOX(&bigkern::forward));
}
