#include "emulator/matrix.h"

#include <cstring>

namespace bigkern {

namespace {

using namespace emulator;

constexpr int kTile = 8;  // rows and columns of a tile of 16-bit elements
constexpr unsigned kAllLanes = 0xffffffffu;

struct Lane {
  Fiber& fiber;
  WarpRegisters& registers;
  int row, column;  // in a tile: a lane holds the pair of elements from (row, column) on
};

Lane this_lane() {
  Fiber& fiber = *current;
  return {fiber, fiber.own_warp->registers, fiber.lane / 4, fiber.lane % 4 * 2};
}

Fiber* const* lanes_of(const Fiber& fiber) {
  return &fiber.block->fibers[fiber.warp * kWarpSize];
}

template <int kTiles>
void load_tiles(const char* operation, uint32_t* registers, const void* row, bool transposed, Where where) {
  const Lane lane = this_lane();
  auto& tiles = lane.registers.loaded_tiles;
  if (lane.fiber.lane < kTile * kTiles) check_shared(row, sizeof(tiles[0][0]), 16, operation, where);
  warp_collective(operation, kAllLanes, const_cast<void*>(row), where, [&tiles, where](WarpMeeting& meeting) {
    count_bank_tiles(*current, meeting.argument, kTiles, false, where);
    Fiber* const* lanes = lanes_of(*current);
    for (int t = 0; t < kTiles; t++) {
      for (int i = 0; i < kTile; i++) {
        const void* source = meeting.argument[t * kTile + i];
        record_access(lanes[t * kTile + i], source, sizeof(tiles[t][i]), Access::kRead, Proxy::kGeneric, where);
        std::memcpy(tiles[t][i], source, sizeof(tiles[t][i]));
      }
    }
  });
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; t++) {
    const auto& tile = tiles[t];
    const uint32_t low = transposed ? tile[lane.column][lane.row] : tile[lane.row][lane.column];
    const uint32_t high = transposed ? tile[lane.column + 1][lane.row] : tile[lane.row][lane.column + 1];
    registers[t] = low | high << 16;
  }
}

float decode_bf16(uint16_t bits) {
  return bits_as<float>(uint32_t{bits} << 16);
}

// Without branches, so that the compiler takes several at once.
float decode_f16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t rebias = magnitude >= 0x7c00u ? 2 * (112u << 23) : 112u << 23;  // infinities and NaN keep all ones
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = bits_as<uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
  return bits_as<float>((magnitude < 0x0400u ? subnormal : normal) | uint32_t{bits & 0x8000u} << 16);
}

// The hardware reads 10 bits of mantissa and ignores the rest.
uint32_t truncate_tf32(uint32_t bits) {
  return bits & 0xffffe000u;
}

using Four = float __attribute__((vector_size(16)));

// product = a b, summed in fp32 in the order of k. Hardware sums in an order and with a rounding of its own, so no test
// may ask for equal bits.
template <int kDepth>
void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], float (&product)[16][8]) {
  constexpr int kRows = 4;  // at a time: their sums stay in vector registers
  for (int i = 0; i < 16; i += kRows) {
    Four left[kRows] = {}, right[kRows] = {};
    for (int k = 0; k < kDepth; k++) {
      Four columns[2];
      std::memcpy(columns, b[k], sizeof(columns));
      for (int r = 0; r < kRows; r++) {
        const float factor = a[i + r][k];
        left[r] += factor * columns[0];
        right[r] += factor * columns[1];
      }
    }
    for (int r = 0; r < kRows; r++) {
      std::memcpy(&product[i + r][0], &left[r], sizeof(Four));
      std::memcpy(&product[i + r][4], &right[r], sizeof(Four));
    }
  }
}

void add_product(const Lane& lane, float* d) {
  const auto& product = lane.registers.product;
  d[0] += product[lane.row][lane.column];
  d[1] += product[lane.row][lane.column + 1];
  d[2] += product[lane.row + 8][lane.column];
  d[3] += product[lane.row + 8][lane.column + 1];
}

template <float (*decode)(uint16_t)>
void multiply16(const char* operation, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  const Lane lane = this_lane();
  const int row = lane.row, column = lane.column;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    std::memcpy(&lane.registers.left[row + 8 * (i % 2)][column + 8 * (i / 2)], &a[i], sizeof(a[i]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    lane.registers.right[column + 8 * i][row] = static_cast<uint16_t>(b[i]);
    lane.registers.right[column + 8 * i + 1][row] = static_cast<uint16_t>(b[i] >> 16);
  }
  warp_collective(operation, kAllLanes, nullptr, where, [&registers = lane.registers](WarpMeeting&) {
    float left[16][16], right[16][8];
    for (int k = 0; k < 16; k++) {
      for (int i = 0; i < 16; i++) left[k][i] = decode(registers.left[k][i]);
      for (int j = 0; j < 8; j++) right[k][j] = decode(registers.right[k][j]);
    }
    multiply(left, right, registers.product);
  });
  add_product(lane, d);
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
  const Lane lane = this_lane();
  auto& tiles = lane.registers.stored_tiles;
  check_shared(row, sizeof(tiles[0][0]), 16, "stmatrix_x4", where);
  for (int t = 0; t < 4; t++) tiles[t][lane.row][lane.column / 2] = r[t];
  warp_collective("stmatrix_x4", kAllLanes, row, where, [&tiles, where](WarpMeeting& meeting) {
    count_bank_tiles(*current, meeting.argument, 4, true, where);
    Fiber* const* lanes = lanes_of(*current);
    for (int t = 0; t < 4; t++) {
      for (int i = 0; i < kTile; i++) {
        void* target = meeting.argument[t * kTile + i];
        record_access(lanes[t * kTile + i], target, sizeof(tiles[t][i]), Access::kWrite, Proxy::kGeneric, where);
        std::memcpy(target, tiles[t][i], sizeof(tiles[t][i]));
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
  const Lane lane = this_lane();
  const int g = lane.row, t = lane.column / 2;
  for (int i = 0; i < 4; i++) {
    lane.registers.left_tf32[g + 8 * (i % 2)][t + 4 * (i / 2)] = bits_as<float>(truncate_tf32(a[i]));
  }
  for (int i = 0; i < 2; i++) lane.registers.right_tf32[t + 4 * i][g] = bits_as<float>(truncate_tf32(b[i]));
  warp_collective("mma_m16n8k8_tf32", kAllLanes, nullptr, where, [&registers = lane.registers](WarpMeeting&) {
    multiply(registers.left_tf32, registers.right_tf32, registers.product);
  });
  add_product(lane, d);
}

// cvt.rna: to nearest, halves away from zero.
uint32_t to_tf32(float x) {
  const auto bits = bits_as<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? truncate_tf32(bits + 0x1000u) : bits;
}

}  // namespace bigkern
