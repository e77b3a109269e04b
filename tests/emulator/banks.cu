// Accesses of shared memory whose bank conflicts are known by hand.
#include "device/device.cuh"

#include <cstdint>

namespace bigkern {
namespace {

LaunchConfig one_block(int threads) {
  LaunchConfig config;
  config.block = dim3(threads);
  return config;
}

// Each lane loads element lane * stride, then stores there.
template <class T>
__global__ void stride_kernel(T* out, int stride, bool store) {
  BK_SHARED(T, tile, [2048]);
  for (int i = threadIdx.x; i < 2048; i += blockDim.x) tile[i] = T{};
  __syncthreads();
  if (store) {
    tile[threadIdx.x * stride] = out[threadIdx.x];
  } else {
    out[threadIdx.x] = tile[threadIdx.x * stride];
  }
}

// Even lanes load from 16 banks, odd lanes from one.
__global__ void divergent_kernel(float* out) {
  BK_SHARED(float, tile, [1024]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 1024; i += 32) tile[i] = 1;
  __syncwarp();
  if (lane % 2) {
    out[lane] = tile[lane * 32] + 1;
  } else {
    out[lane] = tile[lane] * 3;
  }
}

// Lane l takes l % 4 + 1 turns.
__global__ void turns_kernel(float* out) {
  BK_SHARED(float, tile, [128]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) tile[i] = 1;
  __syncwarp();
  float sum = 0;
  for (int i = 0; i <= lane % 4; i++) sum += tile[i * 32 + lane];
  out[lane] = sum;
}

// A tile of 16 rows of `row_bytes` by cp.async, ldmatrix and stmatrix; `swizzle` exchanges a row's pieces of 16 bytes.
__global__ void tile_kernel(const uint4* in, uint4* out, int row_bytes, bool swizzle) {
  BK_SHARED(uint4, tile, [16 * 9]);
  const int lane = threadIdx.x, pieces = row_bytes / 16;
  auto at = [&](int row, int piece) { return tile + row * pieces + (swizzle ? piece ^ row % pieces : piece); };
  for (int piece = 0; piece < 2; piece++) cp_async16(at(lane % 16, lane / 16 * 2 + piece), in + lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, at(lane % 16, lane / 16));
  __syncwarp();
  stmatrix_x4(at(lane % 16, lane / 16), r);
  out[lane] = {r[0], r[1], r[2], r[3]};
}

}  // namespace
}  // namespace bigkern

using namespace bigkern;

extern "C" {

int run_bank_stride(void* out, int width, int threads, int stride, int store) {
  const LaunchConfig config = one_block(threads);
  switch (width) {
    case 1:
      return launch(stride_kernel<uint8_t>, config, static_cast<uint8_t*>(out), stride, store != 0);
    case 2:
      return launch(stride_kernel<uint16_t>, config, static_cast<uint16_t*>(out), stride, store != 0);
    case 4:
      return launch(stride_kernel<float>, config, static_cast<float*>(out), stride, store != 0);
    case 8:
      return launch(stride_kernel<float2>, config, static_cast<float2*>(out), stride, store != 0);
    default:
      return launch(stride_kernel<float4>, config, static_cast<float4*>(out), stride, store != 0);
  }
}
int run_bank_divergent(float* out) {
  return launch(divergent_kernel, one_block(32), out);
}
int run_bank_turns(float* out) {
  return launch(turns_kernel, one_block(32), out);
}
int run_bank_tile(const void* in, void* out, int row_bytes, int swizzle) {
  return launch(tile_kernel, one_block(32), static_cast<const uint4*>(in), static_cast<uint4*>(out), row_bytes,
                swizzle != 0);
}

}  // extern "C"
