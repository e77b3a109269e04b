#include "emulator/bank_conflicts.h"

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "emulator/core.h"
#if defined(BK_EMULATE_RACE)
#include "emulator/race_internal.h"
#endif

namespace bigkern::emulator {

namespace {

constexpr int kBanks = 32;
constexpr int kBankBytes = 4;
constexpr uint32_t kWidest = 16;
constexpr size_t kWorstPlaces = 16;

// Instructions of one place are apart by what they do; so are the pieces of a copy wider than an instruction.
struct Instruction {
  const void* pc;
  const char* file;
  int line;
  uint32_t bytes;
  uint32_t piece;
  bool store;

  bool operator<(const Instruction& other) const {
    auto fields = [](const Instruction& i) { return std::tie(i.pc, i.file, i.line, i.bytes, i.piece, i.store); };
    return fields(*this) < fields(other);
  }
};

using Counts = std::map<Instruction, BankTotals>;

struct Process {
  std::mutex mutex;
  Counts counts;
};

Process& process() {
  static auto* all = new Process;  // outlives every static destructor
  return *all;
}

struct WarpAccess {
  unsigned lanes = 0;
  std::array<uintptr_t, kWarpSize> address;
};

// The warp's accesses by one instruction that some lane has not reached yet.
struct Open {
  std::array<uint32_t, kWarpSize> executed{};  // by lane, since the warp was aligned
  uint32_t first = 0;                          // number of accesses.front()
  std::deque<WarpAccess> accesses;
};

// Wavefronts of one phase.
int wavefronts(const uintptr_t* address, unsigned lanes, int count, size_t bytes) {
  std::array<uintptr_t, 2 * kWarpSize> words;  // the different ones
  size_t found = 0;
  std::array<int, kBanks> load{};
  for (int lane = 0; lane < count; lane++) {
    if (!(lanes >> lane & 1)) continue;
    const uintptr_t last = (address[lane] + bytes - 1) / kBankBytes;
    for (uintptr_t word = address[lane] / kBankBytes; word <= last; word++) {
      const auto end = words.begin() + found;
      if (std::find(words.begin(), end, word) != end) continue;
      words[found++] = word;
      load[word % kBanks]++;
    }
  }
  return *std::max_element(load.begin(), load.end());
}

BankTotals count_access(const WarpAccess& access, size_t bytes) {
  const int lanes = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;  // of a phase
  BankTotals totals;
  totals.accesses = 1;
  for (int first = 0; first < kWarpSize; first += lanes) {
    const int needed = wavefronts(&access.address[first], access.lanes >> first, lanes, bytes);
    totals.ideal += needed > 0;
    totals.wavefronts += needed;
  }
  return totals;
}

void add(BankTotals& sum, const BankTotals& more) {
  sum.accesses += more.accesses;
  sum.ideal += more.ideal;
  sum.wavefronts += more.wavefronts;
}

uint64_t conflicts(const BankTotals& totals) {
  return totals.wavefronts - totals.ideal;
}

std::string place_of(const Instruction& instruction) {
  const Where where{instruction.file, instruction.line};
#if defined(BK_EMULATE_RACE)
  if (!where.file) return place_text(place_of_pc(instruction.pc));
#endif
  return where.text();
}

}  // namespace

class BankCounter : public BlockExtension {
 public:
  void access(const Fiber& fiber, const Instruction& instruction, uintptr_t address) {
    if (open_.size() <= static_cast<size_t>(fiber.warp)) open_.resize(fiber.block->warps.size());
    Open& open = open_[fiber.warp][instruction];
    const uint32_t at = open.executed[fiber.lane]++ - open.first;
    if (at >= open.accesses.size()) open.accesses.resize(at + 1);
    WarpAccess& mine = open.accesses[at];
    mine.lanes |= 1u << fiber.lane;
    mine.address[fiber.lane] = address;
    if (at == 0 && mine.lanes == kWholeWarp) {
      add(counts_[instruction], count_access(mine, instruction.bytes));
      open.accesses.pop_front();
      open.first++;
    }
  }

  void tiles(void* const* rows, int count, const Instruction& instruction) {
    BankTotals& totals = counts_[instruction];
    totals.accesses++;
    totals.ideal += count;
    for (int tile = 0; tile < count; tile++) {
      std::array<uintptr_t, 8> address;
      for (int i = 0; i < 8; i++) address[i] = reinterpret_cast<uintptr_t>(rows[8 * tile + i]);
      totals.wavefronts += wavefronts(address.data(), 0xff, 8, 16);
    }
  }

  void align(int warp) {
    if (static_cast<size_t>(warp) >= open_.size()) return;
    for (auto& [instruction, open] : open_[warp]) {
      for (const WarpAccess& access : open.accesses) add(counts_[instruction], count_access(access, instruction.bytes));
    }
    open_[warp].clear();
  }

  void align() {
    for (size_t warp = 0; warp < open_.size(); warp++) align(static_cast<int>(warp));
  }

  void on_block_exit(Block&) override {
    align();
    std::lock_guard<std::mutex> lock(process().mutex);
    for (const auto& [instruction, totals] : counts_) add(process().counts[instruction], totals);
  }

 private:
  static constexpr unsigned kWholeWarp = 0xffffffffu;

  std::vector<std::map<Instruction, Open>> open_;  // by warp
  Counts counts_;
};

BankReport bank_report() {
  BankReport report;
  std::map<std::pair<std::string, bool>, BankTotals> places;
  std::lock_guard<std::mutex> lock(process().mutex);
  for (const auto& [instruction, totals] : process().counts) {
    add(instruction.store ? report.stores : report.loads, totals);
    if (conflicts(totals) > 0) add(places[{place_of(instruction), instruction.store}], totals);
  }
  for (const auto& [place, totals] : places) report.worst.push_back({place.first, place.second, totals});
  std::stable_sort(report.worst.begin(), report.worst.end(),
                   [](const BankPlace& a, const BankPlace& b) { return conflicts(a.totals) > conflicts(b.totals); });
  if (report.worst.size() > kWorstPlaces) report.worst.resize(kWorstPlaces);
  return report;
}

void clear_bank_report() {
  std::lock_guard<std::mutex> lock(process().mutex);
  process().counts.clear();
}

BankCounter& start_bank_counter(Block& block) {
  return extension<BankCounter>(block);
}

void count_bank_access(const Fiber& fiber, const void* address, size_t bytes, bool store, const void* pc, Where where) {
  BankCounter* counter = fiber.block->bank_counter;
  if (!counter) return;
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (size_t done = 0; done < bytes; done += kWidest) {
    const auto width = static_cast<uint32_t>(std::min<size_t>(kWidest, bytes - done));
    const auto piece = static_cast<uint32_t>(done / kWidest);
    counter->access(fiber, {pc, where.file, where.line, width, piece, store}, first + done);
  }
}

void count_bank_tiles(const Fiber& fiber, void* const* rows, int tiles, bool store, Where where) {
  BankCounter* counter = fiber.block->bank_counter;
  if (counter) counter->tiles(rows, tiles, {nullptr, where.file, where.line, kWidest, 0, store});
}

void align_banks(const Fiber& fiber) {
  if (BankCounter* counter = fiber.block->bank_counter) counter->align(fiber.warp);
}

void align_banks(const Block& block) {
  if (BankCounter* counter = block.bank_counter) counter->align();
}

}  // namespace bigkern::emulator
