// What the bindings share: checks that keep the kernels inside their tensors, dtype dispatch, device, stream and
// memory. On torch's stable ABI, so that one object serves every torch from TORCH_TARGET_VERSION on. Messages meant for
// users come from Python, which checks first; these name the argument, what it is and what it must be.
#pragma once

#include "device/stream.h"
#include "kernels/element_types.h"
#include "kernels/launch_error.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// The dispatch key the kernels are registered under: CUDA, or CPU in the emulated build.
#ifndef BK_DISPATCH_KEY
#define BK_DISPATCH_KEY CUDA
#endif

// Defined by libtorch_cuda alone. Weak: null under a torch without CUDA, where the object must load all the same.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace bigkern {

// Hidden as torch's stable namespace is, whose types these classes hold.
namespace [[gnu::visibility("hidden")]] binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); i++) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << "] on " << (tensor.is_cuda() ? "cuda:" : tensor.is_cpu() ? "cpu:" : "device ") << tensor.get_device_index();
  return text.str();
}

// One op's checks; `like` is the tensor whose device and dtype the others are held to.
class Checks {
 public:
  Checks(const char* op, const Tensor& like) : op_(op), like_(like) {}

  // rows x cols with unit column stride.
  void matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t cols) const {
    device(name, tensor);
    if (tensor.scalar_type() != like_.scalar_type() || tensor.dim() != 2 || tensor.size(0) != rows ||
        tensor.size(1) != cols) {
      refuse(op_, ": ", name, " is ", describe(tensor), "; expected ", torch::headeronly::toString(like_.scalar_type()),
             " [", rows, ", ", cols, "]");
    }
    if (tensor.stride(1) != 1 && cols > 1 && rows > 0) {
      refuse(op_, ": ", name, " has column stride ", tensor.stride(1), "; expected 1: pass a contiguous tensor");
    }
  }

  void vector(const char* name, const Tensor& tensor, int64_t size, ScalarType dtype) const {
    device(name, tensor);
    if (tensor.scalar_type() != dtype || tensor.dim() != 1 || tensor.size(0) != size || !tensor.is_contiguous()) {
      refuse(op_, ": ", name, " is ", describe(tensor), "; expected a contiguous ", torch::headeronly::toString(dtype),
             " [", size, "]");
    }
  }

 private:
  void device(const char* name, const Tensor& tensor) const {
    if (tensor.is_cuda() != like_.is_cuda() || tensor.get_device_index() != like_.get_device_index()) {
      refuse(op_, ": ", name, " is ", describe(tensor), "; expected the device of the other tensors, ",
             describe(like_));
    }
  }

  const char* op_;
  const Tensor& like_;
};

// What a row stride counts for; of a single row torch may report anything.
inline int64_t row_stride(const Tensor& matrix) {
  return matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1);
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Makes the tensor's device current while it lives and knows torch's current stream there.
class DeviceScope {
 public:
#if defined(BK_EMULATE)
  explicit DeviceScope(const Tensor&) {}
#else
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) refuse("bigkern: this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif

  Stream stream() const { return stream_; }

 private:
#if !defined(BK_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

// Memory for a launcher's intermediate results, from torch's allocator, whose stream order keeps it until the launched
// work is done.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  void* operator()(size_t bytes) {
    blocks_.push_back(torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return blocks_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> blocks_;
};

template <class Element>
struct Type {
  using T = Element;
};

// Calls f with the Type of the elements.
template <class F>
int dispatch_type(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float) return f(Type<float>{});
  if (dtype == ScalarType::BFloat16) return f(Type<__nv_bfloat16>{});
  if (dtype == ScalarType::Half) return f(Type<__half>{});
  refuse(op, ": no kernel for ", torch::headeronly::toString(dtype), "; supported are Float, BFloat16 and Half");
}

inline void check_launch(const char* op, int code) {
  if (code != 0) refuse(op, ": ", launch_error(code));
}

}  // namespace binding
}  // namespace bigkern
