// Tensor-core multiplication of one warp and the moves of its 8x8 tiles; fragment layouts as in device/cuda/mma.cuh.
#pragma once

#include <cstdint>

#include "emulator/core.h"
#include "emulator/warp.h"

namespace bigkern {

void ldmatrix_x1(uint32_t (&r)[1], const void* row, BK_WHERE);
void ldmatrix_x2(uint32_t (&r)[2], const void* row, BK_WHERE);
void ldmatrix_x4(uint32_t (&r)[4], const void* row, BK_WHERE);
void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, BK_WHERE);
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, BK_WHERE);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, BK_WHERE);
void stmatrix_x4(void* row, const uint32_t (&r)[4], BK_WHERE);

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BK_WHERE);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BK_WHERE);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BK_WHERE);

uint32_t to_tf32(float x);

}  // namespace bigkern
