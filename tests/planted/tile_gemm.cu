// A small tensor-core kernel kept to be broken: it has what the big kernels have (cp.async double buffering, ldmatrix,
// mma.sync, barriers before and after each tile, masked tails), so a bug planted here tells what the harness can see.
//
// C[m, n] = sum_k A[m, k] B[k, n], A and B bf16 row-major, C fp32; k and n multiples of 8.
//
//   block: 128 threads, 64 x 64 of C       warp w: rows 32 (w / 2), columns 32 (w % 2)
//   two stages of A [64][32 + 8] and B [32][64 + 8]; the 16 bytes of padding make ldmatrix free of bank conflicts
#include "device/device.cuh"

#include <cstring>

namespace bigkern {

constexpr int kTileM = 64, kTileN = 64, kTileK = 32, kTileThreads = 128, kTilePad = 8;
constexpr int kTileStrideA = kTileK + kTilePad, kTileStrideB = kTileN + kTilePad;

struct TileGemmParams {
  const __nv_bfloat16* a;  // m x k
  const __nv_bfloat16* b;  // k x n
  float* c;                // m x n
  int m, n, k;
};

// Starts copying rows x cols of a row-major matrix, from (row0, col0) on, into a stage; what lies outside becomes zero.
template <int kRows, int kCols, int kStride>
__device__ __forceinline__ void copy_tile(__nv_bfloat16* stage, const __nv_bfloat16* matrix, int rows, int cols,
                                          int row0, int col0) {
  constexpr int kChunks = kCols / 8;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kTileThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    const bool inside = row0 + row < rows && col0 + col < cols;
    const int64_t offset = int64_t(row0 + row) * cols + col0 + col;
    cp_async16(stage + row * kStride + col, inside ? matrix + offset : matrix, inside);
  }
}

__global__ void __launch_bounds__(kTileThreads) tile_gemm_kernel(TileGemmParams p) {
  SharedMemory shared;
  __nv_bfloat16* const stages_a = shared.take<__nv_bfloat16>(2 * kTileM * kTileStrideA);
  __nv_bfloat16* const stages_b = shared.take<__nv_bfloat16>(2 * kTileK * kTileStrideB);
  const int row0 = blockIdx.y * kTileM, col0 = blockIdx.x * kTileN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;

  const int tiles = ceil_div(p.k, kTileK);
  auto load = [&](int tile) {
    const int stage = tile % 2;
    copy_tile<kTileM, kTileK, kTileStrideA>(stages_a + stage * kTileM * kTileStrideA, p.a, p.m, p.k, row0,
                                            tile * kTileK);
    copy_tile<kTileK, kTileN, kTileStrideB>(stages_b + stage * kTileK * kTileStrideB, p.b, p.k, p.n, tile * kTileK,
                                            col0);
    cp_async_commit();
  };

  float acc[2][4][4] = {};
  load(0);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      load(tile + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // everyone's copies of this tile have landed
    const __nv_bfloat16* a = stages_a + tile % 2 * kTileM * kTileStrideA;
    const __nv_bfloat16* b = stages_b + tile % 2 * kTileK * kTileStrideB;
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t a_frag[2][4], b_frag[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4(a_frag[i], a + (warp_row + 16 * i + lane % 16) * kTileStrideA + k + lane / 16 * 8);
        ldmatrix_x4_trans(b_frag[i], b + (k + lane % 16) * kTileStrideB + warp_col + 16 * i + lane / 16 * 8);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t b_pair[2] = {b_frag[j / 2][j % 2 * 2], b_frag[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16_bf16(acc[i][j], a_frag[i], b_pair);
        }
      }
    }
    __syncthreads();  // everyone is done with this stage before the next copies overwrite it
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = row0 + warp_row + 16 * i + lane / 4 + e / 2 * 8;
        const int col = col0 + warp_col + 8 * j + lane % 4 * 2 + e % 2;
        if (row < p.m && col < p.n) p.c[int64_t(row) * p.n + col] = acc[i][j][e];
      }
    }
  }
}

inline int tile_gemm(const TileGemmParams& p, Stream stream) {
  constexpr size_t kShared = 2 * (kTileM * kTileStrideA + kTileK * kTileStrideB) * sizeof(__nv_bfloat16) + 64;
  const dim3 grid(ceil_div(p.n, kTileN), ceil_div(p.m, kTileM));
  return launch(tile_gemm_kernel, LaunchConfig{grid, dim3(kTileThreads), kShared, stream}, p);
}

}  // namespace bigkern

// 0, or an error code whose message lands in `error`.
extern "C" int run_tile_gemm(const void* a, const void* b, float* c, int m, int n, int k, char* error, int size) {
  const bigkern::TileGemmParams params{
      static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c, m, n, k};
  const int code = bigkern::tile_gemm(params, nullptr);
  if (code != 0) std::strncpy(error, bigkern::error_string(code), size - 1);
  return code;
}
