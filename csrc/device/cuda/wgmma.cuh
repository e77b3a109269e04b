// Tensor-core multiplication of one warpgroup (sm_90a), register redistribution between warpgroups, and ex2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace bigkern {

// Before the first wgmma of a batch that reads or writes registers this thread has touched since the last wait.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the warpgroup's open group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups are in flight. Until then no one may touch the accumulators or the A registers.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The same where these accumulators are used next. The compiler does not know that a product still writes them: it has
// moved arithmetic on them above the wait, whereupon ptxas makes each product wait for the one before (C7515).
template <int N, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&accumulators)[kCount]) {
  wgmma_wait<N>();
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// Raises or lowers this warpgroup's registers per thread. All its warps call, first thing in their branch. The kernel
// needs __launch_bounds__(threads, 1): ptxas ignores setmaxnreg (C7508) where it cannot tell the count at entry.
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_inc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 in steps of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void set_max_registers_dec() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 in steps of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 2^x to about 2 ulp; subnormal inputs and results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

namespace detail {

template <int N>
struct Wgmma;

// wgmma names each of its N / 2 accumulators in the asm text and again as an operand, and 32 values of N exist. The
// lists below build each N on the one before, so that every shape is one line here instead of pages of generated code.
#define BK_WGMMA_NAMES_8 "%0, %1, %2, %3"
#define BK_WGMMA_NAMES_16 BK_WGMMA_NAMES_8 ", %4, %5, %6, %7"
#define BK_WGMMA_NAMES_24 BK_WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define BK_WGMMA_NAMES_32 BK_WGMMA_NAMES_24 ", %12, %13, %14, %15"
#define BK_WGMMA_NAMES_40 BK_WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define BK_WGMMA_NAMES_48 BK_WGMMA_NAMES_40 ", %20, %21, %22, %23"
#define BK_WGMMA_NAMES_56 BK_WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define BK_WGMMA_NAMES_64 BK_WGMMA_NAMES_56 ", %28, %29, %30, %31"
#define BK_WGMMA_NAMES_72 BK_WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define BK_WGMMA_NAMES_80 BK_WGMMA_NAMES_72 ", %36, %37, %38, %39"
#define BK_WGMMA_NAMES_88 BK_WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define BK_WGMMA_NAMES_96 BK_WGMMA_NAMES_88 ", %44, %45, %46, %47"
#define BK_WGMMA_NAMES_104 BK_WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define BK_WGMMA_NAMES_112 BK_WGMMA_NAMES_104 ", %52, %53, %54, %55"
#define BK_WGMMA_NAMES_120 BK_WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define BK_WGMMA_NAMES_128 BK_WGMMA_NAMES_120 ", %60, %61, %62, %63"
#define BK_WGMMA_NAMES_136 BK_WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define BK_WGMMA_NAMES_144 BK_WGMMA_NAMES_136 ", %68, %69, %70, %71"
#define BK_WGMMA_NAMES_152 BK_WGMMA_NAMES_144 ", %72, %73, %74, %75"
#define BK_WGMMA_NAMES_160 BK_WGMMA_NAMES_152 ", %76, %77, %78, %79"
#define BK_WGMMA_NAMES_168 BK_WGMMA_NAMES_160 ", %80, %81, %82, %83"
#define BK_WGMMA_NAMES_176 BK_WGMMA_NAMES_168 ", %84, %85, %86, %87"
#define BK_WGMMA_NAMES_184 BK_WGMMA_NAMES_176 ", %88, %89, %90, %91"
#define BK_WGMMA_NAMES_192 BK_WGMMA_NAMES_184 ", %92, %93, %94, %95"
#define BK_WGMMA_NAMES_200 BK_WGMMA_NAMES_192 ", %96, %97, %98, %99"
#define BK_WGMMA_NAMES_208 BK_WGMMA_NAMES_200 ", %100, %101, %102, %103"
#define BK_WGMMA_NAMES_216 BK_WGMMA_NAMES_208 ", %104, %105, %106, %107"
#define BK_WGMMA_NAMES_224 BK_WGMMA_NAMES_216 ", %108, %109, %110, %111"
#define BK_WGMMA_NAMES_232 BK_WGMMA_NAMES_224 ", %112, %113, %114, %115"
#define BK_WGMMA_NAMES_240 BK_WGMMA_NAMES_232 ", %116, %117, %118, %119"
#define BK_WGMMA_NAMES_248 BK_WGMMA_NAMES_240 ", %120, %121, %122, %123"
#define BK_WGMMA_NAMES_256 BK_WGMMA_NAMES_248 ", %124, %125, %126, %127"
#define BK_WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BK_WGMMA_OPERANDS_8 BK_WGMMA_FOUR(0)
#define BK_WGMMA_OPERANDS_16 BK_WGMMA_OPERANDS_8, BK_WGMMA_FOUR(4)
#define BK_WGMMA_OPERANDS_24 BK_WGMMA_OPERANDS_16, BK_WGMMA_FOUR(8)
#define BK_WGMMA_OPERANDS_32 BK_WGMMA_OPERANDS_24, BK_WGMMA_FOUR(12)
#define BK_WGMMA_OPERANDS_40 BK_WGMMA_OPERANDS_32, BK_WGMMA_FOUR(16)
#define BK_WGMMA_OPERANDS_48 BK_WGMMA_OPERANDS_40, BK_WGMMA_FOUR(20)
#define BK_WGMMA_OPERANDS_56 BK_WGMMA_OPERANDS_48, BK_WGMMA_FOUR(24)
#define BK_WGMMA_OPERANDS_64 BK_WGMMA_OPERANDS_56, BK_WGMMA_FOUR(28)
#define BK_WGMMA_OPERANDS_72 BK_WGMMA_OPERANDS_64, BK_WGMMA_FOUR(32)
#define BK_WGMMA_OPERANDS_80 BK_WGMMA_OPERANDS_72, BK_WGMMA_FOUR(36)
#define BK_WGMMA_OPERANDS_88 BK_WGMMA_OPERANDS_80, BK_WGMMA_FOUR(40)
#define BK_WGMMA_OPERANDS_96 BK_WGMMA_OPERANDS_88, BK_WGMMA_FOUR(44)
#define BK_WGMMA_OPERANDS_104 BK_WGMMA_OPERANDS_96, BK_WGMMA_FOUR(48)
#define BK_WGMMA_OPERANDS_112 BK_WGMMA_OPERANDS_104, BK_WGMMA_FOUR(52)
#define BK_WGMMA_OPERANDS_120 BK_WGMMA_OPERANDS_112, BK_WGMMA_FOUR(56)
#define BK_WGMMA_OPERANDS_128 BK_WGMMA_OPERANDS_120, BK_WGMMA_FOUR(60)
#define BK_WGMMA_OPERANDS_136 BK_WGMMA_OPERANDS_128, BK_WGMMA_FOUR(64)
#define BK_WGMMA_OPERANDS_144 BK_WGMMA_OPERANDS_136, BK_WGMMA_FOUR(68)
#define BK_WGMMA_OPERANDS_152 BK_WGMMA_OPERANDS_144, BK_WGMMA_FOUR(72)
#define BK_WGMMA_OPERANDS_160 BK_WGMMA_OPERANDS_152, BK_WGMMA_FOUR(76)
#define BK_WGMMA_OPERANDS_168 BK_WGMMA_OPERANDS_160, BK_WGMMA_FOUR(80)
#define BK_WGMMA_OPERANDS_176 BK_WGMMA_OPERANDS_168, BK_WGMMA_FOUR(84)
#define BK_WGMMA_OPERANDS_184 BK_WGMMA_OPERANDS_176, BK_WGMMA_FOUR(88)
#define BK_WGMMA_OPERANDS_192 BK_WGMMA_OPERANDS_184, BK_WGMMA_FOUR(92)
#define BK_WGMMA_OPERANDS_200 BK_WGMMA_OPERANDS_192, BK_WGMMA_FOUR(96)
#define BK_WGMMA_OPERANDS_208 BK_WGMMA_OPERANDS_200, BK_WGMMA_FOUR(100)
#define BK_WGMMA_OPERANDS_216 BK_WGMMA_OPERANDS_208, BK_WGMMA_FOUR(104)
#define BK_WGMMA_OPERANDS_224 BK_WGMMA_OPERANDS_216, BK_WGMMA_FOUR(108)
#define BK_WGMMA_OPERANDS_232 BK_WGMMA_OPERANDS_224, BK_WGMMA_FOUR(112)
#define BK_WGMMA_OPERANDS_240 BK_WGMMA_OPERANDS_232, BK_WGMMA_FOUR(116)
#define BK_WGMMA_OPERANDS_248 BK_WGMMA_OPERANDS_240, BK_WGMMA_FOUR(120)
#define BK_WGMMA_OPERANDS_256 BK_WGMMA_OPERANDS_248, BK_WGMMA_FOUR(124)

#define BK_WGMMA_SS(N, type, a, b, scale, trans_a, trans_b)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N    \
               "k16.f32." type "." type " {" BK_WGMMA_NAMES_##N "}, %" #a ", %" #b ", p, 1, 1, %" #trans_a \
                                                                ", %" #trans_b ";\n}"                      \
               : BK_WGMMA_OPERANDS_##N                                                                     \
               : "l"(a_tile), "l"(b_tile), "r"(accumulate), "n"(kTransA), "n"(kTransB))

#define BK_WGMMA_RS(N, type, a0, a1, a2, a3, b, scale, trans_b)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N             \
               "k16.f32." type "." type " {" BK_WGMMA_NAMES_##N "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b \
                                                                ", p, 1, 1, %" #trans_b ";\n}"                      \
               : BK_WGMMA_OPERANDS_##N                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(accumulate), "n"(kTransB))

// The numbers are those of the operands after the accumulators: N / 2 onwards.
#define BK_WGMMA(N, n0, n1, n2, n3, n4, n5, n6)                                                                      \
  template <>                                                                                                        \
  struct Wgmma<N> {                                                                                                  \
    template <class T, bool kTransA, bool kTransB>                                                                   \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a_tile, uint64_t b_tile, int accumulate) { \
      if constexpr (std::is_same_v<T, __half>) {                                                                     \
        BK_WGMMA_SS(N, "f16", n0, n1, n2, n3, n4);                                                                   \
      } else {                                                                                                       \
        BK_WGMMA_SS(N, "bf16", n0, n1, n2, n3, n4);                                                                  \
      }                                                                                                              \
    }                                                                                                                \
    template <class T, bool kTransB>                                                                                 \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_tile,            \
                                              int accumulate) {                                                      \
      if constexpr (std::is_same_v<T, __half>) {                                                                     \
        BK_WGMMA_RS(N, "f16", n0, n1, n2, n3, n4, n5, n6);                                                           \
      } else {                                                                                                       \
        BK_WGMMA_RS(N, "bf16", n0, n1, n2, n3, n4, n5, n6);                                                          \
      }                                                                                                              \
    }                                                                                                                \
  };

