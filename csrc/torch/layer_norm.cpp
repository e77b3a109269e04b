// Registers layer norm's raw ops; their schemas are in bigkern/ops/layer_norm/_schema.py.
#include "kernels/layer_norm.h"
#include "torch/common.h"

#include <tuple>

namespace bigkern {
namespace {

using binding::Checks;
using binding::DeviceScope;
using binding::refuse;
using binding::row_stride;
using binding::ScalarType;
using binding::Tensor;
using binding::Workspace;
using torch::stable::new_empty;

// Sets the params' dropout fields; both directions have the same.
template <class Params>
void set_dropout(const char* op, const Checks& checks, double dropout_p, const std::optional<Tensor>& philox,
                 Params& params) {
  if (!(dropout_p >= 0.0 && dropout_p <= 1.0)) refuse(op, ": dropout_p is ", dropout_p, "; expected 0 to 1");
  params.dropout_p = static_cast<float>(dropout_p);
  params.dropout_scale = dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f;
  params.philox = nullptr;
  if (dropout_p > 0.0) {
    if (!philox) refuse(op, ": philox is missing; dropout needs its seed and offset");
    checks.vector("philox", *philox, 2, ScalarType::Long);
    params.philox = static_cast<const int64_t*>(philox->const_data_ptr());
  }
}

// Whether the parameters are floats; they may differ from the activations' dtype in no other way.
bool float_parameters(const char* op, ScalarType activation, ScalarType parameter) {
  if (parameter != activation && parameter != ScalarType::Float) {
    refuse(op, ": parameters are ", torch::headeronly::toString(parameter), " and activations ",
           torch::headeronly::toString(activation), "; expected the same dtype, or Float parameters");
  }
  return parameter == ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const std::optional<Tensor>& residual,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps, bool rms,
                                                   double dropout_p, const std::optional<Tensor>& philox) {
  constexpr const char* kOp = "layer_norm_forward";
  if (input.dim() != 2) refuse(kOp, ": input is ", binding::describe(input), "; expected two dimensions");
  const int64_t rows = input.size(0), cols = input.size(1);
  const ScalarType parameter = weight ? weight->scalar_type() : bias ? bias->scalar_type() : input.scalar_type();
  const Checks checks(kOp, input);
  checks.matrix("input", input, rows, cols);
  if (residual) checks.matrix("residual", *residual, rows, cols);
  if (weight) checks.vector("weight", *weight, cols, parameter);
  if (bias) checks.vector("bias", *bias, cols, parameter);
  if (bias && rms) refuse(kOp, ": bias was given; RMS norm has none");
  if (dropout_p > 0.0 && !residual) refuse(kOp, ": dropout_p is ", dropout_p, " without a residual to add to");

  LayerNormForwardParams params{};
  set_dropout(kOp, checks, dropout_p, philox, params);
  Tensor output = new_empty(input, {rows, cols});
  Tensor summed = residual ? new_empty(input, {rows, cols}) : new_empty(input, {0});
  Tensor mean = new_empty(input, {rms ? 0 : rows}, ScalarType::Float);
  Tensor rstd = new_empty(input, {rows}, ScalarType::Float);
  if (rows == 0 || cols == 0) return {output, summed, torch::stable::zero_(mean), torch::stable::zero_(rstd)};

  params.input = input.const_data_ptr();
  params.input_stride = row_stride(input);
  params.residual = binding::data_or_null(residual);
  params.residual_stride = residual ? row_stride(*residual) : 0;
  params.weight = binding::data_or_null(weight);
  params.bias = binding::data_or_null(bias);
  params.output = output.mutable_data_ptr();
  params.summed = residual ? summed.mutable_data_ptr() : nullptr;
  params.mean = rms ? nullptr : static_cast<float*>(mean.mutable_data_ptr());
  params.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  params.rows = rows;
  params.cols = cols;
  params.eps = static_cast<float>(eps);
  params.rms = rms;
  params.float_parameters = float_parameters(kOp, input.scalar_type(), parameter);

  const DeviceScope device(input);
  Workspace workspace(input);
  const int code = binding::dispatch_type(kOp, input.scalar_type(), [&](auto type) {
    return layer_norm_forward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {output, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_output,
                                                    const std::optional<Tensor>& grad_summed, const Tensor& summed,
                                                    const Tensor& mean, const Tensor& rstd,
                                                    const std::optional<Tensor>& weight, bool rms, double dropout_p,
                                                    const std::optional<Tensor>& philox, bool need_weight,
                                                    bool need_bias) {
  constexpr const char* kOp = "layer_norm_backward";
  if (summed.dim() != 2) refuse(kOp, ": summed is ", binding::describe(summed), "; expected two dimensions");
  if (!grad_output) refuse(kOp, ": grad_output is missing");
  const int64_t rows = summed.size(0), cols = summed.size(1);
  const ScalarType parameter = weight ? weight->scalar_type() : summed.scalar_type();
  const Checks checks(kOp, summed);
  checks.matrix("summed", summed, rows, cols);
  checks.matrix("grad_output", *grad_output, rows, cols);
  if (grad_summed) checks.matrix("grad_summed", *grad_summed, rows, cols);
  if (!rms) checks.vector("mean", mean, rows, ScalarType::Float);
  checks.vector("rstd", rstd, rows, ScalarType::Float);
  if (weight) checks.vector("weight", *weight, cols, parameter);
  if (need_bias && rms) refuse(kOp, ": need_bias was asked for; RMS norm has no bias");

  LayerNormBackwardParams params{};
  set_dropout(kOp, checks, dropout_p, philox, params);
  Tensor grad_input = new_empty(summed, {rows, cols});
  Tensor grad_residual = dropout_p > 0.0 ? new_empty(summed, {rows, cols}) : new_empty(summed, {0});
  Tensor grad_weight = new_empty(summed, {need_weight ? cols : 0}, parameter);
  Tensor grad_bias = new_empty(summed, {need_bias ? cols : 0}, parameter);
  if (rows == 0 || cols == 0) {
    return {grad_input, grad_residual, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  }

  params.grad_output = grad_output->const_data_ptr();
  params.grad_output_stride = row_stride(*grad_output);
  params.grad_summed = binding::data_or_null(grad_summed);
  params.grad_summed_stride = grad_summed ? row_stride(*grad_summed) : 0;
  params.summed = summed.const_data_ptr();
  params.summed_stride = row_stride(summed);
  params.mean = rms ? nullptr : static_cast<const float*>(mean.const_data_ptr());
  params.rstd = static_cast<const float*>(rstd.const_data_ptr());
  params.weight = binding::data_or_null(weight);
  params.grad_input = grad_input.mutable_data_ptr();
  params.grad_residual = dropout_p > 0.0 ? grad_residual.mutable_data_ptr() : nullptr;
  params.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  params.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  params.rows = rows;
  params.cols = cols;
  params.rms = rms;
  params.float_parameters = float_parameters(kOp, summed.scalar_type(), parameter);

  const DeviceScope device(summed);
  Workspace workspace(summed);
  const int code = binding::dispatch_type(kOp, summed.scalar_type(), [&](auto type) {
    return layer_norm_backward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&bigkern::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&bigkern::backward));
}
