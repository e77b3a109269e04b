// Registers attention's raw ops; their schemas are in bigkern/ops/attention/_schema.py.
#include "kernels/attention.h"
#include "torch/common.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace bigkern {
namespace {

using binding::DeviceScope;
using binding::refuse;
using binding::ScalarType;
using binding::Tensor;
using torch::stable::new_empty;
using torch::stable::new_zeros;

constexpr int64_t kMaxHeadDim = 256;

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  if (!same_device(tensor, like)) {
    refuse(op, ": ", name, " is ", binding::describe(tensor), "; expected the device of query, ",
           binding::describe(like));
  }
}

// Four dimensions of these sizes, like's dtype, unit inner stride.
void check_four(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t batch,
                int64_t heads, int64_t rows, int64_t dim) {
  check_device(op, name, tensor, like);
  if (tensor.scalar_type() != like.scalar_type() || tensor.dim() != 4 || tensor.size(0) != batch ||
      tensor.size(1) != heads || tensor.size(2) != rows || tensor.size(3) != dim) {
    refuse(op, ": ", name, " is ", binding::describe(tensor), "; expected ",
           torch::headeronly::toString(like.scalar_type()), " [", batch, ", ", heads, ", ", rows, ", ", dim, "]");
  }
  if (dim > 1 && tensor.numel() > 0 && tensor.stride(3) != 1) {
    refuse(op, ": ", name, " has inner stride ", tensor.stride(3), "; expected 1: pass a contiguous tensor");
  }
}

void check_contiguous(const char* op, const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
                      std::initializer_list<int64_t> sizes) {
  check_device(op, name, tensor, like);
  bool right =
      tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : sizes) right = right && tensor.size(i++) == size;
  if (!right) {
    std::ostringstream shape;
    for (const int64_t size : sizes) shape << (shape.tellp() > 0 ? ", " : "") << size;
    refuse(op, ": ", name, " is ", binding::describe(tensor), "; expected a contiguous ",
           torch::headeronly::toString(dtype), " [", shape.str(), "]");
  }
}

// The kernels' counts are ints.
int narrow(const char* op, const char* name, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max() / 2) {
    refuse(op, ": ", name, " is ", value, "; supported are 0 to ", std::numeric_limits<int>::max() / 2);
  }
  return static_cast<int>(value);
}

int window_side(int64_t side) {
  return side < 0 ? -1 : static_cast<int>(std::min<int64_t>(side, std::numeric_limits<int>::max() / 4));
}

// Of a dimension of one element torch may report any stride.
AttentionTensor view(const Tensor& tensor) {
  const auto stride = [&](int64_t i) { return tensor.size(i) > 1 ? tensor.stride(i) : 0; };
  return {const_cast<void*>(tensor.const_data_ptr()), stride(0), stride(1), stride(2)};
}

void broadcast_strides(const Tensor& tensor, int64_t (&strides)[4]) {
  for (int64_t i = 0; i < 4; i++) strides[i] = tensor.size(i) > 1 ? tensor.stride(i) : 0;
}

// A result that lies in memory as (batch, rows, heads, dim). Packed sequences that do not cover it leave zeros.
Tensor rows_first(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t dim, bool zero) {
  const Tensor memory = zero ? new_zeros(like, {batch, rows, heads, dim}) : new_empty(like, {batch, rows, heads, dim});
  return torch::stable::transpose(memory, 1, 2);
}

// What both ops are given beside query, key and value. Their `tf32` is a permission that the kernels do not use.
struct Arguments {
  const std::optional<Tensor>& attn_mask;
  const std::optional<Tensor>& alibi_slopes;
  const std::optional<Tensor>& cu_seqlens_q;
  const std::optional<Tensor>& cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k, window_left, window_right;
  bool bottom_right;
  double softcap, scale, dropout_p;
  const std::optional<Tensor>& philox;
};

