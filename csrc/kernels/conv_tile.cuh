// The product of one tile, on tensor cores or by fused multiply-adds, from operands in shared memory.
//
// Shared memory holds an operand in rows of 16-byte chunks, whose places are permuted so that neither the copies into
// it nor the fragments' loads meet in a bank (32 banks of 4 bytes; 8 lanes of a 16-byte access at a time):
//   k-major, 64-byte rows (conv_gemm.cuh): chunk c of row r lies at c ^ (r / 2 % 4). Two rows fill the 128 bytes of all
//     banks. ldmatrix reads one chunk of 8 consecutive rows: 4 pairs, 4 different permutations, 2 halves. A copy's 8
//     lanes write two whole rows.
//   mn-major, rows of 128 bytes or a multiple (conv_weight.cuh): 16-bit: chunk c of row k lies at c ^ (k % 8), so the 8
//     rows of one chunk that ldmatrix.trans reads lie in 8 different places. 32-bit: c ^ (2 (k % 4)): a TF32 fragment
//     reads 4 rows of two neighbouring chunks by single words.
#pragma once

#include "device/device.cuh"

#include <cstdint>
#include <type_traits>

namespace bigkern {
namespace conv {

// How elements are multiplied; fp32 has both.
struct TensorCores {};
struct FusedMultiplyAdd {};

template <class T>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    mma_m16n8k16_bf16(d, a, b);
  } else if constexpr (std::is_same_v<T, __half>) {
    mma_m16n8k16_f16(d, a, b);
  } else {
    mma_m16n8k8_tf32(d, a, b);
  }
}

// fp32 as mma takes it; 16-bit elements as they are.
template <class T, int N>
__device__ __forceinline__ void round_fragment(uint32_t (&fragment)[N]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < N; i++) fragment[i] = to_tf32(__uint_as_float(fragment[i]));
  }
}

// kM x kN of the product by kWarpsM x kWarpsN warps, in steps of kK of the reduced axis.
template <class T, int kM_, int kN_, int kWarpsM_, int kWarpsN_, bool kMnMajor_ = false>
struct TileShape {
  static constexpr bool kMnMajor = kMnMajor_;
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kVector = 16 / sizeof(T);  // elements of a chunk
  static constexpr int kK = 64 / sizeof(T);       // of the reduced axis in a step: 32 or 16
};

// Element (row, 0) of a chunk in a k-major operand.
template <class T>
__device__ __forceinline__ T* k_major(T* operand, int row, int chunk) {
  return operand + row * (64 / static_cast<int>(sizeof(T))) +
         (chunk ^ (row >> 1 & 3)) * (16 / static_cast<int>(sizeof(T)));
}

// The same in an mn-major operand of kWidth elements a row.
template <int kWidth, class T>
__device__ __forceinline__ T* mn_major(T* operand, int row, int chunk) {
  const int permuted = chunk ^ (sizeof(T) == 2 ? row & 7 : (row & 3) << 1);
  return operand + row * kWidth + permuted * (16 / static_cast<int>(sizeof(T)));
}

template <class T, class Shape, class Product>
struct Accumulators;

// Warps of kM / kWarpsM x kN / kWarpsN, fragments as mma.sync has them.
template <class T, class Shape>
struct Accumulators<T, Shape, TensorCores> {
  static constexpr int kRows = Shape::kM / Shape::kWarpsM, kCols = Shape::kN / Shape::kWarpsN;
  static constexpr int kFragmentsM = kRows / 16, kFragmentsN = kCols / 8;
  static_assert(kRows % 16 == 0 && kCols % 16 == 0, "two fragments of b come from one ldmatrix");
  float values[kFragmentsM][kFragmentsN][4] = {};

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / Shape::kWarpsN * kRows; }
  static __device__ __forceinline__ int first_col() { return threadIdx.x / 32 % Shape::kWarpsN * kCols; }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[kFragmentsM][4], uint32_t (&b)[4], int j) {
    round_fragment<T>(b);
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < kFragmentsM; i++) {
      multiply_fragments<T>(values[i][2 * j], a[i], left);
      multiply_fragments<T>(values[i][2 * j + 1], a[i], right);
    }
  }

  // Adds the product of a, kM x kK, and b, kN x kK, both k-major. A chunk of fp32 makes the same fragment by bytes: mma
  // takes half as many.
  __device__ __forceinline__ void add_k_major(const T* a, const T* b) {
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk += 2) {
      uint32_t a_part[kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; i++) {
        ldmatrix_x4(a_part[i], k_major(a, first_row() + 16 * i + lane() % 16, chunk + lane() / 16));
        round_fragment<T>(a_part[i]);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; j++) {
        uint32_t b_part[4];
        ldmatrix_x4(b_part, k_major(b, first_col() + 16 * j + lane() % 8 + lane() / 16 * 8, chunk + lane() / 8 % 2));
        multiply(a_part, b_part, j);
      }
    }
  }

  // The same of a, kK x kM, and b, kK x kN.
  __device__ __forceinline__ void add_mn_major(const T* a, const T* b) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < Shape::kK; k += 16) {
        uint32_t a_part[kFragmentsM][4];
#pragma unroll
        for (int i = 0; i < kFragmentsM; i++) {
          ldmatrix_x4_trans(a_part[i], mn_major<Shape::kM>(a, k + lane() / 16 * 8 + lane() % 8,
                                                           (first_row() + 16 * i) / 8 + lane() / 8 % 2));
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN / 2; j++) {
          uint32_t b_part[4];
          ldmatrix_x4_trans(b_part, mn_major<Shape::kN>(b, k + lane() % 16, (first_col() + 16 * j) / 8 + lane() / 16));
          multiply(a_part, b_part, j);
        }
      }
    } else {
      const int g = lane() / 4, t = lane() % 4;
      auto word = [](const T* chunk, int offset) { return __float_as_uint(chunk[offset]); };
#pragma unroll
      for (int k = 0; k < Shape::kK; k += 8) {
        uint32_t a_part[kFragmentsM][4];
#pragma unroll
        for (int i = 0; i < kFragmentsM; i++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int row = first_row() + 16 * i + g + e % 2 * 8;
            a_part[i][e] = word(mn_major<Shape::kM>(a, k + t + e / 2 * 4, row / 4), row % 4);
          }
          round_fragment<T>(a_part[i]);
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN / 2; j++) {
          uint32_t b_part[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int col = first_col() + 16 * j + g + e / 2 * 8;
            b_part[e] = word(mn_major<Shape::kN>(b, k + t + e % 2 * 4, col / 4), col % 4);
          }
          multiply(a_part, b_part, j);
        }
      }
    }
  }

  // put(row, col, first, second) for every pair of neighbours.
  template <class Put>
  __device__ __forceinline__ void each(Put&& put) const {
#pragma unroll
    for (int i = 0; i < kFragmentsM; i++) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          put(first_row() + 16 * i + lane() / 4 + 8 * half, first_col() + 8 * j + lane() % 4 * 2,
              values[i][j][2 * half], values[i][j][2 * half + 1]);
        }
      }
    }
  }
};

