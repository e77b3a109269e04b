// Copies between memory layouts: what is contiguous in the source is read by neighbouring lanes, what is contiguous in
// the destination written by them, through 32 x 32 tiles of shared memory. Floor: every element read and written once.
#pragma once

#include "kernels/conv.h"

#include "device/device.cuh"

#include <cstdint>

namespace bigkern {
namespace conv {

constexpr int kPermuteTile = 32, kPermuteRows = 8;

// What copies elements of T: their bits.
template <class T>
using Bits = typename bigkern::detail::Word<sizeof(T)>::type;

// Lengths and strides, in elements, of five axes: three outer ones, rows (contiguous in the destination) and columns
// (contiguous in the source, as a rule).
struct PermuteParams {
  const void* source;
  void* destination;
  int64_t outer[3], source_outer[3], destination_outer[3];
  int64_t rows, source_row, destination_row;
  int64_t cols, source_col, destination_col;
  int64_t tiles_rows, tiles_cols;
};

}  // namespace conv

// Word: an unsigned integer of the elements' size.
template <class Word>
__global__ void __launch_bounds__(conv::kPermuteTile* conv::kPermuteRows)
    conv_permute_kernel(const conv::PermuteParams p) {
  using namespace conv;
  // The odd pitch spreads a column over all banks, for words of 1, 2 and 4 bytes alike.
  BK_SHARED(Word, tile, [kPermuteTile][kPermuteTile + 1]);
  int64_t rest = blockIdx.x;
  const int64_t col0 = rest % p.tiles_cols * kPermuteTile;
  rest /= p.tiles_cols;
  const int64_t row0 = rest % p.tiles_rows * kPermuteTile;
  rest /= p.tiles_rows;
  const Word* source = static_cast<const Word*>(p.source);
  Word* destination = static_cast<Word*>(p.destination);
#pragma unroll
  for (int i = 2; i >= 0; i--) {
    const int64_t index = rest % p.outer[i];
    rest /= p.outer[i];
    source += index * p.source_outer[i];
    destination += index * p.destination_outer[i];
  }
  const int lane = threadIdx.x % kPermuteTile, first = threadIdx.x / kPermuteTile;
#pragma unroll
  for (int i = first; i < kPermuteTile; i += kPermuteRows) {
    if (row0 + i < p.rows && col0 + lane < p.cols) {
      tile[i][lane] = source[(row0 + i) * p.source_row + (col0 + lane) * p.source_col];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = first; i < kPermuteTile; i += kPermuteRows) {
    if (row0 + lane < p.rows && col0 + i < p.cols) {
      destination[(row0 + lane) * p.destination_row + (col0 + i) * p.destination_col] = tile[lane][i];
    }
  }
}

namespace conv {

template <class Word>
int launch_permute(PermuteParams p, Stream stream) {
  p.tiles_rows = ceil_div<int64_t>(p.rows, kPermuteTile);
  p.tiles_cols = ceil_div<int64_t>(p.cols, kPermuteTile);
  const int64_t blocks = p.tiles_rows * p.tiles_cols * p.outer[0] * p.outer[1] * p.outer[2];
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kPermuteTile * kPermuteRows), 0, stream};
  return launch(conv_permute_kernel<Word>, config, p);
}

// Whether vectors of `count` channels are aligned in every place; an absent tensor is.
inline bool whole_vectors(const ConvTensor& tensor, int count, size_t element_bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data) % (count * element_bytes) == 0 && tensor.image % count == 0 &&
         tensor.row % count == 0 && tensor.column % count == 0;
}

}  // namespace conv
}  // namespace bigkern
