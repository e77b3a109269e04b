#include "emulator/wgmma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "emulator/counters.h"
#include "emulator/tma.h"

namespace bigkern {

namespace emulator {

namespace {

constexpr int kWarpsPerGroup = 4;
constexpr int kRows = 16;                   // of one warp
constexpr int kDepth = 16;                  // elements of K in one product
constexpr int kChunk = 8;                   // elements of 16 bits that lie together under every layout and swizzle
constexpr uint32_t kInFlight = 0xffffffff;  // a NaN: what is read too early shows
constexpr int kRegisterFile = 65536;
constexpr int kMaxRegisters = 256;

// The arguments of one warp's part of a product.
struct WarpProduct {
  Product product;
  float* d[kWarpSize];
  const uint32_t* a[kWarpSize];
  // The accumulators as they were, lane by lane, while the kernel's own hold kInFlight. Empty when an earlier product
  // in flight has the same accumulators: then they are this one's when that one completes.
  std::vector<float> before;
};

struct LaneArgument {
  const Product* product;
  float* d;
  const uint32_t* a;
};

bool operator==(const Product& x, const Product& y) {
  auto fields = [](const Product& p) {
    return std::tie(p.columns, p.half, p.a_in_registers, p.trans_a, p.trans_b, p.accumulate, p.a, p.b);
  };
  return fields(x) == fields(y);
}

// What a warpgroup's warps must execute alike, one after another: the first to reach a step sets it.
template <class Step>
class CommonSequence {
 public:
  // False when another warp's step of the same number differs.
  bool advance(int warp, const Step& step) {
    const size_t ahead = taken_[warp]++ - dropped_;
    if (ahead == steps_.size()) {
      steps_.push_back(step);
      return true;
    }
    const bool same = steps_[ahead] == step;
    if (*std::min_element(taken_, taken_ + kWarpsPerGroup) > dropped_) {
      steps_.pop_front();
      dropped_++;
    }
    return same;
  }
  bool complete() const { return steps_.empty(); }  // all warps have taken the same number
  std::string counts() const {
    std::string text;
    for (size_t count : taken_) text += (text.empty() ? "" : ", ") + std::to_string(count);
    return text;
  }

 private:
  std::deque<Step> steps_;  // those that some warp has not taken yet
  size_t dropped_ = 0;
  size_t taken_[kWarpsPerGroup] = {};
};

struct WarpState {
  std::vector<WarpProduct> open;
  std::deque<std::vector<WarpProduct>> groups;  // committed, oldest first
  AsyncInterval interval;
  unsigned fenced = 0;  // lanes that have called wgmma_fence since the last wait
  int registers = 0;    // per thread; 0 until setmaxnreg
};

struct WarpgroupState {
  CommonSequence<Product> products;
  CommonSequence<int> registers;
};

struct Warpgroups : BlockExtension {
  std::vector<WarpState> warps;
  std::vector<WarpgroupState> groups;
  std::vector<Fiber*> waiting_for_registers;

