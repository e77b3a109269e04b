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
// elements of a tensor, one by one, neighbouring threads on neighbouring elements. Either way a thread holds eight a
// turn. Types are told apart by branches that a whole block takes alike: with a copy of the code for each pair of types
// ptxas would have kept more than 64 registers alive, and one launch could not have served them all without spills.
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

// A value that the block shares, read from shared memory here and not kept in a register since an earlier read.
template <class Value>
__device__ __forceinline__ Value reload(const Value& shared) {
  return *const_cast<const volatile Value*>(&shared);
}

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
// open(job, previous, tensor, first_chunk), where previous is the job before it or null. Work finds all of it in shared
// memory, and so does the loop itself: the registers are the tiles'.
template <class Job, class Open, class Work>
__device__ __forceinline__ void for_each_tensor(const MultiTensor& list, Open&& open, Work&& work) {
  struct Turn {
    Job job;
    Chunks chunks;
    int tensor;
    int next_chunk, last_chunk;  // counted through the list
  };
  BK_SHARED(Turn, turns, [2]);
  const int64_t chunks = chunk_end(list, static_cast<int>(list.count) - 1);
  int chunk = static_cast<int>(chunks * blockIdx.x / gridDim.x);
  int last = static_cast<int>(chunks * (blockIdx.x + 1) / gridDim.x);
  if (chunk == last) return;
  int count = 0;
  for (int tensor = find_tensor(list, chunk); chunk < last; tensor++) {
    const int first_chunk = chunk_end(list, tensor - 1), end_chunk = chunk_end(list, tensor);
    if (end_chunk == first_chunk) continue;
    Turn& turn = turns[count % 2];
    if (threadIdx.x == 0) {
      open(turn.job, count > 0 ? &turns[(count + 1) % 2].job : nullptr, tensor, first_chunk);
      turn.chunks = {chunk - first_chunk, min(end_chunk, last) - first_chunk};
      turn.tensor = tensor;
      turn.next_chunk = end_chunk;
      turn.last_chunk = last;
    }
    // The one barrier a tensor: who fills this turn again has passed the next one, behind all readers.
    __syncthreads();
    work(turn.job, turn.chunks);
    tensor = reload(turn.tensor);
    chunk = reload(turn.next_chunk);
    last = reload(turn.last_chunk);
    count++;
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

// Elements of a thread in one turn of its block, in two quads.
constexpr int kWidth = 8;
static_assert(kChunk == kThreads * kWidth, "a chunk is a turn");

// A thread's elements in one turn: neighbours, or kThreads apart as far as there are any.
template <bool kVector>
struct Tile {
  static constexpr bool kIsVector = kVector;
  int chunk;  // of the tensor
  int first;  // element of the chunk
  int count;  // elements of the chunk

  __device__ __forceinline__ int place(int i) const { return first + (kVector ? i : i * kThreads); }
  __device__ __forceinline__ bool has(int i) const { return kVector || place(i) < count; }
  __device__ __forceinline__ int64_t element(int i) const { return int64_t{chunk} * kChunk + place(i); }
};

// Elements of the chunk that move in vectors, and all of them.
__device__ __forceinline__ int2 chunk_counts(int chunk, int64_t numel, bool aligned) {
  const int count = static_cast<int>(min(int64_t{kChunk}, numel - int64_t{chunk} * kChunk));
  return make_int2(aligned ? count / kWidth * kWidth : 0, count);
}

// Calls f with this thread's tiles of a tensor's chunks. What f and this loop read from shared memory they read again
// for each tile: as loop invariants the addresses and scalars of a step would fill 40 registers, and __syncwarp keeps
// the compiler from making them so.
template <class F>
__device__ __forceinline__ void for_each_tile(const Chunks& chunks, const int64_t& numel, const bool& aligned, F&& f) {
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; chunk++) {
    __syncwarp();
    if (const int i = threadIdx.x * kWidth; i < chunk_counts(chunk, numel, aligned).x) {
      f(Tile<true>{chunk, i, kChunk});
    }
    __syncwarp();
    const int2 counts = chunk_counts(chunk, numel, aligned);
    if (const int i = counts.x + threadIdx.x; i < counts.y) {
      f(Tile<false>{chunk, i, counts.y});
    }
  }
}

// The bits of a 16-bit element in the low or the high half of a word as a float, and back.
__device__ __forceinline__ float widen(int code, uint32_t word, int half) {
  if (code == kBFloat16Code) return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
  return to_float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * half))));
}
__device__ __forceinline__ uint32_t narrow(int code, float x) {
  return code == kBFloat16Code ? __bfloat16_as_ushort(from_float<__nv_bfloat16>(x))
                               : __half_as_ushort(from_float<__half>(x));
}

