// Stochastic gradient descent with momentum, as torch.optim.SGD: one launch for every parameter of an optimizer.
//
// For each element of a tensor, after what optimizer_step.cuh does to g and p:
//     b = momentum b + (1 - dampening) g          the first time b = g
//     g = g + momentum b with nesterov, else b    without momentum g itself
//     p = p - lr g
//
// Floor: bound by memory: 12 bytes a parameter in fp32, 20 with momentum.
#pragma once

#include "kernels/adam.h"
#include "kernels/optimizer_step.cuh"

namespace bigkern {
namespace sgd {

struct Rule {
  struct Scalars {
    float step_size;  // negative
    float momentum, rest;
    bool nesterov, first;
  };

  static __device__ __forceinline__ Scalars scalars(const double* hyper, int flags, double lr, float step) {
    Scalars s;
    s.step_size = static_cast<float>(-lr);
    s.momentum = static_cast<float>(hyper[kMomentumColumn]);
    s.rest = static_cast<float>(1.0 - hyper[kDampeningColumn]);
    s.nesterov = flags & kNesterov;
    s.first = step == 1.0f;
    return s;
  }

  template <class Tile>
  class State {
   public:
    __device__ __forceinline__ State(const int64_t (&addresses)[3], const int& dtypes, const Tile& tile)
        : buffer_(addresses[0], dtypes, tile) {}

    __device__ __forceinline__ void fetch(int quad) {
      if (buffer_.present()) buffer_.fetch(quad);
    }

    __device__ __forceinline__ void update(int quad, const Scalars& s, const float (&g)[4], float (&p)[4]) {
      float direction[4] = {g[0], g[1], g[2], g[3]};
      if (buffer_.present()) {
        float b[4];
        buffer_.get(b);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          b[j] = s.first ? g[j] : __fmaf_rn(s.rest, g[j], __fmul_rn(b[j], s.momentum));
          direction[j] = s.nesterov ? __fmaf_rn(s.momentum, b[j], g[j]) : b[j];
        }
        buffer_.store(quad, b);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) p[j] = __fmaf_rn(s.step_size, direction[j], p[j]);
    }

   private:
    multi_tensor::Quads<multi_tensor::Kind::kState, Tile> buffer_;
  };
};

}  // namespace sgd

__global__ void __launch_bounds__(multi_tensor::kThreads, multi_tensor::kBlocksPerMultiprocessor)
    sgd_step_kernel(const StepParams params) {
  optimizer_step::step<sgd::Rule>(params);
}

int sgd_step(const StepParams& params, Stream stream) {
  return multi_tensor::launch_persistent(sgd_step_kernel, false, stream, params);
}

}  // namespace bigkern
