#include "emulator/matrix.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace bigkern {

namespace {

using namespace emulator;

constexpr int kTile = 8;  // rows and columns of a tile of 16-bit elements

struct TileRequest {
  uint32_t* registers;
  void* row;
};

// Lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
void unpack(const uint16_t (&tile)[kTile][kTile], int lane, bool transposed, uint32_t* out) {
  const int i = lane / 4, j = lane % 4 * 2;
  const uint16_t low = transposed ? tile[j][i] : tile[i][j];
  const uint16_t high = transposed ? tile[j + 1][i] : tile[i][j + 1];
  *out = low | uint32_t{high} << 16;
}

template <int kTiles>
void load_tiles(const char* operation, uint32_t* registers, const void* row, bool transposed, Where where) {
  if (current->lane < kTile * kTiles) check_shared(row, 16, 16, operation, where);
  TileRequest mine{registers, const_cast<void*>(row)};
  warp_collective(operation, 0xffffffffu, &mine, where, [transposed, where](Rendezvous<kWarpSize>& meeting) {
    Fiber* const* lanes = &current->block->fibers[current->warp * kWarpSize];
    for (int t = 0; t < kTiles; t++) {
      uint16_t tile[kTile][kTile];
      for (int i = 0; i < kTile; i++) {
        const void* source = static_cast<TileRequest*>(meeting.argument[t * kTile + i])->row;
        record_access(lanes[t * kTile + i], source, sizeof(tile[i]), Access::kRead, Proxy::kGeneric, where);
        std::memcpy(tile[i], source, sizeof(tile[i]));
      }
      for (int lane = 0; lane < kWarpSize; lane++) {
        unpack(tile, lane, transposed, static_cast<TileRequest*>(meeting.argument[lane])->registers + t);
      }
    }
  });
}

float decode_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float decode_f16(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

// The hardware reads 10 bits of mantissa and ignores the rest.
float decode_tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct MultiplyRequest {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// d += a b, the products summed in fp32. Hardware sums them in an order and with a rounding of its own, so no test may
// ask for equal bits.
template <int kDepth>
void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], Rendezvous<kWarpSize>& meeting) {
  float product[16][8] = {};
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < kDepth; k++) {
      for (int j = 0; j < 8; j++) product[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    float* d = static_cast<MultiplyRequest*>(meeting.argument[lane])->d;
    const int g = lane / 4, t = lane % 4 * 2;
    d[0] += product[g][t];
    d[1] += product[g][t + 1];
    d[2] += product[g + 8][t];
    d[3] += product[g + 8][t + 1];
  }
}

template <float (*decode)(uint16_t)>
void multiply16(const char* operation, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  MultiplyRequest mine{d, a, b};
  warp_collective(operation, 0xffffffffu, &mine, where, [](Rendezvous<kWarpSize>& meeting) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarpSize; lane++) {
      const auto& request = *static_cast<MultiplyRequest*>(meeting.argument[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int half = 0; half < 2; half++) {
        auto element = [half](uint32_t pair) { return decode(static_cast<uint16_t>(pair >> 16 * half)); };
        left[g][t + half] = element(request.a[0]);
        left[g + 8][t + half] = element(request.a[1]);
        left[g][t + 8 + half] = element(request.a[2]);
        left[g + 8][t + 8 + half] = element(request.a[3]);
        right[t + half][g] = element(request.b[0]);
        right[t + 8 + half][g] = element(request.b[1]);
      }
    }
    multiply(left, right, meeting);
  });
}

}  // namespace

void ldmatrix_x1(uint32_t (&r)[1], const void* row, Where where) {
  load_tiles<1>("ldmatrix_x1", r, row, false, where);
}
void ldmatrix_x2(uint32_t (&r)[2], const void* row, Where where) {
  load_tiles<2>("ldmatrix_x2", r, row, false, where);
}
void ldmatrix_x4(uint32_t (&r)[4], const void* row, Where where) {
  load_tiles<4>("ldmatrix_x4", r, row, false, where);
}

void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, Where where) {
  load_tiles<1>("ldmatrix_x1_trans", r, row, true, where);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Where where) {
  load_tiles<2>("ldmatrix_x2_trans", r, row, true, where);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Where where) {
  load_tiles<4>("ldmatrix_x4_trans", r, row, true, where);
}

void stmatrix_x4(void* row, const uint32_t (&r)[4], Where where) {
  check_shared(row, 16, 16, "stmatrix_x4", where);
  TileRequest mine{const_cast<uint32_t*>(r), row};
  warp_collective("stmatrix_x4", 0xffffffffu, &mine, where, [where](Rendezvous<kWarpSize>& meeting) {
    Fiber* const* lanes = &current->block->fibers[current->warp * kWarpSize];
    for (int t = 0; t < 4; t++) {
      uint32_t tile[kTile][kTile / 2];
      for (int lane = 0; lane < kWarpSize; lane++) {
        tile[lane / 4][lane % 4] = static_cast<TileRequest*>(meeting.argument[lane])->registers[t];
      }
      for (int i = 0; i < kTile; i++) {
        void* target = static_cast<TileRequest*>(meeting.argument[t * kTile + i])->row;
        record_access(lanes[t * kTile + i], target, sizeof(tile[i]), Access::kWrite, Proxy::kGeneric, where);
        std::memcpy(target, tile[i], sizeof(tile[i]));
      }
    }
  });
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  multiply16<decode_bf16>("mma_m16n8k16_bf16", d, a, b, where);
}

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  multiply16<decode_f16>("mma_m16n8k16_f16", d, a, b, where);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  MultiplyRequest mine{d, a, b};
  warp_collective("mma_m16n8k8_tf32", 0xffffffffu, &mine, where, [](Rendezvous<kWarpSize>& meeting) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < kWarpSize; lane++) {
      const auto& request = *static_cast<MultiplyRequest*>(meeting.argument[lane]);
      const int g = lane / 4, t = lane % 4;
      left[g][t] = decode_tf32(request.a[0]);
      left[g + 8][t] = decode_tf32(request.a[1]);
      left[g][t + 4] = decode_tf32(request.a[2]);
      left[g + 8][t + 4] = decode_tf32(request.a[3]);
      right[t][g] = decode_tf32(request.b[0]);
      right[t + 4][g] = decode_tf32(request.b[1]);
    }
    multiply(left, right, meeting);
  });
}

// cvt.rna: to nearest, halves away from zero.
uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

}  // namespace bigkern