// The float as an element of the type would give it back.
__device__ __forceinline__ float round_to(int code, float x) {
  return code == kFloatCode ? x : widen(code, narrow(code, x), 0);
}

// Which of the types in kDtypesColumn an array has.
enum class Kind { kParam, kState, kFloat };

// A thread's elements of one array, of a type known at run time, as floats: quad q has elements 4q to 4q + 3. fetch()
// starts the loads, get() waits for them. In vectors, floats move 16 bytes a quad; eight 16-bit elements move with the
// first quad's load and the second one's store, and are kept two a register between those.
template <Kind kKind, class Tile>
class Quads {
 public:
  // Address and types are read from the job, in shared memory, at each access, and not kept in registers.
  __device__ __forceinline__ Quads(const int64_t& address, const int& dtypes, const Tile& tile)
      : address_(address), dtypes_(dtypes), tile_(tile) {}

  __device__ __forceinline__ bool present() const { return reload(address_) != 0; }

  __device__ __forceinline__ void fetch(int quad) {
    const bool is_float = code() == kFloatCode;
    if constexpr (Tile::kIsVector) {
      if (quad == 0 || is_float) words_ = __ldcs(reinterpret_cast<const uint4*>(vector(quad, is_float)));
    } else {
      words_ = make_uint4(one(4 * quad, is_float), one(4 * quad + 1, is_float), one(4 * quad + 2, is_float),
                          one(4 * quad + 3, is_float));
    }
  }

  __device__ __forceinline__ void get(float (&values)[4]) {
    const int type = code();
    if (type == kFloatCode) {
      values[0] = __uint_as_float(words_.x);
      values[1] = __uint_as_float(words_.y);
      values[2] = __uint_as_float(words_.z);
      values[3] = __uint_as_float(words_.w);
    } else if constexpr (Tile::kIsVector) {
      values[0] = widen(type, words_.x, 0);
      values[1] = widen(type, words_.x, 1);
      values[2] = widen(type, words_.y, 0);
      values[3] = widen(type, words_.y, 1);
      words_.x = words_.z;
      words_.y = words_.w;
    } else {
      values[0] = widen(type, words_.x, 0);
      values[1] = widen(type, words_.y, 0);
      values[2] = widen(type, words_.z, 0);
      values[3] = widen(type, words_.w, 0);
    }
  }

  // Rounds to the type.
  __device__ __forceinline__ void store(int quad, const float (&values)[4]) { store(quad, values, first_); }

  // `first` is where the first quad waits for the second one.
  __device__ __forceinline__ void store(int quad, const float (&values)[4], uint2& first) {
    const int type = code();
    const bool is_float = type == kFloatCode;
    if constexpr (!Tile::kIsVector) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (!tile_.has(4 * quad + j)) continue;
        char* p = at(4 * quad + j, is_float);
        if (is_float) {
          __stcs(reinterpret_cast<float*>(p), values[j]);
        } else {
          __stcs(reinterpret_cast<unsigned short*>(p), static_cast<unsigned short>(narrow(type, values[j])));
        }
      }
    } else if (is_float) {
      __stcs(reinterpret_cast<float4*>(vector(quad, true)), make_float4(values[0], values[1], values[2], values[3]));
    } else {
      const uint32_t low = narrow(type, values[0]) | narrow(type, values[1]) << 16;
      const uint32_t high = narrow(type, values[2]) | narrow(type, values[3]) << 16;
      if (quad == 0) {
        first = make_uint2(low, high);
      } else {
        const uint2 before = first;
        __stcs(reinterpret_cast<uint4*>(vector(0, false)), make_uint4(before.x, before.y, low, high));
      }
    }
  }

 private:
  __device__ __forceinline__ int code() const {
    if constexpr (kKind == Kind::kFloat) return kFloatCode;
    return reload(dtypes_) >> (kKind == Kind::kState ? 8 : 0) & 0xff;
  }
  // Step by step from the address on: one offset for all arrays would be kept, two registers a type.
  __device__ __forceinline__ char* at(int i, bool is_float) const {
    const int size = is_float ? 4 : 2;
    char* const chunk = reinterpret_cast<char*>(reload(address_)) + int64_t{tile_.chunk} * (kChunk * size);
    return chunk + tile_.place(i) * size;
  }
  __device__ __forceinline__ char* vector(int quad, bool is_float) const { return at(0, is_float) + 16 * quad; }
  __device__ __forceinline__ uint32_t one(int i, bool is_float) const {
    if (!tile_.has(i)) return 0;
    const char* p = at(i, is_float);
    return is_float ? __ldcs(reinterpret_cast<const unsigned*>(p)) : __ldcs(reinterpret_cast<const unsigned short*>(p));
  }

  const int64_t& address_;
  const int& dtypes_;
  const Tile& tile_;
  uint4 words_;
  uint2 first_;
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
