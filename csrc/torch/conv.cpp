// Registers convolution's raw ops; their schemas are in bigkern/ops/conv/_schema.py.
#include "kernels/conv.h"
#include "torch/common.h"

#include <torch/headeronly/core/MemoryFormat.h>

#include <array>
#include <limits>
#include <tuple>
#include <vector>

namespace bigkern {
namespace {

using binding::Checks;
using binding::DeviceScope;
using binding::refuse;
using binding::ScalarType;
using binding::Tensor;
using binding::Workspace;
using torch::stable::new_empty;
using Ints = std::vector<int64_t>;

Tensor new_image(const Tensor& like, const Ints& sizes, bool channels_last, ScalarType dtype) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A tensor of these sizes and this dtype, on the device of `like`.
void expect(const char* op, const char* name, const Tensor& tensor, const Tensor& like, const Ints& sizes,
            ScalarType dtype) {
  bool same = tensor.dim() == 4 && tensor.scalar_type() == dtype && tensor.is_cuda() == like.is_cuda() &&
              tensor.get_device_index() == like.get_device_index();
  for (int i = 0; same && i < 4; i++) same = tensor.size(i) == sizes[i];
  if (!same) {
    refuse(op, ": ", name, " is ", binding::describe(tensor), "; expected ", torch::headeronly::toString(dtype), " [",
           sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "] on the device of ", binding::describe(like));
  }
}

// As new_image would lay it out; of an axis of length one the stride may be anything.
void expect_dense(const char* op, const char* name, const Tensor& tensor, bool channels_last) {
  int64_t stride = 1;
  for (const int axis : channels_last ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0}) {
    if (tensor.size(axis) > 1 && tensor.stride(axis) != stride) {
      refuse(op, ": ", name, " is ", binding::describe(tensor), " with gaps or in another order; expected it dense, ",
             channels_last ? "channels_last" : "contiguous");
    }
    stride *= tensor.size(axis);
  }
}

ConvTensor describe_strides(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

int as_int(const char* op, const char* name, int64_t value, int64_t least) {
  if (value < least || value > std::numeric_limits<int>::max()) {
    refuse(op, ": ", name, " is ", value, "; expected ", least, " to ", std::numeric_limits<int>::max());
  }
  return static_cast<int>(value);
}

int64_t places(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = dilation * (kernel - 1) + 1, padded = size + 2 * padding;
  return padded < span ? 0 : (padded - span) / stride + 1;
}

void pair(const char* op, const char* name, const Ints& values) {
  if (values.size() != 2) refuse(op, ": ", name, " has ", values.size(), " values; expected 2");
}

// Fills the shape from the sizes of the input (N, C, H, W) and the weight (K, C / groups, R, S), and checks it.
ConvShape make_shape(const char* op, const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups) {
  pair(op, "stride", stride);
  pair(op, "padding", padding);
  pair(op, "dilation", dilation);
  ConvShape shape{};
  shape.images = input[0];
  shape.channels = as_int(op, "channels", input[1], 1);
  shape.height = as_int(op, "height", input[2], 1);
  shape.width = as_int(op, "width", input[3], 1);
  shape.filters = as_int(op, "filters", weight[0], 1);
  shape.kernel_h = as_int(op, "kernel height", weight[2], 1);
  shape.kernel_w = as_int(op, "kernel width", weight[3], 1);
  shape.stride_h = as_int(op, "stride", stride[0], 1);
  shape.stride_w = as_int(op, "stride", stride[1], 1);
  shape.padding_h = as_int(op, "padding", padding[0], 0);
  shape.padding_w = as_int(op, "padding", padding[1], 0);
  shape.dilation_h = as_int(op, "dilation", dilation[0], 1);
  shape.dilation_w = as_int(op, "dilation", dilation[1], 1);
  shape.groups = as_int(op, "groups", groups, 1);
  if (shape.channels % shape.groups != 0 || shape.filters % shape.groups != 0 ||
      weight[1] != shape.channels / shape.groups) {
    refuse(op, ": weight has ", weight[0], " filters of ", weight[1], " channels; ", shape.channels, " channels in ",
           groups, " groups do not go with them");
  }
  shape.out_h = as_int(op, "output height", places(input[2], weight[2], stride[0], padding[0], dilation[0]), 1);
  shape.out_w = as_int(op, "output width", places(input[3], weight[3], stride[1], padding[1], dilation[1]), 1);
  // Reduced axes and coordinates are counted in int, with room for the padding and a tap beyond.
  as_int(op, "filter size", weight[1] * weight[2] * weight[3] * shape.groups, 1);
  as_int(op, "filters times taps", weight[0] * weight[2] * weight[3], 1);
  for (const int axis : {0, 1}) {
    const int64_t reach = input[2 + axis] + 2 * padding[axis] + dilation[axis] * weight[2 + axis] + stride[axis];
    as_int(op, "padded size", 2 * reach, 0);
  }
  return shape;
}

ConvPool make_pool(const char* op, const Ints& max_pool, int64_t out_h, int64_t out_w) {
  ConvPool pool{};
  if (max_pool.empty()) return pool;
  if (max_pool.size() != 6) refuse(op, ": max_pool has ", max_pool.size(), " values; expected none or 6");
  pool.kernel_h = as_int(op, "max_pool kernel", max_pool[0], 1);
  pool.kernel_w = as_int(op, "max_pool kernel", max_pool[1], 1);
  pool.stride_h = as_int(op, "max_pool stride", max_pool[2], 1);
  pool.stride_w = as_int(op, "max_pool stride", max_pool[3], 1);
  pool.padding_h = as_int(op, "max_pool padding", max_pool[4], 0);
  pool.padding_w = as_int(op, "max_pool padding", max_pool[5], 0);
  if (max_pool[0] * max_pool[1] > 255) {
    refuse(op, ": max_pool has windows of ", max_pool[0] * max_pool[1], " places; expected at most 255");
  }
  if (2 * max_pool[4] > max_pool[0] || 2 * max_pool[5] > max_pool[1]) {
    refuse(op, ": max_pool padding is ", max_pool[4], ", ", max_pool[5], "; expected at most half of the kernel, ",
           max_pool[0], ", ", max_pool[1]);
  }
  pool.out_h = as_int(op, "pooled height", places(out_h, max_pool[0], max_pool[2], max_pool[4], 1), 1);
  pool.out_w = as_int(op, "pooled width", places(out_w, max_pool[1], max_pool[3], max_pool[5], 1), 1);
  return pool;
}

ConvActivation make_activation(const char* op, int64_t activation) {
  if (activation < 0 || activation > 4) refuse(op, ": activation is ", activation, "; expected 0 to 4");
  return static_cast<ConvActivation>(activation);
}

bool keeps_preactivation(ConvActivation activation) {
  return activation != ConvActivation::kNone && activation != ConvActivation::kRelu;
}

Ints sizes_of(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.dim() != 4) refuse(op, ": ", name, " is ", binding::describe(tensor), "; expected four dimensions");
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Ints& stride, const Ints& padding, const Ints& dilation,
                                           int64_t groups, int64_t activation, const Ints& max_pool, bool tf32,
                                           bool channels_last, bool need_backward,
                                           const std::optional<Tensor>& residual) {
  constexpr const char* kOp = "conv_forward";
  const ScalarType dtype = input.scalar_type();
  const Ints input_sizes = sizes_of(kOp, "input", input), weight_sizes = sizes_of(kOp, "weight", weight);
  expect(kOp, "weight", weight, input, weight_sizes, dtype);
  if (bias) Checks(kOp, input).vector("bias", *bias, weight_sizes[0], dtype);
  ConvForwardParams params{};
  params.shape = make_shape(kOp, input_sizes, weight_sizes, stride, padding, dilation, groups);
  params.pool = make_pool(kOp, max_pool, params.shape.out_h, params.shape.out_w);
  params.activation = make_activation(kOp, activation);

  const bool pooled = !max_pool.empty();
  const Ints sizes = {input_sizes[0], weight_sizes[0], pooled ? params.pool.out_h : params.shape.out_h,
                      pooled ? params.pool.out_w : params.shape.out_w};
  Tensor output = new_image(input, sizes, channels_last, dtype);
  const bool keep = need_backward && keeps_preactivation(params.activation);
  Tensor preactivation = keep ? new_image(input, sizes, channels_last, dtype) : new_empty(input, {0});
  Tensor argmax = need_backward && pooled ? new_image(input, sizes, channels_last, ScalarType::Byte)
                                          : new_empty(input, {0}, ScalarType::Byte);
  if (residual) {
    if (pooled) refuse(kOp, ": residual with max_pool; expected one of them");
    expect(kOp, "residual", *residual, input, sizes, dtype);
    expect_dense(kOp, "residual", *residual, channels_last);
    params.residual = residual->const_data_ptr();
  }
  if (output.numel() == 0) return {output, preactivation, argmax};

  params.input = describe_strides(input);
  params.weight = describe_strides(weight);
  params.bias = binding::data_or_null(bias);
  params.output = output.mutable_data_ptr();
  params.preactivation = keep ? preactivation.mutable_data_ptr() : nullptr;
  params.argmax = need_backward && pooled ? static_cast<uint8_t*>(argmax.mutable_data_ptr()) : nullptr;
  params.channels_last = channels_last;
  params.tf32 = tf32;

  const DeviceScope device(input);
  Workspace workspace(input);
  const int code = binding::dispatch_type(kOp, dtype, [&](auto type) {
    return conv_forward<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {output, preactivation, argmax};
}

Tensor backward_epilogue(const Tensor& grad_output, const Tensor& output, const Tensor& preactivation,
                         const Tensor& argmax, const Ints& conv_size, int64_t activation, const Ints& max_pool) {
  constexpr const char* kOp = "conv_backward_epilogue";
  const ScalarType dtype = grad_output.scalar_type();
  const Ints sizes = sizes_of(kOp, "grad_output", grad_output);
  pair(kOp, "conv_size", conv_size);
  ConvBackwardEpilogueParams params{};
  params.images = sizes[0];
  params.filters = as_int(kOp, "filters", sizes[1], 0);
  params.out_h = as_int(kOp, "conv_size", conv_size[0], 0);
  params.out_w = as_int(kOp, "conv_size", conv_size[1], 0);
  params.activation = make_activation(kOp, activation);
  Tensor grad_conv = new_image(grad_output, {sizes[0], sizes[1], conv_size[0], conv_size[1]}, true, dtype);
  if (grad_conv.numel() == 0) return grad_conv;
  params.pool = make_pool(kOp, max_pool, params.out_h, params.out_w);
  const int out_h = max_pool.empty() ? params.out_h : params.pool.out_h;
  const int out_w = max_pool.empty() ? params.out_w : params.pool.out_w;
  if (sizes[2] != out_h || sizes[3] != out_w) {
    refuse(kOp, ": grad_output is ", binding::describe(grad_output), "; expected the size ", out_h, " x ", out_w);
  }
  params.grad_output = describe_strides(grad_output);
  if (params.activation == ConvActivation::kRelu) {
    expect(kOp, "output", output, grad_output, sizes, dtype);
    params.output = describe_strides(output);
  } else if (keeps_preactivation(params.activation)) {
    expect(kOp, "preactivation", preactivation, grad_output, sizes, dtype);
    params.preactivation = describe_strides(preactivation);
  }
  if (!max_pool.empty()) {
    expect(kOp, "argmax", argmax, grad_output, sizes, ScalarType::Byte);
    params.argmax = describe_strides(argmax);
  }
  params.grad_conv = grad_conv.mutable_data_ptr();

  const DeviceScope device(grad_output);
  Workspace workspace(grad_output);
  const int code = binding::dispatch_type(kOp, dtype, [&](auto type) {
    return conv_backward_epilogue<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return grad_conv;
}

Tensor backward_input(const Tensor& grad_conv, const Tensor& weight, const Ints& input_size, const Ints& stride,
                      const Ints& padding, const Ints& dilation, int64_t groups, bool tf32, bool channels_last) {
  constexpr const char* kOp = "conv_backward_input";
  const ScalarType dtype = grad_conv.scalar_type();
  const Ints grad_sizes = sizes_of(kOp, "grad_conv", grad_conv), weight_sizes = sizes_of(kOp, "weight", weight);
  pair(kOp, "input_size", input_size);
  const Ints sizes = {grad_sizes[0], weight_sizes[1] * groups, input_size[0], input_size[1]};
  expect(kOp, "weight", weight, grad_conv, weight_sizes, dtype);
  ConvBackwardInputParams params{};
  params.shape = make_shape(kOp, sizes, weight_sizes, stride, padding, dilation, groups);
  expect(kOp, "grad_conv", grad_conv, grad_conv, {sizes[0], weight_sizes[0], params.shape.out_h, params.shape.out_w},
         dtype);
  Tensor grad_input = new_image(grad_conv, sizes, channels_last, dtype);
  if (grad_input.numel() == 0) return grad_input;
  params.grad_conv = describe_strides(grad_conv);
  params.weight = describe_strides(weight);
  params.grad_input = grad_input.mutable_data_ptr();
  params.channels_last = channels_last;
  params.tf32 = tf32;

  const DeviceScope device(grad_conv);
  Workspace workspace(grad_conv);
  const int code = binding::dispatch_type(kOp, dtype, [&](auto type) {
    return conv_backward_input<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return grad_input;
}

std::tuple<Tensor, Tensor> backward_weight(const Tensor& grad_conv, const Tensor& input, const Ints& kernel_size,
                                           const Ints& stride, const Ints& padding, const Ints& dilation,
                                           int64_t groups, bool tf32, bool channels_last, bool need_bias) {
  constexpr const char* kOp = "conv_backward_weight";
  const ScalarType dtype = grad_conv.scalar_type();
  const Ints grad_sizes = sizes_of(kOp, "grad_conv", grad_conv), input_sizes = sizes_of(kOp, "input", input);
  pair(kOp, "kernel_size", kernel_size);
  if (groups < 1) refuse(kOp, ": groups is ", groups, "; expected at least 1");
  const Ints sizes = {grad_sizes[1], input_sizes[1] / groups, kernel_size[0], kernel_size[1]};
  expect(kOp, "input", input, grad_conv, input_sizes, dtype);
  ConvBackwardWeightParams params{};
  params.shape = make_shape(kOp, input_sizes, sizes, stride, padding, dilation, groups);
  expect(kOp, "grad_conv", grad_conv, grad_conv, {input_sizes[0], sizes[0], params.shape.out_h, params.shape.out_w},
         dtype);
  Tensor grad_weight = new_image(input, sizes, channels_last, dtype);
  Tensor grad_bias = new_empty(input, {need_bias ? sizes[0] : 0});
  if (input_sizes[0] == 0) return {torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  params.grad_conv = describe_strides(grad_conv);
  params.input = describe_strides(input);
  params.grad_weight = grad_weight.mutable_data_ptr();
  params.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  params.channels_last = channels_last;
  params.tf32 = tf32;

  const DeviceScope device(grad_conv);
  Workspace workspace(grad_conv);
  const int code = binding::dispatch_type(kOp, dtype, [&](auto type) {
    return conv_backward_weight<typename decltype(type)::T>(params, device.stream(), std::ref(workspace));
  });
  binding::check_launch(kOp, code);
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&bigkern::forward));
  m.impl("conv_backward_epilogue", TORCH_BOX(&bigkern::backward_epilogue));
  m.impl("conv_backward_input", TORCH_BOX(&bigkern::backward_input));
  m.impl("conv_backward_weight", TORCH_BOX(&bigkern::backward_weight));
}
