// Registers the recurrent layers' raw ops; their schemas are in bigkern/ops/rnn/_schema.py.
#include "kernels/rnn.h"
#include "torch/common.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

namespace bigkern {
namespace {

using binding::Checks;
using binding::DeviceScope;
using binding::refuse;
using binding::ScalarType;
using binding::Tensor;
using binding::Workspace;
using torch::stable::new_empty;

// Contiguous tensors of the given sizes, of the dtype and on the device of the first.
class Shapes {
 public:
  Shapes(const char* op, const Tensor& like) : op_(op), like_(like) {}

  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    check(name, tensor, sizes, like_.scalar_type());
  }

  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    bool right = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(sizes.size()) &&
                 tensor.is_contiguous() && tensor.is_cuda() == like_.is_cuda() &&
                 tensor.get_device_index() == like_.get_device_index();
    int64_t i = 0;
    for (const int64_t size : sizes) right = right && tensor.size(i++) == size;
    if (right) return;
    std::ostringstream expected;
    for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << size;
    refuse(op_, ": ", name, " is ", binding::describe(tensor), tensor.is_contiguous() ? "" : ", not contiguous",
           "; expected a contiguous ", torch::headeronly::toString(dtype), " [", expected.str(), "] beside ",
           binding::describe(like_));
  }

 private:
  const char* op_;
  const Tensor& like_;
};

// Checks what both directions have and fills their shape. `rows` is how many rows the sequences must have.
RnnShape make_shape(const char* op, const Shapes& shapes, int64_t rows, const Tensor& h0,
                    const std::optional<Tensor>& c0, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& lengths, int64_t cell,
                    int64_t variant) {
  if (cell < 0 || cell > 3) refuse(op, ": cell is ", cell, "; expected 0 to 3, an index of _schema.CELLS");
  if (variant < 0 || variant > 4) refuse(op, ": variant is ", variant, "; expected 0 to 4, of _schema.VARIANTS");
  if (h0.dim() != 3) refuse(op, ": h0 is ", binding::describe(h0), "; expected three dimensions");
  RnnShape shape{};
  shape.cell = static_cast<RnnCell>(cell);
  shape.variant = static_cast<RnnVariant>(variant);
  const int64_t directions = h0.size(0), hidden = h0.size(2);
  shape.batch = h0.size(1);
  if (directions < 1 || directions > 2 || shape.batch < 1 || hidden < 1 || rows < 1) {
    refuse(op, ": h0 is ", binding::describe(h0), " with ", rows,
           " rows; expected one or two directions, and at least one sequence, unit and row");
  }
  if (hidden > std::numeric_limits<int>::max() / 8) refuse(op, ": ", hidden, " hidden units are too many");
  shape.directions = static_cast<int>(directions);
  shape.hidden = static_cast<int>(hidden);
  shapes.check("h0", h0, {directions, shape.batch, hidden});
  if (c0.has_value() != (shape.cell == RnnCell::kLstm)) refuse(op, ": c0 belongs to the LSTM, and it alone");
  if (c0) shapes.check("c0", *c0, {directions, shape.batch, hidden});
  if (mask) shapes.check("mask", *mask, {directions, shape.batch, hidden});
  if (offsets.has_value() != lengths.has_value()) refuse(op, ": offsets and lengths come together");
  if (offsets) {
    shape.steps = offsets->numel();
    shapes.check("offsets", *offsets, {shape.steps}, ScalarType::Long);
    shapes.check("lengths", *lengths, {shape.batch}, ScalarType::Long);
    shape.offsets = static_cast<const int64_t*>(offsets->const_data_ptr());
    shape.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
  } else {
    shape.steps = rows / shape.batch;
  }
  if (shape.steps < 1 || (!offsets && rows % shape.batch != 0)) {
    refuse(op, ": ", rows, " rows are not whole steps of ", shape.batch, " sequences");
  }
  if (std::max(shape.steps, shape.batch) >= std::numeric_limits<int>::max()) {
    refuse(op, ": ", shape.steps, " steps of ", shape.batch, " sequences; expected fewer than 2147483647 of each");
  }
  shape.h0 = h0.const_data_ptr();
  shape.c0 = binding::data_or_null(c0);
  shape.mask = binding::data_or_null(mask);
  return shape;
}

