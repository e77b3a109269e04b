// The kernels over an optimizer's lists of tensors: Adam and AdamW, SGD, the gradients' norm and clipping. What
// csrc/torch sees of adam.cuh, sgd.cuh and grad_norm.cuh: plain C++.
#pragma once

#include "device/stream.h"
#include "kernels/multi_tensor.h"

#include <cstdint>

namespace bigkern {

// An optimizer's step. Pointers marked "or null" switch their part of the work off; all scalars are fp32.
struct StepParams {
  MultiTensor list;
  const double* hyper;      // groups x kHyperColumns
  const float* grad_scale;  // or null: the gradients are this many times too large
  const float* found_inf;   // or null: not 0 skips the step
  const float* total_norm;  // or null: gradients are multiplied by min(1, max_norm / (total_norm + 1e-6))
  float max_norm;           //
  bool zero_grads;          // the gradients are set to zero, also when the step is skipped
  const int64_t* philox;    // or null: seed and offset of the stochastic rounding
};

// Launch on the current device; 0, or an error code for error_string.
int adam_step(const StepParams& params, Stream stream);
int sgd_step(const StepParams& params, Stream stream);

// The norm of all gradients as one vector into *norm: (sum |g|^norm_type)^(1 / norm_type), or the largest |g| when
// norm_type is infinite. Of the gradients over *grad_scale unless that is null.
int grad_norm(const MultiTensor& list, double norm_type, const float* grad_scale, float* norm, Stream stream);

// The norm into *norm, then the gradients times min(1, max_norm / (norm + 1e-6)), in one cooperative launch.
int clip_grads(const MultiTensor& list, double norm_type, float max_norm, float* norm, Stream stream);

}  // namespace bigkern
