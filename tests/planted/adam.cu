// The entry point through which the planted-bug trials call Adam's kernel and the clipping of gradients, emulated.
#include "kernels/adam.cuh"
#include "kernels/grad_norm.cuh"

#include <cstring>

// One clipping of the gradients to max_norm, then one step. 0, or an error code whose message lands in `error`.
extern "C" int run_adam(const int64_t* tensors, const int64_t* chunk_ends, const int64_t* grads, int64_t count,
                        const double* hyper, int64_t* scratch, float max_norm, float* norm, char* error, int size) {
  bigkern::StepParams params{};
  params.list = {tensors, chunk_ends, grads, scratch, count};
  params.hyper = hyper;
  int code = bigkern::clip_grads(params.list, 2.0, max_norm, norm, nullptr);
  if (code == 0) code = bigkern::adam_step(params, nullptr);
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}
