// The rules cuTensorMapEncodeTiled puts on a tensor map (CUDA driver API, "Tensor Map Object Management"), checked
// alike before a real and an emulated map is made, with a message that says which one is broken.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bigkern {

// A box of a strided tensor in global memory. Dimension 0 is innermost and contiguous.
struct TensorMapShape {
  int rank;                     // 1 to 5
  uint64_t dims[5];             // elements
  uint64_t strides[5];          // bytes; strides[i] belongs to dimension i, strides[0] is the element size
  uint32_t box[5];              // elements spanned; ceil(box / element_stride) of them are moved
  uint32_t element_strides[5];  // the hardware ignores element_strides[0]
  int swizzle;                  // 0, 32, 64 or 128 bytes
};

namespace detail {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("tensor map: " + message);
}

// strides: bytes, of dimensions 1 to rank - 1, as the driver takes them.
inline TensorMapShape tensor_map_shape(const void* global, int element_bytes, int rank, const uint64_t* dims,
                                       const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                       int swizzle) {
  require(rank >= 1 && rank <= 5, "rank " + std::to_string(rank) + " is not 1 to 5");
  require(reinterpret_cast<uintptr_t>(global) % 16 == 0, "the global address is not a multiple of 16");
  require(swizzle == 0 || swizzle == 32 || swizzle == 64 || swizzle == 128,
          "swizzle " + std::to_string(swizzle) + " is not 0, 32, 64 or 128");
  TensorMapShape shape{rank, {}, {}, {}, {}, swizzle};
  for (int i = 0; i < 5; i++) {
    const std::string at = "[" + std::to_string(i) + "] = ";
    shape.dims[i] = i < rank ? dims[i] : 1;
    shape.strides[i] = i == 0 ? element_bytes : i < rank ? strides[i - 1] : 0;
    shape.box[i] = i < rank ? box[i] : 1;
    shape.element_strides[i] = i < rank ? element_strides[i] : 1;
    require(shape.dims[i] >= 1 && shape.dims[i] <= uint64_t{1} << 32,
            "dims" + at + std::to_string(shape.dims[i]) + " is not 1 to 2^32");
    require(shape.box[i] >= 1 && shape.box[i] <= 256, "box" + at + std::to_string(shape.box[i]) + " is not 1 to 256");
    require(shape.element_strides[i] >= 1 && shape.element_strides[i] <= 8,
            "element_strides" + at + std::to_string(shape.element_strides[i]) + " is not 1 to 8");
    require(i == 0 || (shape.strides[i] % 16 == 0 && shape.strides[i] < uint64_t{1} << 40),
            "strides" + at + std::to_string(shape.strides[i]) + " is not a multiple of 16 below 2^40");
  }
  require(shape.element_strides[0] == 1, "element_strides[0] is not 1, and the hardware would ignore it");
  const uint64_t inner = uint64_t{shape.box[0]} * element_bytes;
  require(inner % 16 == 0, "the inner box of " + std::to_string(inner) + " bytes is not a multiple of 16");
  // The driver also takes narrower boxes, whose layout in shared memory it does not document.
  require(swizzle == 0 || inner == static_cast<uint64_t>(swizzle),
          "the inner box of " + std::to_string(inner) + " bytes is not the swizzle's " + std::to_string(swizzle));
  return shape;
}

}  // namespace detail
}  // namespace bigkern
