// What all of attention's kernels have in common, whatever multiplies their tiles: which rows and keys a block works
// on, the features of a score, and the launchers' questions. Scores are the accumulators of mma and of wgmma, which lie
// alike: a warp's 16 rows, tile i of 8 columns, elements 0 and 1 in row lane / 4, 2 and 3 eight rows below.
#pragma once

#include "device/device.cuh"
#include "kernels/attention.h"

#include <cstdint>
#include <type_traits>

namespace bigkern {
namespace attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  static_assert(sizeof(pair) == sizeof(word), "two 16-bit numbers");
  memcpy(&word, pair, sizeof(word));
  return word;
}

// exp(x factor / kLog2e). fp32's rounds as torch's: x log2(e), rounded once, would err by half of x's last place.
template <class T>
__device__ __forceinline__ float exponential(float x, float factor) {
  return sizeof(T) == 4 ? expf(x) : exp2f(x * factor);
}

// ---- Which rows and keys a block works on ----

// One sequence of the batch.
struct Sequence {
  int queries, keys;     // rows of its own
  int first_q, first_k;  // before them in packed tensors
  int shift;             // position of query 0

  __device__ __forceinline__ Sequence(const AttentionOptions& p, int b) {
    queries = p.seqlen_q, keys = p.seqlen_k, first_q = 0, first_k = 0;
    if (p.cu_seqlens_q != nullptr) {
      // Whatever the numbers, rows stay within the tensors.
      first_q = min(max(p.cu_seqlens_q[b], 0), p.total_q);
      queries = min(max(min(p.cu_seqlens_q[b + 1], p.total_q) - first_q, 0), p.seqlen_q);
      first_k = min(max(p.cu_seqlens_k[b], 0), p.total_k);
      keys = min(max(min(p.cu_seqlens_k[b + 1], p.total_k) - first_k, 0), p.seqlen_k);
    }
    shift = p.bottom_right ? keys - queries : 0;
  }

  // The keys [first_key, end_key) that a query may see by the window.
  __device__ __forceinline__ int first_key(const AttentionOptions& p, int query) const {
    return p.window_left < 0 ? 0 : max(0, query + shift - p.window_left);
  }
  __device__ __forceinline__ int end_key(const AttentionOptions& p, int query) const {
    return p.window_right < 0 ? keys : max(0, min(keys, query + shift + p.window_right + 1));
  }

  // Where a row of a tensor begins; packed tensors have one batch.
  template <class T>
  __device__ __forceinline__ T* row(const AttentionOptions& p, const AttentionTensor& x, int b, int head, int first,
                                    int row) const {
    const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : b;
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
           (static_cast<int64_t>(first) + row) * x.row_stride;
  }

  // Where a head's rows begin in lse and its like.
  __device__ __forceinline__ int64_t statistics(const AttentionOptions& p, int b, int head) const {
    if (p.cu_seqlens_q != nullptr) return int64_t{head} * p.total_q + first_q;
    return (int64_t{b} * p.heads + head) * p.seqlen_q;
  }
};

// ---- Features of the scores, the same in both directions ----

// Mask elements are M: unsigned char (bool), float or T. `Head`, `Query` and `Key` give the place of element e of
// accumulator tile i, which may lie beyond the last query or key.
template <class M, int kTiles, class Head, class Query, class Key>
__device__ __forceinline__ void add_mask(const AttentionOptions& p, const Sequence& sequence, int b,
                                         float (&scores)[kTiles][4], Head head, Query query, Key key) {
  const M* mask = static_cast<const M*>(p.mask) + b * p.mask_strides[0];
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = query(i, e), col = key(i, e);
      if (row >= sequence.queries || col >= sequence.keys) continue;
      const M value = mask[head(e) * p.mask_strides[1] + row * p.mask_strides[2] + col * p.mask_strides[3]];
      if constexpr (std::is_same_v<M, unsigned char>) {
        if (!value) scores[i][e] = -INFINITY;
      } else {
        scores[i][e] += to_float(value);
      }
    }
  }
}

// From q . k to the scores, and their derivatives by scale q . k where wanted. Each feature is one branch over the
// tile.
template <class T, int kTiles, bool kDerivative, class Head, class Query, class Key>
__device__ __forceinline__ void add_features(const AttentionOptions& p, const Sequence& sequence, int b,
                                             float (&scores)[kTiles][4],
                                             float (&derivative)[kDerivative ? kTiles : 1][4], Head head, Query query,
                                             Key key) {
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      scores[i][e] *= p.scale;
      if constexpr (kDerivative) derivative[i][e] = 1.0f;
    }
  }
  if (p.softcap > 0.0f) {
    const float inverse = 1.0f / p.softcap;
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float t = tanhf(scores[i][e] * inverse);
        scores[i][e] = p.softcap * t;
        if constexpr (kDerivative) derivative[i][e] = 1.0f - t * t;
      }
    }
  }
  if (p.mask_kind == AttentionMask::kBool) {
    add_mask<unsigned char>(p, sequence, b, scores, head, query, key);
  } else if (p.mask_kind == AttentionMask::kFloat) {
    add_mask<float>(p, sequence, b, scores, head, query, key);
  } else if (p.mask_kind == AttentionMask::kSame) {
    add_mask<T>(p, sequence, b, scores, head, query, key);
  }
  if (p.slopes != nullptr) {
    const float* slopes = p.slopes + b * p.slopes_batch_stride;
    const float low = slopes[head(0)], high = slopes[head(2)];
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int distance = query(i, e) + sequence.shift - key(i, e);
        scores[i][e] -= (e < 2 ? low : high) * fabsf(static_cast<float>(distance));
      }
    }
  }
}

