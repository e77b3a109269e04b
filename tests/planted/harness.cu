// The entry points the planted-bug trials call through ctypes: the layer norm kernels and the tile kernel, emulated.
#include "kernels/layer_norm.cuh"

#include "emulator/options.h"
#include "tile_gemm.cuh"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

int report(int code, char* error, int size) {
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}

}  // namespace

extern "C" void set_schedule(int order, uint64_t seed) {
  auto& options = bigkern::emulator::options();
  options.order = static_cast<bigkern::emulator::Order>(order);
  options.seed = seed;
  options.workers = 1;
}

extern "C" int run_tile_gemm(const void* a, const void* b, float* c, int m, int n, int k, char* error, int size) {
  const bigkern::TileGemmParams params{static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c,
                                       m, n, k};
  return report(bigkern::tile_gemm(params, nullptr), error, size);
}

// fp32, no residual: the forward pass, then the backward pass on what it saved.
extern "C" int run_layer_norm(const float* input, int64_t input_stride, const float* weight, const float* bias,
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
  if (int code = bigkern::layer_norm_forward<float, float>(forward, nullptr, allocate)) {
    return report(code, error, size);
  }
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
  return report(bigkern::layer_norm_backward<float, float>(backward, nullptr, allocate), error, size);
}
