// The entry point through which the planted-bug trials call the layer norm kernels that run in clusters, emulated.
#include "kernels/layer_norm.cuh"

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace {

template <int V>
int run(const bigkern::LayerNormForwardParams& forward, const bigkern::LayerNormBackwardParams& backward,
        const bigkern::Allocate& allocate) {
  const std::optional<int> first = bigkern::layer_norm::launch_forward_cluster<float, V>(forward, nullptr);
  if (!first || *first != 0) return first.value_or(-1);
  return bigkern::layer_norm::launch_backward_cluster<float, V>(backward, nullptr, allocate).value_or(-1);
}

}  // namespace

// fp32, no residual: the forward pass, then the backward pass on what it saved. 0, or an error code whose message lands
// in `error`.
extern "C" int run_layer_norm_cluster(const float* input, int64_t input_stride, const float* weight, const float* bias,
                                      const float* grad_output, float* output, float* grad_input, float* grad_weight,
                                      float* grad_bias, int64_t rows, int64_t cols, char* error, int size) {
  std::vector<float> mean(rows), rstd(rows);
  std::vector<std::unique_ptr<char[]>> workspace;
  const bigkern::Allocate allocate = [&](size_t bytes) -> void* {
    workspace.push_back(std::make_unique<char[]>(bytes));
    std::memset(workspace.back().get(), 0xff, bytes);  // NaN: unwritten workspace must show
    return workspace.back().get();
  };
  bigkern::LayerNormForwardParams forward{};
  forward.input = input;
  forward.input_stride = input_stride;
  forward.weight = weight;
  forward.bias = bias;
  forward.output = output;
  forward.mean = mean.data();
  forward.rstd = rstd.data();
  forward.rows = rows;
  forward.cols = cols;
  forward.eps = 1e-5f;
  bigkern::LayerNormBackwardParams backward{};
  backward.grad_output = grad_output;
  backward.grad_output_stride = cols;
  backward.summed = input;
  backward.summed_stride = input_stride;
  backward.mean = mean.data();
  backward.rstd = rstd.data();
  backward.weight = weight;
  backward.grad_input = grad_input;
  backward.grad_weight = grad_weight;
  backward.grad_bias = grad_bias;
  backward.rows = rows;
  backward.cols = cols;
  const int code = cols % 4 == 0 ? run<4>(forward, backward, allocate) : run<1>(forward, backward, allocate);
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}
