// Registers the raw ops over an optimizer's lists of tensors; their schemas are in bigkern/ops/adam/_schema.py. What
// the tables point at cannot be checked here: bigkern/ops/adam/_plan.py makes them from tensors it has checked.
#include "kernels/adam.h"
#include "torch/common.h"

namespace bigkern {
namespace {

using binding::Checks;
using binding::describe;
using binding::DeviceScope;
using binding::refuse;
using binding::ScalarType;
using binding::Tensor;
using torch::stable::new_empty;

MultiTensor make_list(const char* op, const Checks& checks, const Tensor& tensors, const Tensor& chunk_ends,
                      const Tensor& grads, const Tensor& scratch) {
  if (tensors.dim() != 2 || tensors.size(1) != kTensorColumns || tensors.scalar_type() != ScalarType::Long ||
      !tensors.is_contiguous()) {
    refuse(op, ": tensors is ", describe(tensors), "; expected a contiguous Long [count, ", int{kTensorColumns}, "]");
  }
  const int64_t count = tensors.size(0);
  checks.vector("chunk_ends", chunk_ends, count, ScalarType::Long);
  checks.vector("grads", grads, count, ScalarType::Long);
  checks.vector("scratch", scratch, kScratchWords, ScalarType::Long);
  return {static_cast<const int64_t*>(tensors.const_data_ptr()),
          static_cast<const int64_t*>(chunk_ends.const_data_ptr()), static_cast<const int64_t*>(grads.const_data_ptr()),
          static_cast<int64_t*>(scratch.mutable_data_ptr()), count};
}

// The address of an fp32 scalar on the device, or null.
const float* scalar(const char* op, const char* name, const Tensor& like, const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  if (tensor->scalar_type() != ScalarType::Float || tensor->numel() != 1 || tensor->is_cuda() != like.is_cuda() ||
      tensor->get_device_index() != like.get_device_index()) {
    refuse(op, ": ", name, " is ", describe(*tensor), "; expected one Float beside the tables, ", describe(like));
  }
  return static_cast<const float*>(tensor->const_data_ptr());
}

void step(const char* op, int (*launcher)(const StepParams&, Stream), const Tensor& tensors, const Tensor& chunk_ends,
          const Tensor& grads, const Tensor& hyper, const Tensor& scratch, const std::optional<Tensor>& grad_scale,
          const std::optional<Tensor>& found_inf, const std::optional<Tensor>& total_norm, double max_norm,
          bool zero_grads, const std::optional<Tensor>& philox) {
  const Checks checks(op, tensors);
  StepParams params{};
  params.list = make_list(op, checks, tensors, chunk_ends, grads, scratch);
  if (hyper.dim() != 2 || hyper.size(0) < 1 || hyper.size(1) != kHyperColumns ||
      hyper.scalar_type() != ScalarType::Double || !hyper.is_contiguous() || hyper.is_cuda() != tensors.is_cuda() ||
      hyper.get_device_index() != tensors.get_device_index()) {
    refuse(op, ": hyper is ", describe(hyper), "; expected a contiguous Double [groups, ", int{kHyperColumns},
           "] beside the tables, ", describe(tensors));
  }
  params.hyper = static_cast<const double*>(hyper.const_data_ptr());
  params.grad_scale = scalar(op, "grad_scale", tensors, grad_scale);
  params.found_inf = scalar(op, "found_inf", tensors, found_inf);
  params.total_norm = scalar(op, "total_norm", tensors, total_norm);
  if (total_norm && !(max_norm > 0.0)) refuse(op, ": max_norm is ", max_norm, "; expected more than 0 with total_norm");
  params.max_norm = static_cast<float>(max_norm);
  params.zero_grads = zero_grads;
  if (philox) {
    checks.vector("philox", *philox, 2, ScalarType::Long);
    params.philox = static_cast<const int64_t*>(philox->const_data_ptr());
  }
  if (params.list.count == 0) return;
  const DeviceScope device(tensors);
  binding::check_launch(op, launcher(params, device.stream()));
}

void adam(const Tensor& tensors, const Tensor& chunk_ends, const Tensor& grads, const Tensor& hyper,
          const Tensor& scratch, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
          const std::optional<Tensor>& total_norm, double max_norm, bool zero_grads,
          const std::optional<Tensor>& philox) {
  step("adam_step", adam_step, tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm,
       zero_grads, philox);
}

void sgd(const Tensor& tensors, const Tensor& chunk_ends, const Tensor& grads, const Tensor& hyper,
         const Tensor& scratch, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
         const std::optional<Tensor>& total_norm, double max_norm, bool zero_grads,
         const std::optional<Tensor>& philox) {
  step("sgd_step", sgd_step, tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm,
       zero_grads, philox);
}

void check_norm_type(const char* op, double norm_type) {
  if (!(norm_type > 0.0)) refuse(op, ": norm_type is ", norm_type, "; expected more than 0, or infinity");
}

// A new fp32 scalar for the norm; zero for an empty list, which launches nothing.
Tensor new_norm(const Tensor& tensors) {
  Tensor norm = new_empty(tensors, {}, ScalarType::Float);
  return tensors.size(0) == 0 ? torch::stable::zero_(norm) : norm;
}

Tensor norm_of_grads(const Tensor& tensors, const Tensor& chunk_ends, const Tensor& grads, const Tensor& scratch,
                     double norm_type, const std::optional<Tensor>& grad_scale) {
  constexpr const char* kOp = "grad_norm";
  const MultiTensor list = make_list(kOp, Checks(kOp, tensors), tensors, chunk_ends, grads, scratch);
  check_norm_type(kOp, norm_type);
  const float* scale = scalar(kOp, "grad_scale", tensors, grad_scale);
  Tensor norm = new_norm(tensors);
  if (list.count == 0) return norm;
  const DeviceScope device(tensors);
  binding::check_launch(
      kOp, grad_norm(list, norm_type, scale, static_cast<float*>(norm.mutable_data_ptr()), device.stream()));
  return norm;
}

Tensor clip(const Tensor& tensors, const Tensor& chunk_ends, const Tensor& grads, const Tensor& scratch,
            double norm_type, double max_norm) {
  constexpr const char* kOp = "clip_grads";
  const MultiTensor list = make_list(kOp, Checks(kOp, tensors), tensors, chunk_ends, grads, scratch);
  check_norm_type(kOp, norm_type);
  Tensor norm = new_norm(tensors);
  if (list.count == 0) return norm;
  const DeviceScope device(tensors);
  binding::check_launch(kOp, clip_grads(list, norm_type, static_cast<float>(max_norm),
                                        static_cast<float*>(norm.mutable_data_ptr()), device.stream()));
  return norm;
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("adam_step", TORCH_BOX(&bigkern::adam));
  m.impl("sgd_step", TORCH_BOX(&bigkern::sgd));
  m.impl("grad_norm", TORCH_BOX(&bigkern::norm_of_grads));
  m.impl("clip_grads", TORCH_BOX(&bigkern::clip));
}
