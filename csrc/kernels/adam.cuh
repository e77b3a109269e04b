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
// operations, of them a division and a square root of some ten instructions each: below the 200 that an H100 issues in
// the time of 28 bytes.
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

namespace bigkern {
namespace adam {

// beta^step by squaring: to some hundred roundings of 1 - beta^step in double, for few registers where pow() takes
// many; made of products alone, it has the same bits on every machine.
__device__ __forceinline__ double power(double beta, float step) {
  double result = 1.0;
  for (unsigned exponent = static_cast<unsigned>(step); exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result *= beta;
    beta *= beta;
  }
  return result;
}

// A divisor that all elements share, with its reciprocal: the quotient has division's bits (Markstein, "Computation of
// elementary functions on the IBM RISC System/6000 processor", 1990), for three instructions and no subroutine, across
// which ptxas would spill.
struct Divisor {
  float value, reciprocal;

  __device__ __forceinline__ float divide(float x) const {
    const float quotient = __fmul_rn(x, reciprocal);
    const float corrected = __fmaf_rn(__fmaf_rn(-value, quotient, x), reciprocal, quotient);
    return quotient < INFINITY ? corrected : quotient;
  }
};

struct Rule {
  struct Scalars {
    optimizer_step::Lerp lerp1;
    float beta2, rest2;   // rest2 = 1 - beta2
    float step_size;      // negative
    Divisor correction2;  // sqrt(1 - beta2^t)
    float eps;
  };

  static __device__ __forceinline__ Scalars scalars(const double* hyper, int, double lr, float step) {
    const double beta1 = hyper[kBeta1Column], beta2 = hyper[kBeta2Column];
    Scalars s;
    s.lerp1 = optimizer_step::Lerp::of(static_cast<float>(1.0 - beta1));
    s.beta2 = static_cast<float>(beta2);
    s.rest2 = static_cast<float>(1.0 - beta2);
    s.step_size = static_cast<float>(-(lr / (1.0 - power(beta1, step))));
    const float correction2 = static_cast<float>(sqrt(1.0 - power(beta2, step)));
    s.correction2 = {correction2, __fdiv_rn(1.0f, correction2)};
    s.eps = static_cast<float>(hyper[kEpsColumn]);
    return s;
  }

  template <class Tile>
  class State {
   public:
    __device__ __forceinline__ State(const int64_t (&addresses)[3], const int& dtypes, const Tile& tile)
        : exp_avg_(addresses[0], dtypes, tile),
          exp_avg_sq_(addresses[1], dtypes, tile),
          max_exp_avg_sq_(addresses[2], dtypes, tile) {}

    __device__ __forceinline__ void fetch(int quad) {
      exp_avg_.fetch(quad);
      exp_avg_sq_.fetch(quad);
      if (max_exp_avg_sq_.present()) max_exp_avg_sq_.fetch(quad);
    }

    __device__ __forceinline__ void update(int quad, const Scalars& s, const float (&g)[4], float (&p)[4]) {
      // In registers they would make ptxas spill; each thread reads only its own.
      BK_SHARED(uint2, first, [3][multi_tensor::kThreads]);
      float m[4], v[4];
      exp_avg_.get(m);
      exp_avg_sq_.get(v);
      using multi_tensor::reload;
      const optimizer_step::Lerp lerp1 = {reload(s.lerp1.coefficient), reload(s.lerp1.from_start)};
      const float beta2 = reload(s.beta2), rest2 = reload(s.rest2);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        m[j] = lerp1(m[j], g[j]);
        v[j] = __fmaf_rn(__fmul_rn(rest2, g[j]), g[j], __fmul_rn(v[j], beta2));
      }
      exp_avg_.store(quad, m, first[0][threadIdx.x]);
      exp_avg_sq_.store(quad, v, first[1][threadIdx.x]);
      if (max_exp_avg_sq_.present()) {
        float largest[4];
        max_exp_avg_sq_.get(largest);
        // NaN wins, as in torch.
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = (largest[j] > v[j] || largest[j] != largest[j]) ? largest[j] : v[j];
        max_exp_avg_sq_.store(quad, v, first[2][threadIdx.x]);
      }
      const float step_size = reload(s.step_size), eps = reload(s.eps);
      const Divisor correction2 = {reload(s.correction2.value), reload(s.correction2.reciprocal)};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float denominator = __fadd_rn(correction2.divide(__fsqrt_rn(v[j])), eps);
        p[j] = __fadd_rn(p[j], __fdiv_rn(__fmul_rn(step_size, m[j]), denominator));
      }
    }

   private:
    multi_tensor::Quads<multi_tensor::Kind::kState, Tile> exp_avg_, exp_avg_sq_, max_exp_avg_sq_;
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
