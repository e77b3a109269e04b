// Vector accesses and conversions of the element types: float, __nv_bfloat16, __half.
#pragma once

#include "device/platform.cuh"

#include <cstdint>
#include <type_traits>

namespace bigkern {

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
__host__ __device__ constexpr Int round_up(Int a, Int multiple) {
  return ceil_div(a, multiple) * multiple;
}

__host__ __device__ __forceinline__ float to_float(float x) {
  return x;
}
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__host__ __device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

// Rounds to nearest even; a float beyond T's range becomes infinity.
template <class T>
__host__ __device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    static_assert(std::is_same_v<T, __half>, "from_float: T is float, __nv_bfloat16 or __half");
    return __float2half_rn(x);
  }
}

// N elements that move in one access of 1 to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
  T v[N];
};

// Elements of T in the widest access.
template <class T>
constexpr int kVecElements = 16 / sizeof(T);

namespace detail {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

// p is aligned to the whole vector.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  using Word = typename detail::Word<sizeof(Vec<T, N>)>::type;
  Vec<T, N> result;
  *reinterpret_cast<Word*>(&result) = *reinterpret_cast<const Word*>(p);
  return result;
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& value) {
  using Word = typename detail::Word<sizeof(Vec<T, N>)>::type;
  *reinterpret_cast<Word*>(p) = *reinterpret_cast<const Word*>(&value);
}

// For data touched once: evicted first, so that it does not push reused data out of the caches.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec_streaming(const T* p) {
  using Word = typename detail::Word<sizeof(Vec<T, N>)>::type;
  Vec<T, N> result;
  *reinterpret_cast<Word*>(&result) = __ldcs(reinterpret_cast<const Word*>(p));
  return result;
}

template <class T, int N>
__device__ __forceinline__ void store_vec_streaming(T* p, const Vec<T, N>& value) {
  using Word = typename detail::Word<sizeof(Vec<T, N>)>::type;
  __stcs(reinterpret_cast<Word*>(p), *reinterpret_cast<const Word*>(&value));
}

}  // namespace bigkern