// Zoneout's weights of the old states, for `rows` rows.
void set_zones(const char* op, const Shapes& shapes, int64_t rows, const std::optional<Tensor>& zone,
               const std::optional<Tensor>& cell_zone, double zoneout, double cell_zoneout, RnnShape& shape) {
  if (shape.cell != RnnCell::kLstm && (cell_zone || cell_zoneout != 0)) {
    refuse(op, ": cell_zone or cell_zoneout was given; they belong to the LSTM alone");
  }
  const std::pair<const char*, double> chances[] = {{"zoneout", zoneout}, {"cell_zoneout", cell_zoneout}};
  for (const auto& [name, chance] : chances) {
    if (!(chance >= 0 && chance <= 1)) refuse(op, ": ", name, " is ", chance, "; expected a number from 0 to 1");
  }
  if (zone) shapes.check("zone", *zone, {rows, int64_t{shape.directions} * shape.hidden});
  if (cell_zone) shapes.check("cell_zone", *cell_zone, {rows, int64_t{shape.directions} * shape.hidden});
  shape.zone = binding::data_or_null(zone);
  shape.cell_zone = binding::data_or_null(cell_zone);
  shape.zoneout = static_cast<float>(zoneout);
  shape.cell_zoneout = static_cast<float>(cell_zoneout);
  shape.zoned = zone || cell_zone || zoneout != 0 || cell_zoneout != 0;
}

