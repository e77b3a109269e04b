// The traversal that all kernels over lists of tensors share, and their accesses to elements.
//
// A tensor's elements are cut into chunks of kChunk, numbered through the list. A persistent grid gives each block an
// equal, contiguous range of chunks, so a block works on a slice of one large tensor, or on a run of small ones:
//
//     tensors  |  0  |          1          |2|3|4|       5     |
//     chunks    0   1 2   3   4   5   6   7 8 9 ...
//     blocks   |  block 0  |  block 1  |  block 2  | ...
//
// The block finds its first tensor by one search and walks from there. A tensor costs it a barrier: one thread reads
// the tensor's rows and computes its scalars in double, as torch does on the host, while the others wait.
//
// Elements move 16 bytes an access where every address of the tensor is aligned to that; else, and for the last
// elements of a tensor, one by one, neighbouring threads on neighbouring elements. Either way a thread holds V of them.
#pragma once

#include "device/device.cuh"
#include "kernels/multi_tensor.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace bigkern {
namespace multi_tensor {

constexpr int kThreads = 256;
// 64 registers a thread: four loads of 16 bytes in flight for each of 1,024 threads cover the latency of the memory.
constexpr int kBlocksPerMultiprocessor = 4;

// ---- Traversal ----

// Chunks and tensors are counted in 32 bits, elements in 64.
__device__ __forceinline__ int chunk_end(const MultiTensor& list, int tensor) {
  return tensor < 0 ? 0 : static_cast<int>(__ldg(list.chunk_ends + tensor));
}

// The tensor that holds the chunk: the first whose chunks end beyond it. 32 probes a round, one a lane.
__device__ __forceinline__ int find_tensor(const MultiTensor& list, int chunk) {
  const int lane = threadIdx.x % 32;
  int first = 0, candidates = static_cast<int>(list.count);
  while (candidates > 1) {
    const int stride = ceil_div(candidates, 32);
    const int probe = (lane + 1) * stride - 1;
    const bool before = probe < candidates && chunk_end(list, first + probe) <= chunk;
    const int skipped = __popc(__ballot_sync(0xffffffffu, before)) * stride;
    first += skipped;
    candidates = min(stride, candidates - skipped);
  }
  return first;
}

// The chunks of one tensor that a block works on, counted within the tensor.
struct Chunks {
  int begin, end;
};

// Calls work(job, chunks) in all threads for each tensor of this block's range. One thread has filled the job:
// open(job, previous, tensor, first_chunk), where previous is the job before it or null.
template <class Job, class Open, class Work>
__device__ __forceinline__ void for_each_tensor(const MultiTensor& list, Open&& open, Work&& work) {
  BK_SHARED(Job, jobs, [2]);
  const int64_t chunks = chunk_end(list, static_cast<int>(list.count) - 1);
  const int first = static_cast<int>(chunks * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(chunks * (blockIdx.x + 1) / gridDim.x);
  if (first == last) return;
  int turn = 0;
  for (int chunk = first, tensor = find_tensor(list, first); chunk < last; tensor++) {
    const int first_chunk = chunk_end(list, tensor - 1), end_chunk = chunk_end(list, tensor);
    if (end_chunk == first_chunk) continue;
    Job& job = jobs[turn % 2];
    if (threadIdx.x == 0) open(job, turn > 0 ? &jobs[(turn + 1) % 2] : nullptr, tensor, first_chunk);
    // The one barrier a tensor: who fills this job again has passed the next one, behind all readers.
    __syncthreads();
    work(job, Chunks{chunk - first_chunk, min(end_chunk, last) - first_chunk});
    chunk = end_chunk;
    turn++;
  }
}

// Whether this block is the last of the grid to come here. What all blocks wrote before is then visible to it, and what
// they read has been read.
__device__ __forceinline__ bool is_last_block(unsigned* finished) {
  BK_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ __forceinline__ unsigned* finished_blocks(const MultiTensor& list) {
  return reinterpret_cast<unsigned*>(list.scratch);
}

__device__ __forceinline__ double* block_partials(const MultiTensor& list) {
  return reinterpret_cast<double*>(list.scratch + kScratchWords - kMaxBlocks);
}

// ---- Elements ----

// Calls f with an element of the code's type.
template <class F>
__device__ __forceinline__ void with_type(int code, F&& f) {
  if (code == kFloatCode) {
    f(float{});
  } else if (code == kBFloat16Code) {
    f(__nv_bfloat16{});
  } else {
    f(__half{});
  }
}

// The V elements of a thread in one turn of its block: neighbours, or kThreads apart as far as there are any.
template <int V, bool kVector>
struct Tile {
  static constexpr int kWidth = V;
  static constexpr bool kIsVector = kVector;
  int64_t first;
  int left;  // elements from the first to the end of the chunk

  __device__ __forceinline__ int64_t element(int i) const { return first + (kVector ? i : i * kThreads); }
  __device__ __forceinline__ bool has(int i) const { return kVector || i * kThreads < left; }
};

// Calls f with this thread's tiles of a tensor's chunks. What f reads from shared memory it reads again for each tile:
// as loop invariants the addresses and scalars of a step would fill 40 registers, and __syncwarp keeps the compiler
// from making them so. Nor does a 64-bit count live across the loops.
template <int V, class F>
__device__ __forceinline__ void for_each_tile(const Chunks& chunks, const int64_t& numel, bool aligned, F&& f) {
  static_assert(kChunk % V == 0, "chunks start on whole vectors");
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; chunk++) {
    const int64_t start = int64_t{chunk} * kChunk;
    const int count = static_cast<int>(min(int64_t{kChunk}, numel - start));
    const int in_vectors = aligned ? count / V * V : 0;
#pragma unroll 1
    for (int tile = 0; tile < in_vectors; tile += kThreads * V) {
      __syncwarp();
      const int i = tile + threadIdx.x * V;
      if (i < in_vectors) f(Tile<V, true>{start + i, V});
    }
#pragma unroll 1
    for (int tile = in_vectors; tile < count; tile += kThreads * 4) {
      __syncwarp();
      const int i = tile + threadIdx.x;
      if (i < count) f(Tile<4, false>{start + i, count - i});
    }
  }
}

// The half of a 32-bit register that holds a 16-bit element, and back.
template <class S>
__device__ __forceinline__ S element_of(uint32_t word, int half) {
  Vec<S, 1> element;
  *reinterpret_cast<uint16_t*>(&element) = static_cast<uint16_t>(word >> (16 * half));
  return element.v[0];
}
template <class S>
__device__ __forceinline__ uint32_t word_of(S low, S high) {
  return *reinterpret_cast<const uint16_t*>(&low) | uint32_t{*reinterpret_cast<const uint16_t*>(&high)} << 16;
}

// A thread's elements of one array of S, read and written four at a time as floats: quad q has elements 4q to 4q + 3.
// Eight 16-bit elements still move in one access, with the first quad's load and the last one's store; between those
// they are kept two a register, which the compiler would not do.
template <class S, class Tile>
class Quads {
 public:
  // The address is read from the job, in shared memory, at each access: it would take two registers to keep.
  __device__ __forceinline__ Quads(const int64_t& address, const Tile& tile) : address_(address), tile_(tile) {}

  __device__ __forceinline__ void load(int quad, float (&values)[4]) {
    if constexpr (!Tile::kIsVector) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int i = 4 * quad + j;
        values[j] = tile_.has(i) ? to_float(load_vec_streaming<S, 1>(at(tile_.element(i))).v[0]) : 0.0f;
      }
    } else if constexpr (sizeof(S) == 4) {
      const Vec<S, 4> loaded = load_vec_streaming<S, 4>(at(tile_.first + 4 * quad));
#pragma unroll
      for (int j = 0; j < 4; j++) values[j] = to_float(loaded.v[j]);
    } else {
      if (quad % 2 == 0) loaded_ = __ldcs(reinterpret_cast<const uint4*>(at(tile_.first + 4 * quad)));
      const uint32_t words[2] = {quad % 2 == 0 ? loaded_.x : loaded_.z, quad % 2 == 0 ? loaded_.y : loaded_.w};
#pragma unroll
      for (int j = 0; j < 4; j++) values[j] = to_float(element_of<S>(words[j / 2], j % 2));
    }
  }

