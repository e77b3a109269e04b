// Lists of tensors that one launch works on, as tables in device memory. Plain C++. bigkern/ops/adam/_plan.py writes
// the tables; a test holds its numbers to these.
#pragma once

#include <cstdint>

namespace bigkern {

// Columns of a tensor's row (int64). Addresses of what is absent are 0.
enum TensorColumn : int {
  kParamColumn,
  kExpAvgColumn,       // SGD: the momentum buffer
  kExpAvgSqColumn,     //
  kMaxExpAvgSqColumn,  // amsgrad
  kMasterColumn,       // fp32 copy of the parameter, which then is only written
  kEmaColumn,          // fp32 moving average of the parameter
  kStepColumn,         // fp32, the steps taken; the kernel adds 1. No two tensors share one
  kNumelColumn,        //
  kDtypesColumn,       // ElementCode of parameter and gradient, and of the states in the next byte
  kGroupColumn,        // row of `hyper`
  kTensorColumns
};

enum ElementCode : int { kFloatCode, kBFloat16Code, kHalfCode };

// Columns of a parameter group's row (float64).
enum HyperColumn : int {
  kLrColumn,
  kLrPointerColumn,  // bits of the address of an fp32 learning rate on the device; 0: kLrColumn holds it
  kBeta1Column,
  kBeta2Column,
  kEpsColumn,
  kWeightDecayColumn,
  kL1Column,
  kEmaDecayColumn,
  kMomentumColumn,
  kDampeningColumn,
  kFlagsColumn,  // sum of HyperFlag
  kHyperColumns
};

enum HyperFlag : int { kMaximize = 1, kDecoupled = 2, kNesterov = 4, kStochasticRounding = 8 };

// The unit in which work is dealt to blocks: elements of one tensor.
constexpr int kChunk = 2048;

// 64-bit words of scratch memory: counters of finished blocks, zero between launches, and a double a block.
constexpr int kMaxBlocks = 2048;
constexpr int kScratchWords = 2 + kMaxBlocks;

// A tensor's elements lie dense from its addresses on, in the same order at each of them.
struct MultiTensor {
  const int64_t* tensors;     // count x kTensorColumns
  const int64_t* chunk_ends;  // count: chunks of the tensors up to and with this one
  const int64_t* grads;       // count: addresses of the gradients, apart because they alone change from step to step
  int64_t* scratch;           // kScratchWords
  int64_t count;              // positive
};

}  // namespace bigkern
