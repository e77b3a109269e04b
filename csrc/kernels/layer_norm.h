// Layer norm and RMS norm over the rows of a matrix, with an optional residual addition and dropout in the same pass.
// What csrc/torch sees of layer_norm.cuh: plain C++.
#pragma once

#include "device/stream.h"
#include "kernels/element_types.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bigkern {

// T is the type of the activations, W that of weight and bias: T, or float. Matrices are rows x cols with unit column
// stride; their row strides are counted in elements and may be anything. Outputs are contiguous. Pointers marked "or
// null" switch their part of the work off.
struct LayerNormForwardParams {
  const void* input;        // T, rows x cols
  int64_t input_stride;     //
  const void* residual;     // T, rows x cols, or null
  int64_t residual_stride;  //
  const void* weight;       // W, cols, or null
  const void* bias;         // W, cols, or null
  void* output;             // T, rows x cols
  void* summed;             // T, rows x cols: residual + dropout(input), written when there is a residual
  float* mean;              // rows, or null with rms
  float* rstd;              // rows
  const int64_t* philox;    // seed and offset, or null: no dropout
  float dropout_p;          // an element is kept when its uniform number in (0, 1] is greater than this
  float dropout_scale;      // 1 / (1 - dropout_p), the factor of kept elements; 1 without dropout
  int64_t rows, cols;       // both positive
  float eps;                //
  bool rms;                 // root mean square: neither mean nor bias
  bool float_parameters;    // W is float
};

struct LayerNormBackwardParams {
  const void* grad_output;     // T, rows x cols
  int64_t grad_output_stride;  //
  const void* grad_summed;     // T, rows x cols, or null
  int64_t grad_summed_stride;  //
  const void* summed;          // T, rows x cols: what the forward pass normalised
  int64_t summed_stride;       //
  const float* mean;           // rows, or null with rms
  const float* rstd;           // rows
  const void* weight;          // W, cols, or null
  void* grad_input;            // T, rows x cols
  void* grad_residual;         // T, rows x cols, or null: the gradient before the dropout mask
  void* grad_weight;           // W, cols, or null
  void* grad_bias;             // W, cols, or null
  const int64_t* philox;       // as in the forward pass
  float dropout_p;
  float dropout_scale;
  int64_t rows, cols;
  bool rms;
  bool float_parameters;
};

// Device memory that lives until the launched work is done.
using Allocate = std::function<void*(size_t bytes)>;

// Launch on the current device; 0, or an error code for error_string. Instances: float, __nv_bfloat16, __half.
template <class T>
int layer_norm_forward(const LayerNormForwardParams& params, Stream stream, const Allocate& allocate);

template <class T>
int layer_norm_backward(const LayerNormBackwardParams& params, Stream stream, const Allocate& allocate);

}  // namespace bigkern