  // Of S, or floats that are rounded to S.
  template <class Value>
  __device__ __forceinline__ void store(int quad, const Value (&values)[4]) {
    S rounded[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (std::is_same_v<Value, S>) {
        rounded[j] = values[j];
      } else {
        rounded[j] = from_float<S>(values[j]);
      }
    }
    if constexpr (!Tile::kIsVector) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int i = 4 * quad + j;
        if (tile_.has(i)) store_vec_streaming<S, 1>(at(tile_.element(i)), Vec<S, 1>{{rounded[j]}});
      }
    } else if constexpr (sizeof(S) == 4) {
      store_vec_streaming<S, 4>(at(tile_.first + 4 * quad), {{rounded[0], rounded[1], rounded[2], rounded[3]}});
    } else if (quad % 2 == 0) {
      stored_.x = word_of(rounded[0], rounded[1]);
      stored_.y = word_of(rounded[2], rounded[3]);
    } else {
      stored_.z = word_of(rounded[0], rounded[1]);
      stored_.w = word_of(rounded[2], rounded[3]);
      __stcs(reinterpret_cast<uint4*>(at(tile_.first + 4 * quad - 4)), stored_);
    }
  }

 private:
  __device__ __forceinline__ S* at(int64_t element) const { return reinterpret_cast<S*>(address_) + element; }

  const volatile int64_t& address_;
  const Tile& tile_;
  uint4 loaded_, stored_;  // of 16-bit elements in vectors
};

// ---- Scalars ----

// torch.nn.utils.clip_grad_norm_'s coefficient, with its roundings; NaN stays.
__device__ __forceinline__ float clip_coefficient(float total_norm, float max_norm) {
  const float coefficient = __fmul_rn(__fdiv_rn(1.0f, __fadd_rn(total_norm, 1e-6f)), max_norm);
  return coefficient > 1.0f ? 1.0f : coefficient;
}

// ---- Launch ----

// As many blocks as the GPU holds at once: a block without a chunk costs less than asking the device how many there
// are.
template <class... Params, class... Args>
int launch_persistent(void (*kernel)(Params...), bool cooperative, Stream stream, Args... args) {
  const int resident = multiprocessor_count() * occupancy(kernel, kThreads, 0);
  LaunchConfig config{};
  config.grid = dim3(std::clamp(resident, 1, kMaxBlocks));
  config.block = dim3(kThreads);
  config.stream = stream;
  config.cooperative = cooperative;
  return launch(kernel, config, args...);
}

}  // namespace multi_tensor
}  // namespace bigkern
