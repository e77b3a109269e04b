// Two-dimensional convolution with bias, activation and max pool, and its gradients. What csrc/torch sees of conv.cuh:
// plain C++.
#pragma once

#include "device/stream.h"
#include "kernels/element_types.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bigkern {

// An N x C x H x W tensor of any strides, in elements. Weights are K x C / groups x R x S.
struct ConvTensor {
  const void* data;
  int64_t image, channel, row, column;
};

// Of images and what they become: (P, Q) is the size of the plain convolution, before pooling.
struct ConvShape {
  int64_t images;
  int channels, height, width;  // C, H, W
  int filters;                  // K
  int kernel_h, kernel_w;       // R, S
  int out_h, out_w;             // P, Q
  int stride_h, stride_w;
  int padding_h, padding_w;
  int dilation_h, dilation_w;
  int groups;
};

// In the order of ACTIVATIONS in bigkern/ops/conv/_schema.py.
enum class ConvActivation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// Windows of a max pool over the P x Q places; kernel_h is 0 where there is none. Padding never wins.
struct ConvPool {
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int padding_h, padding_w;
  int out_h, out_w;
};

// Results are dense: N x K x H x W, or N x H x W x K where channels_last says so.
struct ConvForwardParams {
  ConvShape shape;
  ConvPool pool;
  ConvActivation activation;
  ConvTensor input;
  ConvTensor weight;
  const void* bias;      // T, K, or null
  const void* residual;  // T, added before the activation, dense as output; null, and always so with a pool
  void* output;          // T, of the pool's size where there is one
  void* preactivation;   // T, as output, or null: what the activation was given where output comes from
  uint8_t* argmax;       // as output, or null: the place in the window of the first maximum, of NaNs the last
  bool channels_last;
  bool tf32;
};

struct ConvBackwardEpilogueParams {
  int64_t images;
  int filters, out_h, out_w;  // N, K, P, Q
  ConvPool pool;
  ConvActivation activation;
  ConvTensor grad_output;
  ConvTensor output;         // read with kRelu
  ConvTensor preactivation;  // read with the activations after it
  ConvTensor argmax;         // uint8, read with a pool
  void* grad_conv;           // T, N x P x Q x K
};

struct ConvBackwardInputParams {
  ConvShape shape;
  ConvTensor grad_conv;
  ConvTensor weight;
  void* grad_input;  // T
  bool channels_last;
  bool tf32;
};

struct ConvBackwardWeightParams {
  ConvShape shape;
  ConvTensor grad_conv;
  ConvTensor input;
  void* grad_weight;  // T, K x C / groups x R x S, or K x R x S x C / groups
  void* grad_bias;    // T, K, or null
  bool channels_last;
  bool tf32;
};

// Device memory that lives until the launched work is done.
using Allocate = std::function<void*(size_t bytes)>;

// Launch on the current device; 0, or an error code for error_string. T is float, __nv_bfloat16 or __half.
template <class T>
int conv_forward(const ConvForwardParams& params, Stream stream, const Allocate& allocate);

template <class T>
int conv_backward_epilogue(const ConvBackwardEpilogueParams& params, Stream stream, const Allocate& allocate);

template <class T>
int conv_backward_input(const ConvBackwardInputParams& params, Stream stream, const Allocate& allocate);

template <class T>
int conv_backward_weight(const ConvBackwardWeightParams& params, Stream stream, const Allocate& allocate);

}  // namespace bigkern
