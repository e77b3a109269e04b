// Kernels that use the emulated device rightly: each feature once, with a result a test can check.
#include "device/device.cuh"

#include <cstdint>

namespace bigkern {
namespace {

LaunchConfig config(int blocks, int threads, size_t shared_bytes = 0) {
  LaunchConfig result;
  result.grid = dim3(blocks);
  result.block = dim3(threads);
  result.shared_bytes = shared_bytes;
  return result;
}

// Reverses each block's part through shared memory.
__global__ void reverse_kernel(const float* in, float* out) {
  BK_SHARED(float, tile, [1024]);
  const int base = blockIdx.x * blockDim.x;
  tile[threadIdx.x] = in[base + threadIdx.x];
  __syncthreads();
  out[base + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void indices_kernel(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 10000 + thread;
}

// One row of 12 results for each of 64 threads.
__global__ void warp_kernel(int* out) {
  const int t = threadIdx.x, lane = t % 32;
  int* row = out + t * 12;
  row[0] = __shfl_sync(0xffffffffu, t, 5);
  row[1] = __shfl_xor_sync(0xffffffffu, t, 3);
  row[2] = __shfl_down_sync(0xffffffffu, t, 4, 16);
  row[3] = __shfl_up_sync(0xffffffffu, t, 2, 8);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  row[5] = __any_sync(0xffffffffu, t == 40);
  row[6] = __all_sync(0xffffffffu, t >= 32);
  row[7] = __reduce_add_sync(0xffffffffu, t);
  row[8] = static_cast<int>(__match_any_sync(0xffffffffu, lane / 8));
  if (lane < 16) {  // two groups of lanes meet at the same time
    row[9] = __shfl_sync(0x0000ffffu, t, 1);
  } else {
    row[9] = __shfl_sync(0xffff0000u, t, 17);
  }
  row[10] = __reduce_max_sync(0xffffffffu, t ^ 21);
  row[11] = static_cast<int>(__reduce_or_sync(0xffffffffu, 1u << lane));
}

__global__ void atomics_kernel(int* ints, float* floats, double* doubles, unsigned* unsigneds) {
  const int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&ints[0], t);
  atomicMax(&ints[1], t);
  atomicMin(&ints[2], -t);
  atomicAdd(&floats[0], 0.5f);
  atomicAdd(&doubles[0], 0.25);
  atomicOr(&unsigneds[0], 1u << (t % 32));
  atomicInc(&unsigneds[1], 6u);
  atomicExch(&ints[3], 77);
  int seen = ints[4] * 0;
  while (true) {
    const int old = atomicCAS(&ints[4], seen, seen + 2);
    if (old == seen) break;
    seen = old;
  }
}

// Two producer warps fill a buffer, two consumer warps read it; the producers do not wait.
__global__ void named_barrier_kernel(int* out) {
  BK_SHARED(int, buffer, [64]);
  const int t = threadIdx.x;
  for (int step = 0; step < 3; step++) {
    if (t < 64) {
      if (step > 0) named_barrier(2, 128);  // the consumers are done with the last step
      buffer[t] = step * 1000 + t;
      named_barrier_arrive(1, 128);
    } else {
      named_barrier(1, 128);
      out[step * 64 + t - 64] = buffer[127 - t];
      if (step < 2) named_barrier_arrive(2, 128);
    }
  }
}

// Sums neighbours' values over a ring of blocks, several rounds, with a barrier of the whole grid between them.
__device__ void grid_barrier(unsigned* counter, unsigned& round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    round++;
    while (ld_acquire(counter) < round * gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

__global__ void ring_kernel(float* values, float* next, unsigned* counter, int rounds) {
  unsigned round = 0;
  const int n = blockDim.x;
  for (int i = 0; i < rounds; i++) {
    const int neighbour = (blockIdx.x + 1) % gridDim.x;
    next[blockIdx.x * n + threadIdx.x] =
        values[blockIdx.x * n + threadIdx.x] + values[neighbour * n + (threadIdx.x + 1) % n];
    grid_barrier(counter, round);
    float* swap = values;
    values = next;
    next = swap;
  }
}

// The last block to finish adds up what all have written.
__global__ void last_block_kernel(const float* in, float* partial, float* out, unsigned* counter) {
  BK_SHARED(float, sums, [4]);
  BK_SHARED(bool, last);
  float sum = warp_sum(in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; i++) total += partial[i];
    *out = total;
  }
}

// The same published the way CUDA's samples do: all threads write and fence, then thread 0 counts.
__global__ void all_fence_kernel(float* partial, float* out, unsigned* counter) {
  BK_SHARED(bool, last);
  partial[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(threadIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) total += partial[i];
  atomicAdd(out, total);
}

// Each block waits for its left neighbour's flag, then passes on the sum.
__global__ void chain_kernel(int* values, unsigned* flags) {
  const int b = blockIdx.x;
  if (threadIdx.x == 0) {
    if (b > 0) {
      while (ld_acquire(&flags[b - 1]) == 0) __nanosleep(20);
    }
    values[b] = (b > 0 ? values[b - 1] : 0) + b + 1;
    st_release(&flags[b], 1u);
  }
}

// Copies rows through shared memory, two groups in flight; the last `missing` pieces are zero-filled.
__global__ void copy_async_kernel(const float* in, float* out, int steps, int missing) {
  SharedMemory shared;
  float* stages[2] = {shared.take<float>(blockDim.x * 4, 128), shared.take<float>(blockDim.x * 4, 128)};
  const int t = threadIdx.x, n = blockDim.x * 4;
  auto start = [&](int step) {
    if (step < steps) {
      const int piece = step * static_cast<int>(blockDim.x) + t;
      cp_async16(stages[step % 2] + t * 4, in + piece * 4, piece < steps * static_cast<int>(blockDim.x) - missing);
    }
    cp_async_commit();
  };
  start(0);
  for (int step = 0; step < steps; step++) {
    start(step + 1);
    cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; i++) out[step * n + t + i * blockDim.x] = stages[step % 2][n - 1 - (t + i * blockDim.x)];
    __syncthreads();
  }
  cp_async_wait<0>();
}

// d (16x8) = a (16x16, rows) b (16x8; stored as rows of b, so loaded transposed), both through shared memory.
template <class T>
__global__ void multiply16_kernel(const T* a, const T* b, float* d) {
  BK_SHARED(T, tile_a, [16][24]);
  BK_SHARED(T, tile_b, [16][24]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t ra[4], rb[2];
  ldmatrix_x4(ra, &tile_a[lane % 16][lane / 16 * 8]);
  ldmatrix_x2_trans(rb, &tile_b[lane % 16][0]);
  float rd[4] = {};
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    mma_m16n8k16_f16(rd, ra, rb);
  } else {
    mma_m16n8k16_bf16(rd, ra, rb);
  }
  const int g = lane / 4, t = lane % 4 * 2;
  d[g * 8 + t] = rd[0];
  d[g * 8 + t + 1] = rd[1];
  d[(g + 8) * 8 + t] = rd[2];
  d[(g + 8) * 8 + t + 1] = rd[3];
}

// d (16x8) += a (16x8) b (8x8) in tf32; the inputs are taken as they are, rounded or not.
__global__ void multiply_tf32_kernel(const float* a, const float* b, float* d, bool round) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  auto bits = [&](float x) { return round ? to_tf32(x) : __float_as_uint(x); };
  const uint32_t ra[4] = {bits(a[g * 8 + t]), bits(a[(g + 8) * 8 + t]), bits(a[g * 8 + t + 4]),
                          bits(a[(g + 8) * 8 + t + 4])};
  const uint32_t rb[2] = {bits(b[t * 8 + g]), bits(b[(t + 4) * 8 + g])};
  float* rows[2] = {d + g * 8 + 2 * t, d + (g + 8) * 8 + 2 * t};
  float rd[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma_m16n8k8_tf32(rd, ra, rb);
  for (int i = 0; i < 4; i++) rows[i / 2][i % 2] = rd[i];
}

// stmatrix undoes ldmatrix, also from a transposed load.
__global__ void tiles_kernel(const uint16_t* in, uint16_t* out, uint16_t* transposed) {
  BK_SHARED(uint4, source, [32]);
  BK_SHARED(uint4, target, [32]);
  const int lane = threadIdx.x;
  source[lane] = reinterpret_cast<const uint4*>(in)[lane];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, &source[lane]);
  stmatrix_x4(&target[lane], r);
  __syncwarp();
  reinterpret_cast<uint4*>(out)[lane] = target[lane];
  __syncwarp();
  ldmatrix_x4_trans(r, &source[lane]);
  stmatrix_x4(&target[lane], r);
  __syncwarp();
  reinterpret_cast<uint4*>(transposed)[lane] = target[lane];
}

__global__ void shared_fill_kernel(float* out, int n) {
  SharedMemory shared;
  BK_SHARED(float, fixed, [4]);
  const float* p = shared.take<float>(n);
  if (threadIdx.x < static_cast<unsigned>(n)) out[threadIdx.x] = p[threadIdx.x];
  if (threadIdx.x < 4) out[n + threadIdx.x] = fixed[threadIdx.x];
}

// 16-byte, 4-byte and 2-byte accesses, for the byte counters.
__global__ void traffic_kernel(const float* in, float* out, const __nv_bfloat16* small, __nv_bfloat16* small_out) {
  const int t = threadIdx.x;
  Vec<float, 4> v = load_vec<float, 4>(in + 4 * t);
  v.v[0] += 1;
  store_vec(out + 4 * t, v);
  out[4 * blockDim.x + t] = in[4 * blockDim.x + t] * 2;
  small_out[t] = from_float<__nv_bfloat16>(to_float(small[t]) * 2);
}

__global__ void intrinsics_kernel(const float* x, float* out, unsigned* bits) {
  out[0] = rsqrtf(x[0]);
  out[1] = __expf(x[1]);
  out[2] = max(x[2], 1.5f);
  out[3] = fmaxf(x[2], x[3]);
  out[4] = __half2float(__hfma(__float2half(x[0]), __float2half(x[1]), __float2half(x[2])));
  out[5] = __ldg(&x[3]) + __ldcg(&x[4]);
  bits[0] = __umulhi(0xdeadbeefu, 0x12345678u);
  bits[1] = __brev(0x00000012u);
  bits[2] = static_cast<unsigned>(__clz(0x00012345));
  bits[3] = __byte_perm(0x03020100u, 0x07060504u, 0x5412u);
  bits[4] = __funnelshift_l(0x80000001u, 0x00000003u, 4);
  bits[5] = static_cast<unsigned>(min(7, 9));
  bits[6] = __float_as_uint(1.0f);
}

// Rows of a layer norm, a block each: what the emulator's speed is measured on.
__global__ void row_norm_kernel(const float* x, float* y, int cols) {
  const float* row = x + static_cast<size_t>(blockIdx.x) * cols;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
    const Vec<float, 4> v = load_vec<float, 4>(row + i);
    for (float e : v.v) {
      sum += e;
      squares += e * e;
    }
  }
  sum = block_sum<128>(sum);
  squares = block_sum<128>(squares);
  const float mean = sum / cols, scale = rsqrtf(squares / cols - mean * mean + 1e-5f);
  for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
    Vec<float, 4> v = load_vec<float, 4>(row + i);
    for (float& e : v.v) e = (e - mean) * scale;
    store_vec(y + static_cast<size_t>(blockIdx.x) * cols + i, v);
  }
}

LaunchConfig cooperative(int blocks, int threads) {
  LaunchConfig result = config(blocks, threads);
  result.cooperative = true;
  return result;
}

}  // namespace
}  // namespace bigkern

