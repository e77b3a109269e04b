// The norm of all gradients of a list as one vector, and its clipping as torch.nn.utils.clip_grad_norm_.
//
// Floor: bound by memory: the gradients read once, 4 bytes a parameter in fp32. Clipping multiplies them in the same
// cooperative launch, 12 bytes a parameter, and leaves them alone when the norm is within its limit.
//
// Numerics: a thread adds four fp32 terms at a time to a double. Blocks' sums are added in double in a fixed order, by
// the block that ends last (clipping: by all, behind a barrier of the grid): equal inputs give equal bits on the same
// device.
#pragma once

#include "kernels/adam.h"
#include "kernels/multi_tensor.cuh"

#include <cmath>

namespace bigkern {
namespace grad_norm_detail {

using namespace multi_tensor;

enum class Terms { kSquares, kAbsolutes, kLargest, kPowers };

struct Norm {
  Terms terms;
  float power;

  __device__ __forceinline__ float term(float x) const {
    if (terms == Terms::kSquares) return x * x;
    return terms == Terms::kPowers ? powf(fabsf(x), power) : fabsf(x);
  }
  // NaN wins the maximum, as in torch.
  template <class Number>
  __device__ __forceinline__ Number combine(Number a, Number b) const {
    if (terms == Terms::kLargest) return (a > b || a != a) ? a : b;
    return a + b;
  }
  __device__ __forceinline__ double finish(double total) const {
    if (terms == Terms::kSquares) return sqrt(total);
    return terms == Terms::kPowers ? pow(total, 1.0 / power) : total;
  }
};

struct Job {
  int64_t grad, numel;
  int dtypes;
  bool aligned;
};

__device__ __forceinline__ void open_job(const MultiTensor& list, Job& job, int tensor) {
  const int64_t* row = list.tensors + int64_t{tensor} * kTensorColumns;
  job.grad = list.grads[tensor];
  job.numel = row[kNumelColumn];
  job.dtypes = static_cast<int>(row[kDtypesColumn]);
  job.aligned = job.grad % 16 == 0;
}

// Calls f(quads, quad) for each four gradients of this thread.
template <class F>
__device__ __forceinline__ void for_each_quad(const MultiTensor& list, F&& f) {
  const auto open = [&](Job& job, const Job*, int tensor, int) { open_job(list, job, tensor); };
  for_each_tensor<Job>(list, open, [&](const Job& job, const Chunks& chunks) {
    for_each_tile(chunks, job.numel, job.aligned, [&](const auto& tile) {
      Quads<Kind::kParam, std::decay_t<decltype(tile)>> grad(job.grad, job.dtypes, tile);
#pragma unroll
      for (int quad = 0; quad < 2; quad++) f(grad, quad);
    });
  });
}

// Over the block's threads in a fixed order, in all of them.
__device__ __forceinline__ double block_combine(const Norm& norm, double value) {
  BK_SHARED(double, values, [kThreads]);
  __syncthreads();  // the readers of an earlier call are done
  values[threadIdx.x] = value;
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      values[threadIdx.x] = norm.combine(values[threadIdx.x], values[threadIdx.x + half]);
    }
  }
  __syncthreads();
  return values[0];
}

// This block's part into its place of the scratch memory.
__device__ __forceinline__ void reduce_own(const MultiTensor& list, const Norm& norm) {
  double own = 0.0;
  for_each_quad(list, [&](auto& grad, int quad) {
    float g[4];  // 0 past the end, which adds nothing
    grad.fetch(quad);
    grad.get(g);
    const float pair = norm.combine(norm.term(g[0]), norm.term(g[1]));
    own = norm.combine(own, static_cast<double>(norm.combine(pair, norm.combine(norm.term(g[2]), norm.term(g[3])))));
  });
  own = block_combine(norm, own);
  if (threadIdx.x == 0) block_partials(list)[blockIdx.x] = own;
}

// The norm, from all blocks' parts.
__device__ __forceinline__ double reduce_all(const MultiTensor& list, const Norm& norm) {
  double total = 0.0;
  for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
    total = norm.combine(total, __ldcg(block_partials(list) + block));
  }
  return norm.finish(block_combine(norm, total));
}

inline Norm make_norm(double norm_type) {
  const Terms terms = norm_type == 2.0        ? Terms::kSquares
                      : norm_type == 1.0      ? Terms::kAbsolutes
                      : std::isinf(norm_type) ? Terms::kLargest
                                              : Terms::kPowers;
  return {terms, static_cast<float>(norm_type)};
}

}  // namespace grad_norm_detail

__global__ void __launch_bounds__(multi_tensor::kThreads, multi_tensor::kBlocksPerMultiprocessor)
    grad_norm_kernel(const MultiTensor list, grad_norm_detail::Norm norm, const float* grad_scale, float* result) {
  using namespace grad_norm_detail;
  reduce_own(list, norm);
  if (!is_last_block(finished_blocks(list))) return;
  const double total = reduce_all(list, norm);
  if (threadIdx.x == 0) {
    *result = static_cast<float>(grad_scale != nullptr ? total / *grad_scale : total);
    *finished_blocks(list) = 0;
  }
}

__global__ void __launch_bounds__(multi_tensor::kThreads, multi_tensor::kBlocksPerMultiprocessor)
    clip_grads_kernel(const MultiTensor list, grad_norm_detail::Norm norm, float max_norm, float* result) {
  using namespace grad_norm_detail;
  reduce_own(list, norm);
  unsigned* const arrived = finished_blocks(list) + 1;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (ld_acquire(arrived) < gridDim.x) __nanosleep(100);
  }
  __syncthreads();
  const float total = static_cast<float>(reduce_all(list, norm));
  if (blockIdx.x == 0 && threadIdx.x == 0) *result = total;
  const float coefficient = clip_coefficient(total, max_norm);
  if (coefficient != 1.0f) {
    for_each_quad(list, [&](auto& grad, int quad) {
      float g[4];
      grad.fetch(quad);
      grad.get(g);
#pragma unroll
      for (int j = 0; j < 4; j++) g[j] = __fmul_rn(g[j], coefficient);
      grad.store(quad, g);
    });
  }
  if (is_last_block(finished_blocks(list)) && threadIdx.x == 0) {
    *finished_blocks(list) = 0;
    *arrived = 0;
  }
}

int grad_norm(const MultiTensor& list, double norm_type, const float* grad_scale, float* norm, Stream stream) {
  return multi_tensor::launch_persistent(grad_norm_kernel, false, stream, list, grad_norm_detail::make_norm(norm_type),
                                         grad_scale, norm);
}

int clip_grads(const MultiTensor& list, double norm_type, float max_norm, float* norm, Stream stream) {
  return multi_tensor::launch_persistent(clip_grads_kernel, true, stream, list, grad_norm_detail::make_norm(norm_type),
                                         max_norm, norm);
}

}  // namespace bigkern