// By fused multiply-adds, whose results a thread has of rows and columns apart from each other, so that a warp's loads
// of an operand fall into different banks or on the same word.
template <class T, class Shape>
struct Accumulators<T, Shape, FusedMultiplyAdd> {
  static_assert(std::is_same_v<T, float>, "16-bit elements are multiplied by tensor cores");
  static constexpr int kRows = Shape::kM / Shape::kWarpsM / 4, kCols = Shape::kN / Shape::kWarpsN / 8;
  float values[kRows][kCols] = {};

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // k-major: 8 lanes read one chunk of 8 neighbouring rows of b. mn-major: 8 neighbouring chunks of one row.
  static __device__ __forceinline__ int row(int i) {
    const int first = threadIdx.x / 32 / Shape::kWarpsN * (Shape::kM / Shape::kWarpsM);
    return first + (Shape::kMnMajor ? i / 4 * 16 + lane() / 8 * 4 + i % 4 : 4 * i + lane() / 8);
  }
  static __device__ __forceinline__ int col(int j) {
    const int first = threadIdx.x / 32 % Shape::kWarpsN * (Shape::kN / Shape::kWarpsN);
    return first + (Shape::kMnMajor ? j / 4 * 32 + lane() % 8 * 4 + j % 4 : 8 * j + lane() % 8);
  }

  __device__ __forceinline__ void add_k_major(const float* a, const float* b) {
#pragma unroll 1
    for (int chunk = 0; chunk < 4; chunk++) {
      float4 a_part[kRows];
#pragma unroll
      for (int i = 0; i < kRows; i++) a_part[i] = *reinterpret_cast<const float4*>(k_major(a, row(i), chunk));
#pragma unroll
      for (int j = 0; j < kCols; j++) {
        const float4 b_part = *reinterpret_cast<const float4*>(k_major(b, col(j), chunk));
#pragma unroll
        for (int i = 0; i < kRows; i++) {
          float sum = a_part[i].x * b_part.x;
          sum = fmaf(a_part[i].y, b_part.y, sum);
          sum = fmaf(a_part[i].z, b_part.z, sum);
          values[i][j] += fmaf(a_part[i].w, b_part.w, sum);
        }
      }
    }
  }

  __device__ __forceinline__ void add_mn_major(const float* a, const float* b) {
    static_assert(kRows % 4 == 0 && kCols % 4 == 0, "whole chunks");
#pragma unroll 1
    for (int k = 0; k < Shape::kK; k += 4) {
      float4 b_part[4][kCols / 4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int j = 0; j < kCols / 4; j++) {
          b_part[e][j] = *reinterpret_cast<const float4*>(mn_major<Shape::kN>(b, k + e, col(4 * j) / 4));
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        float4 a_part[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          a_part[e] = *reinterpret_cast<const float4*>(mn_major<Shape::kM>(a, k + e, row(i) / 4));
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
          for (int j = 0; j < kCols; j++) {
            float sum = 0.0f;
#pragma unroll
            for (int e = 0; e < 4; e++) {
              sum = fmaf(component(a_part[e], r), component(b_part[e][j / 4], j % 4), sum);
            }
            values[i + r][j] += sum;
          }
        }
      }
    }
  }

  // put(row, col, value) for every result.
  template <class Put>
  __device__ __forceinline__ void each(Put&& put) const {
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
      for (int j = 0; j < kCols; j++) put(row(i), col(j), values[i][j]);
    }
  }

 private:
  static __device__ __forceinline__ float component(const float4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
};

}  // namespace conv
}  // namespace bigkern
