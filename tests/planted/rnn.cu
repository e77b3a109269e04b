// The entry point through which the planted-bug trials call the recurrent kernels, emulated.
#include "kernels/rnn.cuh"

#include <cstring>
#include <memory>
#include <vector>

// An LSTM layer in bf16 with packed sequences: the forward pass, then the backward pass on what it saved. 0, or an
// error code whose message lands in `error`.
extern "C" int run_rnn(const void* gates, const void* weight, const void* weight_t, const void* h0, const void* c0,
                       const int64_t* offsets, const int64_t* lengths, const void* grad_output, void* output, void* hn,
                       void* cn, void* saved, void* grad_gates, void* grad_h0, void* grad_c0, int64_t steps,
                       int64_t batch, int hidden, int directions, int variant, char* error, int size) {
  using T = __nv_bfloat16;
  std::vector<std::unique_ptr<char[]>> workspace;
  const bigkern::Allocate allocate = [&](size_t bytes) -> void* {
    workspace.push_back(std::make_unique<char[]>(bytes));
    std::memset(workspace.back().get(), 0xff, bytes);  // NaN: unwritten workspace must show
    return workspace.back().get();
  };
  bigkern::RnnForwardParams forward{};
  forward.shape.h0 = h0;
  forward.shape.c0 = c0;
  forward.shape.offsets = offsets;
  forward.shape.lengths = lengths;
  forward.shape.steps = steps;
  forward.shape.batch = batch;
  forward.shape.hidden = hidden;
  forward.shape.directions = directions;
  forward.shape.cell = bigkern::RnnCell::kLstm;
  forward.shape.variant = static_cast<bigkern::RnnVariant>(variant);
  forward.gates = gates;
  forward.weight = weight;
  forward.output = output;
  forward.hn = hn;
  forward.cn = cn;
  forward.saved = saved;
  int code = bigkern::detail::forward_cell<bigkern::LstmCell<T>, T>(forward, nullptr, allocate);
  bigkern::RnnBackwardParams backward{};
  backward.shape = forward.shape;
  backward.grad_output = grad_output;
  backward.output = output;
  backward.saved = saved;
  backward.weight = weight_t;
  backward.grad_gates = grad_gates;
  backward.grad_h0 = grad_h0;
  backward.grad_c0 = grad_c0;
  if (code == 0) code = bigkern::detail::backward_cell<bigkern::LstmCell<T>, T>(backward, nullptr, allocate);
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}