BK_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
BK_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
BK_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
BK_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
BK_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
BK_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
BK_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
BK_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
BK_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
BK_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
BK_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
BK_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
BK_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
BK_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
BK_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
BK_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
BK_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
BK_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
BK_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
BK_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
BK_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
BK_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
BK_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
BK_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
BK_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
BK_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
BK_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
BK_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
BK_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
BK_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
BK_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
BK_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef BK_WGMMA
#undef BK_WGMMA_SS
#undef BK_WGMMA_RS

}  // namespace detail

// d = a b, plus d where accumulate: a 64x16 and b 16xN of T (__nv_bfloat16 or __half), both in shared memory, named
// by descriptors; N = 8, 16, ... 256. kTransA, kTransB: the operand is MN-major. Thread l of warp w holds in d[j] row
// 16 w + l / 4 + 8 (j / 2 % 2), column j / 4 * 8 + 2 (l % 4) + j % 2.
template <class T, int N, bool kTransA = false, bool kTransB = false>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma: bf16 or f16");
  detail::Wgmma<N>::template ss<T, kTransA, kTransB>(d, a, b, accumulate);
}

// As wgmma_ss with a in registers, laid out as mma_m16n8k16's a in each warp (16 rows a warp).
template <class T, int N, bool kTransB = false>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma: bf16 or f16");
  detail::Wgmma<N>::template rs<T, kTransB>(d, a, b, accumulate);
}

}  // namespace bigkern