// Checks query, key, value and the options, and fills the latter in.
void set_options(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Arguments& a,
                 AttentionOptions& options) {
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4) {
    refuse(op, ": query is ", binding::describe(query), ", key ", binding::describe(key), ", value ",
           binding::describe(value), "; expected four dimensions");
  }
  const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  const int64_t head_dim = query.size(3), value_dim = value.size(3);
  check_four(op, "query", query, query, batch, heads, query.size(2), head_dim);
  check_four(op, "key", key, query, batch, kv_heads, key.size(2), head_dim);
  check_four(op, "value", value, query, batch, kv_heads, key.size(2), value_dim);
  if (head_dim > kMaxHeadDim || value_dim > kMaxHeadDim) {
    refuse(op, ": head_dim is ", head_dim, " and the value's ", value_dim, "; supported are up to ", kMaxHeadDim);
  }
  if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0) {
    refuse(op, ": query has ", heads, " heads and key ", kv_heads, "; the first must be a multiple of the second");
  }

  options.heads = narrow(op, "heads", heads);
  options.kv_heads = narrow(op, "kv_heads", kv_heads);
  options.head_dim = static_cast<int>(head_dim);
  options.value_dim = static_cast<int>(value_dim);
  options.total_q = narrow(op, "seqlen_q", query.size(2));
  options.total_k = narrow(op, "seqlen_k", key.size(2));
  options.seqlen_q = narrow(op, "max_seqlen_q", a.max_seqlen_q);
  options.seqlen_k = narrow(op, "max_seqlen_k", a.max_seqlen_k);
  int64_t sequences = batch;
  if (a.cu_seqlens_q || a.cu_seqlens_k) {
    if (!a.cu_seqlens_q || !a.cu_seqlens_k) refuse(op, ": cu_seqlens_q and cu_seqlens_k go together");
    if (batch != 1) refuse(op, ": query has batch ", batch, "; packed sequences are one batch");
    sequences = a.cu_seqlens_q->dim() == 1 ? a.cu_seqlens_q->size(0) - 1 : -1;
    if (sequences < 0) {
      refuse(op, ": cu_seqlens_q is ", binding::describe(*a.cu_seqlens_q), "; expected (sequences + 1,)");
    }
    check_contiguous(op, "cu_seqlens_q", *a.cu_seqlens_q, query, ScalarType::Int, {sequences + 1});
    check_contiguous(op, "cu_seqlens_k", *a.cu_seqlens_k, query, ScalarType::Int, {sequences + 1});
    options.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens_q->const_data_ptr());
    options.cu_seqlens_k = static_cast<const int32_t*>(a.cu_seqlens_k->const_data_ptr());
  } else if (a.max_seqlen_q != query.size(2) || a.max_seqlen_k != key.size(2)) {
    refuse(op, ": max_seqlen_q is ", a.max_seqlen_q, " and max_seqlen_k ", a.max_seqlen_k, "; expected the lengths ",
           query.size(2), " and ", key.size(2));
  }
  options.batch = narrow(op, "batch", sequences);

  if (a.attn_mask) {
    const Tensor& mask = *a.attn_mask;
    check_device(op, "attn_mask", mask, query);
    const int64_t sizes[4] = {sequences, heads, a.max_seqlen_q, a.max_seqlen_k};
    bool right = mask.dim() == 4;
    for (int64_t i = 0; right && i < 4; i++) right = mask.size(i) == sizes[i] || mask.size(i) == 1;
    const ScalarType dtype = mask.scalar_type();
    options.mask_kind = dtype == ScalarType::Bool      ? AttentionMask::kBool
                        : dtype == query.scalar_type() ? AttentionMask::kSame
                        : dtype == ScalarType::Float   ? AttentionMask::kFloat
                                                       : AttentionMask::kNone;
    if (!right || options.mask_kind == AttentionMask::kNone) {
      refuse(op, ": attn_mask is ", binding::describe(mask), "; expected bool, Float or the query's dtype, [",
             sequences, ", ", heads, ", ", a.max_seqlen_q, ", ", a.max_seqlen_k, "] with any of them 1");
    }
    options.mask = mask.const_data_ptr();
    broadcast_strides(mask, options.mask_strides);
  }
  if (a.alibi_slopes) {
    const Tensor& slopes = *a.alibi_slopes;
    if (slopes.dim() == 2) {
      check_contiguous(op, "alibi_slopes", slopes, query, ScalarType::Float, {sequences, heads});
      options.slopes_batch_stride = heads;
    } else {
      check_contiguous(op, "alibi_slopes", slopes, query, ScalarType::Float, {heads});
    }
    options.slopes = static_cast<const float*>(slopes.const_data_ptr());
  }
  options.scale = static_cast<float>(a.scale);
  options.softcap = static_cast<float>(a.softcap);
  options.window_left = window_side(a.window_left);
  options.window_right = window_side(a.window_right);
  options.bottom_right = a.bottom_right;

  if (!(a.dropout_p >= 0.0 && a.dropout_p <= 1.0)) refuse(op, ": dropout_p is ", a.dropout_p, "; expected 0 to 1");
  options.dropout_p = static_cast<float>(a.dropout_p);
  options.dropout_scale = a.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - a.dropout_p)) : 0.0f;
  if (a.dropout_p > 0.0) {
    if (!a.philox) refuse(op, ": philox is missing; dropout needs its seed and offset");
    check_contiguous(op, "philox", *a.philox, query, ScalarType::Long, {2});
    options.philox = static_cast<const int64_t*>(a.philox->const_data_ptr());
  }
}