  void on_thread_exit(Fiber& fiber) override {
    const WarpState& warp = warps[fiber.warp];
    if (!warp.open.empty() || !warp.groups.empty()) fail("a thread exits with a wgmma in flight: no wgmma_wait<0>()");
  }
  void on_block_exit(Block&) override {
    for (const WarpgroupState& group : groups) {
      if (!group.products.complete()) {
        fail("the warps of a warpgroup executed different numbers of wgmma: " + group.products.counts());
      }
      if (!group.registers.complete()) {
        fail("the warps of a warpgroup executed different numbers of setmaxnreg: " + group.registers.counts());
      }
    }
  }
};

Warpgroups& warpgroups(Block& block) {
  Warpgroups& state = extension<Warpgroups>(block);
  if (state.warps.empty()) {
    state.warps.resize(block.warps.size());
    state.groups.resize((block.warps.size() + kWarpsPerGroup - 1) / kWarpsPerGroup);
  }
  return state;
}

WarpState& my_warp() {
  return warpgroups(*current->block).warps[current->warp];
}

WarpgroupState& my_group(const char* operation, Where where) {
  Block& block = *current->block;
  const int group = current->warp / kWarpsPerGroup;
  if ((group + 1) * kWarpsPerGroup * kWarpSize > block.threads) {
    fail(std::string(operation) + ": the block ends within this warpgroup", where);
  }
  return warpgroups(block).groups[group];
}

float widen(uint16_t bits, bool half) {
  if (half) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Eight elements from (mn, k) on along the operand's contiguous dimension.
void load_chunk(Fiber* reader, uint64_t descriptor, int mn, int k, bool trans, bool half, float (&out)[kChunk]) {
  const size_t address = descriptor_address(descriptor, mn, k, trans);
  if (address + 2 * kChunk > kArenaBytes) fail("wgmma: a descriptor runs past the end of shared memory");
  const char* p = reader->block->arena + address;
  record_access(reader, p, 2 * kChunk, Access::kRead, Proxy::kAsync);
  uint16_t bits[kChunk];
  std::memcpy(bits, p, sizeof bits);
  for (int i = 0; i < kChunk; i++) out[i] = widen(bits[i], half);
}

// matrix[mn * kDepth + k] of `count` rows from first_mn on.
void load_operand(Fiber* reader, uint64_t descriptor, int first_mn, int count, bool trans, bool half, float* matrix) {
  float chunk[kChunk];
  if (trans) {
    for (int mn = 0; mn < count; mn += kChunk) {
      for (int k = 0; k < kDepth; k++) {
        load_chunk(reader, descriptor, first_mn + mn, k, true, half, chunk);
        for (int i = 0; i < kChunk; i++) matrix[(mn + i) * kDepth + k] = chunk[i];
      }
    }
  } else {
    for (int mn = 0; mn < count; mn++) {
      for (int k = 0; k < kDepth; k += kChunk) {
        load_chunk(reader, descriptor, first_mn + mn, k, false, half, chunk);
        std::copy(chunk, chunk + kChunk, matrix + mn * kDepth + k);
      }
    }
  }
}

// Lane l holds in register e the pair of elements of row l / 4 + 8 (e % 2), columns 2 (l % 4) + 8 (e / 2) onwards.
void gather_registers(const WarpProduct& arguments, float* matrix) {
  for (int lane = 0; lane < kWarpSize; lane++) {
    for (int e = 0; e < 4; e++) {
      const int row = lane / 4 + 8 * (e % 2), column = 2 * (lane % 4) + 8 * (e / 2);
      const uint32_t word = arguments.a[lane][e];
      matrix[row * kDepth + column] = widen(static_cast<uint16_t>(word), arguments.product.half);
      matrix[row * kDepth + column + 1] = widen(static_cast<uint16_t>(word >> 16), arguments.product.half);
    }
  }
}

void execute(const WarpProduct& arguments, Fiber* reader) {
  const Product& product = arguments.product;
  const int columns = product.columns;
  // Not thread_local arrays: with so much of it the library's thread-local storage would never be placed statically,
  // and every read of `current` would be a call.
  struct Operands {
    float a[kRows * kDepth], b[256 * kDepth], c[kRows * 256], b_by_k[kDepth * 256];
  };
  static thread_local const auto operands = std::make_unique<Operands>();
  auto& [a, b, c, b_by_k] = *operands;
  if (product.a_in_registers) {
    gather_registers(arguments, a);
  } else {
    const int first_row = reader->warp % kWarpsPerGroup * kRows;
    load_operand(reader, product.a, first_row, kRows, product.trans_a, product.half, a);
  }
  load_operand(reader, product.b, 0, columns, product.trans_b, product.half, b);
  for (int n = 0; n < columns; n++) {
    for (int k = 0; k < kDepth; k++) b_by_k[k * columns + n] = b[n * kDepth + k];
  }
  std::fill(c, c + kRows * columns, 0.0f);
  for (int m = 0; m < kRows; m++) {
    for (int k = 0; k < kDepth; k++) {
      const float factor = a[m * kDepth + k];
      for (int n = 0; n < columns; n++) c[m * columns + n] += factor * b_by_k[k * columns + n];
    }
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    for (int j = 0; j < columns / 2; j++) {
      const int row = lane / 4 + 8 * (j / 2 % 2), column = j / 4 * 8 + 2 * (lane % 4) + j % 2;
      const float value = c[row * columns + column];
      float& target = arguments.d[lane][j];
      float before = target;
      if (!arguments.before.empty()) {
        if (std::memcmp(&target, &kInFlight, sizeof target) != 0)
          fail("accumulators were written with a wgmma in flight");
        before = arguments.before[lane * columns / 2 + j];
      }
      target = product.accumulate ? before + value : value;
    }
  }
}

bool overlap(const WarpProduct& x, const WarpProduct& y) {
  return x.d[0] < y.d[0] + y.product.columns / 2 && y.d[0] < x.d[0] + x.product.columns / 2;
}

bool overlap_any(const std::vector<WarpProduct>& products, const WarpProduct& x) {
  return std::any_of(products.begin(), products.end(), [&](const WarpProduct& y) { return overlap(x, y); });
}

// Takes the accumulators away from the kernel until the product completes.
void take_accumulators(const WarpState& warp, WarpProduct& arguments) {
  for (const auto& group : warp.groups) {
    if (overlap_any(group, arguments)) return;
  }
  if (overlap_any(warp.open, arguments)) return;
  const int count = arguments.product.columns / 2;
  for (float* d : arguments.d) {
    arguments.before.insert(arguments.before.end(), d, d + count);
    std::memset(d, 0xff, count * sizeof(float));
  }
}

void execute_all(std::vector<WarpProduct>& products, Fiber* reader) {
  for (const WarpProduct& product : products) execute(product, reader);
  products.clear();
}

Fiber* first_lane() {
  return current->block->fibers[current->warp * kWarpSize];
}

int registers_at_launch(const Block& block) {
  return std::min(kMaxRegisters, kRegisterFile / block.threads) / 8 * 8;
}

int registers_in_use(const Block& block, const Warpgroups& state) {
  int sum = 0;
  for (const WarpState& warp : state.warps) {
    sum += kWarpSize * (warp.registers ? warp.registers : registers_at_launch(block));
  }
  return sum;
}

}  // namespace

// PTX ISA, "Matrix descriptor" and "Strides"; the formulas stand beside wgmma_descriptor in device/hopper.cuh.
size_t descriptor_address(uint64_t descriptor, int mn, int k, bool trans) {
  const size_t start = (descriptor & 0x3fff) << 4;
  const size_t lbo = (descriptor >> 16 & 0x3fff) << 4;
  const size_t sbo = (descriptor >> 32 & 0x3fff) << 4;
  const int layout = static_cast<int>(descriptor >> 62);
  const int width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 0;
  size_t offset;
  if (width == 0) {
    offset = trans ? mn % 8 * 2 + mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo
                   : mn % 8 * 16 + mn / 8 * sbo + k % 8 * 2 + k / 8 * lbo;
  } else if (trans) {
    const int atom = width / 2;
    offset = mn % atom * 2 + mn / atom * lbo + k % 8 * width + k / 8 * sbo;
  } else {
    offset = mn % 8 * width + mn / 8 * sbo + k * 2;
  }
  return swizzled(start + offset, width);
}

void wgmma(const Product& product, float* d, const uint32_t* a, Where where) {
  LaneArgument argument{&product, d, a};
  warp_collective("wgmma", 0xffffffffu, &argument, where, [where](WarpMeeting& meeting) {
    WarpState& warp = my_warp();
    if (warp.fenced != 0xffffffffu) fail("wgmma without a wgmma_fence() since the last wait", where);
    WarpProduct arguments;
    arguments.product = *static_cast<LaneArgument*>(meeting.argument[0])->product;
    for (int lane = 0; lane < kWarpSize; lane++) {
      const auto* mine = static_cast<LaneArgument*>(meeting.argument[lane]);
      if (!(*mine->product == arguments.product)) fail("wgmma: the operands differ between lanes", where);
      arguments.d[lane] = mine->d;
      arguments.a[lane] = mine->a;
    }
    if (!my_group("wgmma", where).products.advance(current->warp % kWarpsPerGroup, arguments.product)) {
      fail("wgmma: the operands differ between the warps of the warpgroup", where);
    }
    if (current->warp % kWarpsPerGroup == 0) counters().wgmmas++;
    if (warp.interval.late()) {
      take_accumulators(warp, arguments);
      warp.open.push_back(std::move(arguments));
    } else {  // products complete in order: first those still in flight
      for (auto& group : warp.groups) execute_all(group, first_lane());
      execute_all(warp.open, first_lane());
      execute(arguments, first_lane());
    }
  });
}

void wgmma_wait(size_t groups, Where where) {
  warp_collective("wgmma_wait", 0xffffffffu, nullptr, where, [groups](WarpMeeting& meeting) {
    WarpState& warp = my_warp();
    while (warp.groups.size() > groups) {
      execute_all(warp.groups.front(), first_lane());
      warp.groups.pop_front();
    }
    warp.fenced = 0;
    warp.interval.end();
    happens_before_join(meeting.fiber, meeting.arrived);
  });
}

void set_max_registers(int registers, bool raise, Where where) {
  const char* operation = raise ? "set_max_registers_inc" : "set_max_registers_dec";
  warp_collective(operation, 0xffffffffu, nullptr, where, [=](WarpMeeting&) {
    if (!my_group(operation, where).registers.advance(current->warp % kWarpsPerGroup, registers)) {
      fail(std::string(operation) + ": the counts differ between the warps of the warpgroup", where);
    }
    const WarpState& warp = my_warp();
    const int before = warp.registers ? warp.registers : registers_at_launch(*current->block);
    if (raise ? registers < before : registers > before) {
      fail(std::string(operation) + ": from " + std::to_string(before) + " to " + std::to_string(registers) +
               " registers",
           where);
    }
  });
  // A raise waits until others have given enough back; the lanes find that out one by one, the first takes it.
  RuntimeScope scope;
  Block& block = *current->block;
  Warpgroups& state = warpgroups(block);
  WarpState& warp = my_warp();
  while (warp.registers != registers) {
    const int before = warp.registers ? warp.registers : registers_at_launch(block);
    if (registers_in_use(block, state) + kWarpSize * (registers - before) <=
        registers_at_launch(block) * block.threads) {
      warp.registers = registers;
      for (Fiber* fiber : state.waiting_for_registers) make_ready(fiber);
      state.waiting_for_registers.clear();
    } else {
      state.waiting_for_registers.push_back(current);
      wait(operation, where);
    }
  }
}

}  // namespace emulator

using namespace emulator;

void wgmma_fence(Where) {
  my_warp().fenced |= 1u << current->lane;
}

void wgmma_commit(Where where) {
  warp_collective("wgmma_commit", 0xffffffffu, nullptr, where, [](WarpMeeting&) {
    WarpState& warp = my_warp();
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

}  // namespace bigkern
