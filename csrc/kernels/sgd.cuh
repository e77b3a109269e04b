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

  static __device__ __forceinline__ Scalars scalars(const double* hyper, int flags, double lr, double step) {
    Scalars s;
    s.step_size = static_cast<float>(-lr);
    s.momentum = static_cast<float>(hyper[kMomentumColumn]);
    s.rest = static_cast<float>(1.0 - hyper[kDampeningColumn]);
    s.nesterov = flags & kNesterov;
    s.first = step == 1.0;
    return s;
  }

  template <class M, class Tile>
  class State {
   public:
    __device__ __forceinline__ State(const int64_t (&addresses)[3], const Tile& tile)
        : buffer_(addresses[0], tile), has_buffer_(addresses[0] != 0) {}

    __device__ __forceinline__ void load(int quad) {
      if (has_buffer_) buffer_.load(quad, b_);
    }

    __device__ __forceinline__ void update(const Scalars& s, const float (&g)[4], float (&p)[4]) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float direction = g[j];
        if (has_buffer_) {
          b_[j] = s.first ? g[j] : __fmaf_rn(s.rest, g[j], __fmul_rn(b_[j], s.momentum));
          direction = s.nesterov ? __fmaf_rn(s.momentum, b_[j], g[j]) : b_[j];
        }
        p[j] = __fmaf_rn(s.step_size, direction, p[j]);
      }
    }

    __device__ __forceinline__ void store(int quad) {
      if (has_buffer_) buffer_.store(quad, b_);
    }

   private:
    multi_tensor::Quads<M, Tile> buffer_;
    bool has_buffer_;
    float b_[4];
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