// One score's gradient to the mask's, where it is wanted.
template <class T>
__device__ __forceinline__ void store_mask_gradient(const AttentionBackwardParams& p, const Sequence& sequence, int b,
                                                    int head, int query, int key, float grad) {
  if (p.mask_gradient_kind == AttentionMaskGradient::kNone || query >= sequence.queries || key >= sequence.keys) return;
  const int64_t place = b * p.mask_gradient_strides[0] + head * p.mask_gradient_strides[1] +
                        query * p.mask_gradient_strides[2] + key * p.mask_gradient_strides[3];
  if (p.mask_gradient_kind == AttentionMaskGradient::kStore) {
    static_cast<T*>(p.mask_gradient)[place] = from_float<T>(grad);
  } else if (p.mask_gradient_kind == AttentionMaskGradient::kStoreFloat) {
    static_cast<float*>(p.mask_gradient)[place] = grad;
  } else {
    atomicAdd(static_cast<float*>(p.mask_gradient) + place, grad);
  }
}

// Whether dropout keeps element `index` of the (batch, heads, seqlen_q, seqlen_k) weights.
__device__ __forceinline__ bool keeps(const AttentionOptions& p, uint64_t seed, uint64_t offset, uint64_t index) {
  const uint4 words = philox4x32_10(seed, index / 4, offset);
  const int which = static_cast<int>(index % 4);
  const uint32_t word = which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
  return uniform(word) > p.dropout_p;
}

// Of four neighbours, the first of which is element 4 group: a bit each.
__device__ __forceinline__ uint32_t keeps_four(const AttentionOptions& p, uint64_t seed, uint64_t offset,
                                               uint64_t group) {
  const uint4 words = philox4x32_10(seed, group, offset);
  return uint32_t{uniform(words.x) > p.dropout_p} | uint32_t{uniform(words.y) > p.dropout_p} << 1 |
         uint32_t{uniform(words.z) > p.dropout_p} << 2 | uint32_t{uniform(words.w) > p.dropout_p} << 3;
}

// Bit 4 i + e: whether element e of accumulator tile i is kept; low and high are the elements' numbers at key 0 of the
// accumulator's two rows. A group of four keys is drawn once, by one of the two lanes that hold it, for one of the
// rows.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_scores(const AttentionOptions& p, uint64_t low, uint64_t high, int key0) {
  static_assert(kTiles <= 8, "a bit each");
  if (p.philox == nullptr) return ~0u;
  const uint64_t seed = p.philox[0], offset = p.philox[1];
  const int t = threadIdx.x % 4;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < kTiles; i++) {
    uint32_t bits = 0;
    const int key = key0 + 8 * i;
    if (p.seqlen_k % 4 == 0) {
      const uint32_t own = keeps_four(p, seed, offset, ((t % 2 == 0 ? low : high) + key) / 4 + t / 2);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
      const int from = t % 2 * 2;
      bits = ((t % 2 == 0 ? own : other) >> from & 3) | ((t % 2 == 0 ? other : own) >> from & 3) << 2;
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; e++) {
        bits |= uint32_t{keeps(p, seed, offset, (e < 2 ? low : high) + key + 2 * t + e % 2)} << e;
      }
    }
    kept |= bits << (4 * i);
  }
  return kept;
}

// The same of transposed scores, whose columns are queries from `first` on (the number of query 0, key 0 of the tile,
// to which rows and columns add). Four lanes share each group of four keys; each draws one of the groups.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_scores_trans(const AttentionOptions& p, uint64_t first) {
  static_assert(kTiles <= 8, "a bit each");
  if (p.philox == nullptr) return ~0u;
  const uint64_t seed = p.philox[0], offset = p.philox[1];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < kTiles; i++) {
    uint32_t bits = 0;
    const uint64_t column = first + static_cast<uint64_t>(8 * i + 2 * t) * p.seqlen_k;
    if (p.seqlen_k % 4 == 0) {
      const int mine = g % 4;  // the element e whose group this lane draws
      const uint64_t group = column + (mine % 2 ? p.seqlen_k : 0) + g / 4 * 4 + mine / 2 * 8;
      uint32_t all = keeps_four(p, seed, offset, group / 4) << (4 * mine);
      all |= __shfl_xor_sync(0xffffffffu, all, 4);
      all |= __shfl_xor_sync(0xffffffffu, all, 8);
#pragma unroll
      for (int e = 0; e < 4; e++) bits |= (all >> (4 * e + g % 4) & 1) << e;
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; e++) {
        bits |= uint32_t{keeps(p, seed, offset, column + (e % 2 ? p.seqlen_k : 0) + g + e / 2 * 8)} << e;
      }
    }
    kept |= bits << (4 * i);
  }
  return kept;
}

// ---- Launching ----

constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kErrorInvalidValue = 1;  // cudaErrorInvalidValue

inline LaunchConfig attention_grid(int64_t blocks, int threads, size_t shared_bytes, Stream stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks), 1, 1);
  config.block = dim3(threads, 1, 1);
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

// Whether rows of `cols` elements can move in 16-byte vectors.
template <class T>
bool moves_in_vectors(const AttentionTensor& x, int cols) {
  constexpr int64_t kVec = kVecElements<T>;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % kVec == 0 && x.head_stride % kVec == 0 &&
         x.row_stride % kVec == 0 && cols % kVec == 0;
}

// Windows alone: what the plain instances serve.
inline bool is_plain(const AttentionOptions& p) {
  return p.mask_kind == AttentionMask::kNone && p.softcap == 0.0f && p.slopes == nullptr && p.philox == nullptr &&
         p.scale > 0.0f;
}

}  // namespace attention
}  // namespace bigkern