// Memory for a launcher's intermediate results; see Workspace.
class ZeroableWorkspace {
 public:
  explicit ZeroableWorkspace(const Tensor& like) : like_(like) {}

  void* operator()(size_t bytes, bool zero) {
    const int64_t size = static_cast<int64_t>(bytes);
    blocks_.push_back(zero ? new_zeros(like_, {size}, ScalarType::Byte) : new_empty(like_, {size}, ScalarType::Byte));
    return blocks_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> blocks_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& alibi_slopes,
                                   const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                                   int64_t window_right, bool bottom_right, double softcap, double scale,
                                   double dropout_p, const std::optional<Tensor>& philox, bool) {
  constexpr const char* kOp = "attention_forward";
  AttentionForwardParams params{};
  set_options(kOp, query, key, value,
              {attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
               window_right, bottom_right, softcap, scale, dropout_p, philox},
              params);
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
  const bool packed = params.cu_seqlens_q != nullptr;
  // Without keys every row sees nothing.
  const bool empty = query.numel() == 0 || key.numel() == 0 || value.numel() == 0 || params.batch == 0 ||
                     params.seqlen_q == 0 || params.seqlen_k == 0;
  Tensor output = rows_first(query, batch, heads, rows, value.size(3), packed || empty);
  Tensor lse = new_empty(query, {batch, heads, rows}, ScalarType::Float);
  if (packed || empty) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  if (empty) return {output, lse};

  params.query = view(query);
  params.key = view(key);
  params.value = view(value);
  params.output = view(output);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  const DeviceScope device(query);
  ZeroableWorkspace workspace(query);
  const int code = binding::dispatch_type(kOp, query.scalar_type(), [&](auto type) {
    return attention_forward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& output, const Tensor& lse, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
    int64_t window_right, bool bottom_right, double softcap, double scale, double dropout_p,
    const std::optional<Tensor>& philox, bool, bool need_grad_mask, bool need_grad_slopes, bool deterministic) {
  constexpr const char* kOp = "attention_backward";
  AttentionBackwardParams params{};
  set_options(kOp, query, key, value,
              {attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
               window_right, bottom_right, softcap, scale, dropout_p, philox},
              params);
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), value_dim = value.size(3);
  check_four(kOp, "grad_output", grad_output, query, batch, heads, rows, value_dim);
  check_four(kOp, "output", output, query, batch, heads, rows, value_dim);
  check_contiguous(kOp, "lse", lse, query, ScalarType::Float, {batch, heads, rows});
  if (grad_lse) check_contiguous(kOp, "grad_lse", *grad_lse, query, ScalarType::Float, {batch, heads, rows});
  if (need_grad_mask && (!attn_mask || params.mask_kind == AttentionMask::kBool)) {
    refuse(kOp, ": need_grad_mask was asked for without an additive attn_mask");
  }
  if (need_grad_slopes && !alibi_slopes) refuse(kOp, ": need_grad_slopes was asked for without alibi_slopes");

  const bool packed = params.cu_seqlens_q != nullptr;
  const bool empty = query.numel() == 0 || key.numel() == 0 || value.numel() == 0 || params.batch == 0 ||
                     params.seqlen_q == 0 || params.seqlen_k == 0;
  const auto gradient = [&](const Tensor& of) {
    return rows_first(of, of.size(0), of.size(1), of.size(2), of.size(3), packed || empty);
  };
  Tensor grad_query = gradient(query), grad_key = gradient(key), grad_value = gradient(value);
  // Where the mask is broadcast, several scores share an element: it is summed in fp32, or stored for each of them and
  // summed in a fixed order. Tiles without a score leave zeros.
  bool shared = false;
  std::vector<int64_t> mask_sizes = {0};
  std::vector<int64_t> sum_sizes;
  if (need_grad_mask) {
    mask_sizes = {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)};
    sum_sizes = mask_sizes;
    const int64_t scores[4] = {params.batch, params.heads, params.seqlen_q, params.seqlen_k};
    for (int64_t i = 0; i < 4; i++) {
      if (mask_sizes[i] == scores[i]) continue;
      shared = true;
      if (deterministic) sum_sizes[i] = scores[i];
    }
  }
  Tensor grad_mask = new_empty(need_grad_mask ? *attn_mask : query, {0});
  Tensor sums = grad_mask;
  if (need_grad_mask) {
    grad_mask = new_zeros(*attn_mask, mask_sizes);
    sums = shared ? new_zeros(query, sum_sizes, ScalarType::Float) : grad_mask;
    const bool wide = sums.scalar_type() != query.scalar_type();
    params.mask_gradient_kind = shared && !deterministic ? AttentionMaskGradient::kAddFloat
                                : shared || wide         ? AttentionMaskGradient::kStoreFloat
                                                         : AttentionMaskGradient::kStore;
    params.mask_gradient = sums.mutable_data_ptr();
    broadcast_strides(sums, params.mask_gradient_strides);
  }
  Tensor grad_slopes = new_empty(query, {0}, ScalarType::Float);
  if (need_grad_slopes) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < alibi_slopes->dim(); i++) sizes.push_back(alibi_slopes->size(i));
    grad_slopes = new_zeros(query, sizes, ScalarType::Float);
  }
  if (empty) return {grad_query, grad_key, grad_value, grad_mask, grad_slopes};

  params.query = view(query);
  params.key = view(key);
  params.value = view(value);
  params.output = view(output);
  params.grad_output = view(grad_output);
  params.grad_query = view(grad_query);
  params.grad_key = view(grad_key);
  params.grad_value = view(grad_value);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.grad_lse = static_cast<const float*>(binding::data_or_null(grad_lse));
  if (need_grad_slopes) params.grad_slopes = static_cast<float*>(grad_slopes.mutable_data_ptr());
  params.deterministic = deterministic;
  const DeviceScope device(query);
  ZeroableWorkspace workspace(query);
  const int code = binding::dispatch_type(kOp, query.scalar_type(), [&](auto type) {
    return attention_backward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  if (shared) {
    for (int64_t i = 0; i < 4; i++) {
      const int64_t dimension[] = {i};
      if (sums.size(i) != mask_sizes[i]) sums = torch::stable::sum(sums, dimension, true);
    }
    torch::stable::copy_(grad_mask, sums);
  }
  return {grad_query, grad_key, grad_value, grad_mask, grad_slopes};
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&bigkern::forward));
  m.impl("attention_backward", TORCH_BOX(&bigkern::backward));
}