using namespace bigkern;

extern "C" {

const char* message(int code) {
  return error_string(code);
}

int run_reverse(const float* in, float* out, int blocks, int threads) {
  return launch(reverse_kernel, config(blocks, threads), in, out);
}
int run_indices(int* out) {
  LaunchConfig c;
  c.grid = dim3(2, 3, 2);
  c.block = dim3(4, 2, 3);
  return launch(indices_kernel, c, out);
}
int run_warp(int* out) {
  return launch(warp_kernel, config(1, 64), out);
}
int run_atomics(int* ints, float* floats, double* doubles, unsigned* unsigneds) {
  return launch(atomics_kernel, config(3, 64), ints, floats, doubles, unsigneds);
}
int run_named_barrier(int* out) {
  return launch(named_barrier_kernel, config(1, 128), out);
}
int run_ring(float* values, float* next, unsigned* counter, int blocks, int rounds) {
  return launch(ring_kernel, cooperative(blocks, 32), values, next, counter, rounds);
}
int run_last_block(const float* in, float* partial, float* out, unsigned* counter, int blocks) {
  return launch(last_block_kernel, config(blocks, 128), in, partial, out, counter);
}
int run_all_fence(float* partial, float* out, unsigned* counter, int blocks) {
  return launch(all_fence_kernel, config(blocks, 64), partial, out, counter);
}
int run_chain(int* values, unsigned* flags, int blocks) {
  return launch(chain_kernel, cooperative(blocks, 32), values, flags);
}
int run_copy_async(const float* in, float* out, int threads, int steps, int missing) {
  return launch(copy_async_kernel, config(1, threads, threads * 32), in, out, steps, missing);
}
int run_multiply_bf16(const void* a, const void* b, float* d) {
  return launch(multiply16_kernel<__nv_bfloat16>, config(1, 32), static_cast<const __nv_bfloat16*>(a),
                static_cast<const __nv_bfloat16*>(b), d);
}
int run_multiply_f16(const void* a, const void* b, float* d) {
  return launch(multiply16_kernel<__half>, config(1, 32), static_cast<const __half*>(a), static_cast<const __half*>(b),
                d);
}
int run_multiply_tf32(const float* a, const float* b, float* d, bool round) {
  return launch(multiply_tf32_kernel, config(1, 32), a, b, d, round);
}
int run_tiles(const uint16_t* in, uint16_t* out, uint16_t* transposed) {
  return launch(tiles_kernel, config(1, 32), in, out, transposed);
}
int run_shared_fill(float* out, int n) {
  return launch(shared_fill_kernel, config(1, 32, n * 4), out, n);
}
int run_traffic(const float* in, float* out, const void* small, void* small_out, int threads) {
  return launch(traffic_kernel, config(1, threads), in, out, static_cast<const __nv_bfloat16*>(small),
                static_cast<__nv_bfloat16*>(small_out));
}
int run_intrinsics(const float* x, float* out, unsigned* bits) {
  return launch(intrinsics_kernel, config(1, 1), x, out, bits);
}
int run_row_norm(const float* x, float* y, int rows, int cols) {
  return launch(row_norm_kernel, config(rows, 128), x, y, cols);
}
int run_bad_config(int blocks, int threads, int shared_bytes) {
  return launch(shared_fill_kernel, config(blocks, threads, static_cast<size_t>(shared_bytes)),
                static_cast<float*>(nullptr), 0);
}

}  // extern "C"