void check_launch(const char* op, int code, const RnnShape& shape) {
  if (code == kRnnVariantDoesNotFit) {
    refuse(op, ": the variant ", static_cast<int>(shape.variant), " cannot serve ", shape.hidden,
           " hidden units of this dtype on this device; 0 chooses one that can");
  }
  binding::check_launch(op, code);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& gates, const Tensor& weight_hh, const std::optional<Tensor>& bias_hn, const Tensor& h0,
    const std::optional<Tensor>& c0, const std::optional<Tensor>& mask, const std::optional<Tensor>& offsets,
    const std::optional<Tensor>& lengths, int64_t cell, bool save, int64_t variant, const std::optional<Tensor>& zone,
    const std::optional<Tensor>& cell_zone, double zoneout, double cell_zoneout) {
  constexpr const char* kOp = "rnn_forward";
  if (gates.dim() != 2) refuse(kOp, ": gates is ", binding::describe(gates), "; expected two dimensions");
  const Shapes shapes(kOp, gates);
  const int64_t rows = gates.size(0);
  RnnForwardParams params{};
  params.shape = make_shape(kOp, shapes, rows, h0, c0, mask, offsets, lengths, cell, variant);
  set_zones(kOp, shapes, rows, zone, cell_zone, zoneout, cell_zoneout, params.shape);
  const RnnShape& shape = params.shape;
  const int64_t directions = shape.directions, hidden = shape.hidden, batch = shape.batch;
  const int64_t count = rnn_gates(shape.cell), kept = save ? rnn_saved(shape.cell, shape.zoned) : 0;
  shapes.check("gates", gates, {rows, directions * count * hidden});
  shapes.check("weight_hh", weight_hh, {directions, count * hidden, hidden});
  if (bias_hn && shape.cell != RnnCell::kGru) refuse(kOp, ": bias_hn was given; it belongs to the GRU alone");
  if (bias_hn) shapes.check("bias_hn", *bias_hn, {directions, hidden});

  Tensor output = new_empty(gates, {rows, directions * hidden});
  Tensor hn = new_empty(gates, {directions, batch, hidden});
  Tensor cn = c0 ? new_empty(gates, {directions, batch, hidden}) : new_empty(gates, {0});
  Tensor saved = kept > 0 ? new_empty(gates, {rows, directions * kept * hidden}) : new_empty(gates, {0});
  params.gates = gates.const_data_ptr();
  params.weight = weight_hh.const_data_ptr();
  params.bias_hn = binding::data_or_null(bias_hn);
  params.output = output.mutable_data_ptr();
  params.hn = hn.mutable_data_ptr();
  params.cn = c0 ? cn.mutable_data_ptr() : nullptr;
  params.saved = kept > 0 ? saved.mutable_data_ptr() : nullptr;

  const DeviceScope device(gates);
  Workspace workspace(gates);
  const int code = binding::dispatch_type(kOp, gates.scalar_type(), [&](auto types) {
    return rnn_forward<typename decltype(types)::T>(params, device.stream(), std::ref(workspace));
  });
  check_launch(kOp, code, shape);
  return {output, hn, cn, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_hn,
    const std::optional<Tensor>& grad_cn, const Tensor& output, const Tensor& saved, const Tensor& weight_t,
    const Tensor& h0, const std::optional<Tensor>& c0, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& lengths, int64_t cell, int64_t variant,
    const std::optional<Tensor>& zone, const std::optional<Tensor>& cell_zone, double zoneout, double cell_zoneout) {
  constexpr const char* kOp = "rnn_backward";
  if (output.dim() != 2) refuse(kOp, ": output is ", binding::describe(output), "; expected two dimensions");
  const Shapes shapes(kOp, output);
  const int64_t rows = output.size(0);
  RnnBackwardParams params{};
  params.shape = make_shape(kOp, shapes, rows, h0, c0, mask, offsets, lengths, cell, variant);
  set_zones(kOp, shapes, rows, zone, cell_zone, zoneout, cell_zoneout, params.shape);
  const RnnShape& shape = params.shape;
  const int64_t directions = shape.directions, hidden = shape.hidden, batch = shape.batch;
  const int64_t count = rnn_gates(shape.cell), kept = rnn_saved(shape.cell, shape.zoned);
  const bool is_gru = shape.cell == RnnCell::kGru;
  shapes.check("output", output, {rows, directions * hidden});
  if (kept > 0) shapes.check("saved", saved, {rows, directions * kept * hidden});
  shapes.check("weight_t", weight_t, {directions, hidden, count * hidden});
  if (grad_output) shapes.check("grad_output", *grad_output, {rows, directions * hidden});
  if (grad_hn) shapes.check("grad_hn", *grad_hn, {directions, batch, hidden});
  if (grad_cn && !c0) refuse(kOp, ": grad_cn was given; it belongs to the LSTM alone");
  if (grad_cn) shapes.check("grad_cn", *grad_cn, {directions, batch, hidden});

  Tensor grad_gates = new_empty(output, {rows, directions * count * hidden});
  Tensor grad_hidden = is_gru ? new_empty(output, {rows, directions * hidden}) : new_empty(output, {0});
  Tensor grad_h0 = new_empty(output, {directions, batch, hidden});
  Tensor grad_c0 = c0 ? new_empty(output, {directions, batch, hidden}) : new_empty(output, {0});
  params.grad_output = binding::data_or_null(grad_output);
  params.grad_hn = binding::data_or_null(grad_hn);
  params.grad_cn = binding::data_or_null(grad_cn);
  params.output = output.const_data_ptr();
  params.saved = kept > 0 ? saved.const_data_ptr() : nullptr;
  params.weight = weight_t.const_data_ptr();
  params.grad_gates = grad_gates.mutable_data_ptr();
  params.grad_hidden = is_gru ? grad_hidden.mutable_data_ptr() : nullptr;
  params.grad_h0 = grad_h0.mutable_data_ptr();
  params.grad_c0 = c0 ? grad_c0.mutable_data_ptr() : nullptr;

  const DeviceScope device(output);
  Workspace workspace(output);
  const int code = binding::dispatch_type(kOp, output.scalar_type(), [&](auto types) {
    return rnn_backward<typename decltype(types)::T>(params, device.stream(), std::ref(workspace));
  });
  check_launch(kOp, code, shape);
  return {grad_gates, grad_hidden, grad_h0, grad_c0};
}

}  // namespace
}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern_cuda, BK_DISPATCH_KEY, m) {
  m.impl("rnn_forward", TORCH_BOX(&bigkern::forward));
  m.impl("rnn_backward", TORCH_BOX(&bigkern::backward));
}
