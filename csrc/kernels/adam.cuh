// Adam (Kingma, Ba: "Adam: a method for stochastic optimization", ICLR 2015), AdamW (Loshchilov, Hutter: "Decoupled
// weight decay regularization", ICLR 2019) and amsgrad (Reddi, Kale, Kumar: "On the convergence of Adam and beyond",
// ICLR 2018): one launch for every parameter of an optimizer.
//
// For each element of a tensor at step t, after what optimizer_step.cuh does to g and p:
//     m = lerp(m, g, 1 - beta1)
//     v = beta2 v + (1 - beta2) g^2                amsgrad: u = max(u, v), and u in place of v below
//     p = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//
// Floor: bound by memory. Each array is read and written once, the gradient read: 28 bytes a parameter in fp32, 14 all
// in bfloat16, 28 for a bfloat16 parameter and gradient with fp32 master weights and moments (the parameter is only
// written), 8 more with amsgrad in fp32 or a moving average, and the gradient's size with zero_grads. About 20
// operations, of them two divisions and a square root: some 60 instructions, a third of what an H100 issues in the time
// of 28 bytes.
//
// Numerics: elements in fp32, scalars (bias corrections, step size) in double by one thread a tensor. The update takes
// the fp32 moments before they are rounded for storing. Between torch's CPU optimizer and these bits stands only its
// square root, which MKL may round the other way.
//
// Expected: at 1e9 parameters the time of 28 GB at the copy rate; a list of small tensors, about 2 us for each tensor
// in a block's run, with some 500 blocks side by side. Not measured.
#pragma once

#include "kernels/adam.h"
#include "kernels/optimizer_step.cuh"

#include <cmath>

namespace bigkern {
namespace adam {

struct Rule {
  struct Scalars {
    optimizer_step::Lerp lerp1;
    float beta2, rest2;  // rest2 = 1 - beta2
    float step_size;     // negative
    float correction2;   // sqrt(1 - beta2^t)
    float eps;
  };

  static __device__ __forceinline__ Scalars scalars(const double* hyper, int, double lr, double step) {
    const double beta1 = hyper[kBeta1Column], beta2 = hyper[kBeta2Column];
    Scalars s;
    s.lerp1 = optimizer_step::Lerp::of(static_cast<float>(1.0 - beta1));
    s.beta2 = static_cast<float>(beta2);
    s.rest2 = static_cast<float>(1.0 - beta2);
    s.step_size = static_cast<float>(-(lr / (1.0 - pow(beta1, step))));
    s.correction2 = static_cast<float>(sqrt(1.0 - pow(beta2, step)));
    s.eps = static_cast<float>(hyper[kEpsColumn]);
    return s;
  }

  template <class M, class Tile>
  class State {
   public:
    __device__ __forceinline__ State(const int64_t (&addresses)[3], const Tile& tile)
        : exp_avg_(addresses[0], tile),
          exp_avg_sq_(addresses[1], tile),
          max_exp_avg_sq_(addresses[2], tile),
          amsgrad_(addresses[2] != 0) {}

    __device__ __forceinline__ void load(int quad) {
      exp_avg_.load(quad, m_);
      exp_avg_sq_.load(quad, v_);
      if (amsgrad_) max_exp_avg_sq_.load(quad, max_);
    }

    __device__ __forceinline__ void update(const Scalars& s, const float (&g)[4], float (&p)[4]) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        m_[j] = s.lerp1(m_[j], g[j]);
        v_[j] = __fmaf_rn(__fmul_rn(s.rest2, g[j]), g[j], __fmul_rn(v_[j], s.beta2));
        float square = v_[j];
        if (amsgrad_) square = max_[j] = (max_[j] > v_[j] || max_[j] != max_[j]) ? max_[j] : v_[j];
        const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(square), s.correction2), s.eps);
        p[j] = __fadd_rn(p[j], __fdiv_rn(__fmul_rn(s.step_size, m_[j]), denominator));
      }
    }

    __device__ __forceinline__ void store(int quad) {
      exp_avg_.store(quad, m_);
      exp_avg_sq_.store(quad, v_);
      if (amsgrad_) max_exp_avg_sq_.store(quad, max_);
    }

   private:
    multi_tensor::Quads<M, Tile> exp_avg_, exp_avg_sq_, max_exp_avg_sq_;
    bool amsgrad_;
    float m_[4], v_[4], max_[4];
  };
};

}  // namespace adam

__global__ void __launch_bounds__(multi_tensor::kThreads, multi_tensor::kBlocksPerMultiprocessor)
    adam_step_kernel(const StepParams params) {
  optimizer_step::step<adam::Rule>(params);
}

int adam_step(const StepParams& params, Stream stream) {
  return multi_tensor::launch_persistent(adam_step_kernel, false, stream, params);
}

}  // namespace bigkern
