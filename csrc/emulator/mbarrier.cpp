#include "emulator/mbarrier.h"

#include "emulator/cluster.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace bigkern {

namespace emulator {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes either way

// An mbarrier keeps its count where the hardware keeps it, in its 8 bytes of shared memory, so that a kernel that
// overwrites it is found out; what has no room there lies in BarrierState.
struct Word {
  uint32_t pending : 20;  // arrivals still missing in this phase
  uint32_t phase : 1;
  uint32_t mark : 11;
  int32_t bytes;  // still to land in this phase; negative when they land before they are expected
};
static_assert(sizeof(Word) == sizeof(Mbarrier));
constexpr uint32_t kMark = 0x2a5;

struct BarrierState {
  Mbarrier* barrier;
  uint32_t arrivals;
  Fiber* unfenced;  // who initialised it and has not yet fenced that; null afterwards
  std::vector<Fiber*> waiting;
  SyncClock open;       // what arrivals of this phase publish
  SyncClock completed;  // what those of all ended phases did
  // The same of threads of other blocks, which only mbarrier_wait_cluster sees; and the last of their uses of this
  // block's shared memory that came before, by rank.
  SyncClock remote_open, remote_completed;
  std::vector<uint64_t> uses_open, uses_completed;
};

struct Mbarriers : BlockExtension {
  std::vector<BarrierState> states;
  int failed_polls = 0;  // of mbarrier_try_wait, since a pending copy was completed for it

  void on_block_exit(Block&) override {
    for (const BarrierState& state : states) {
      Word word;
      std::memcpy(&word, state.barrier, sizeof word);
      if (word.mark == kMark && word.bytes != 0) {
        fail("the block ends while an mbarrier expects " + std::to_string(word.bytes) + " more bytes");
      }
    }
  }
};

Word load(const Mbarrier* barrier) {
  Word word;
  std::memcpy(&word, barrier, sizeof word);
  return word;
}

void store(Mbarrier* barrier, const Word& word) {
  std::memcpy(barrier, &word, sizeof word);
}

BarrierState* find(Block& block, Mbarrier* barrier) {
  for (BarrierState& state : extension<Mbarriers>(block).states) {
    if (state.barrier == barrier) return &state;
  }
  return nullptr;
}

// The state of an initialised barrier.
BarrierState& use(Block& block, Mbarrier* barrier, const char* operation, Where where) {
  BarrierState* state = find(block, barrier);
  if (!state) fail(std::string(operation) + ": the mbarrier is not initialised", where);
  if (load(barrier).mark != kMark) fail(std::string(operation) + ": the mbarrier has been overwritten", where);
  return *state;
}

// The same on behalf of a thread, whose access must come after the initialisation.
BarrierState& use_by_thread(Block& owner, Mbarrier* barrier, const char* operation, Where where) {
  record_access(current, barrier, sizeof(Mbarrier), Access::kAtomic);
  return use(owner, barrier, operation, where);
}

BarrierState& use_by_thread(Mbarrier* barrier, const char* operation, Where where) {
  check_shared(barrier, sizeof(Mbarrier), alignof(Mbarrier), operation, where);
  return use_by_thread(*current->block, barrier, operation, where);
}

void end_phase_if_complete(BarrierState& state, Word word) {
  if (word.pending == 0 && word.bytes == 0) {
    word.phase ^= 1;
    word.pending = state.arrivals;
    state.completed = state.open;
    state.remote_completed = state.remote_open;
    state.uses_completed = state.uses_open;
    for (Fiber* fiber : state.waiting) make_ready(fiber);
    state.waiting.clear();
    note_progress();
  }
  store(state.barrier, word);
}

void arrive(BarrierState& state, int64_t expected_bytes, const char* operation, Where where, bool remote = false) {
  Word word = load(state.barrier);
  if (word.pending == 0) fail(std::string(operation) + ": more arrivals in one phase than the mbarrier counts", where);
  const int64_t bytes = word.bytes + expected_bytes;
  if (bytes > int64_t{kMaxCount}) fail(std::string(operation) + ": more than 2^20 - 1 bytes expected", where);
  if (remote) {
    happens_before_release_remote(state.remote_open, current);
    state.uses_open.resize(current->block->cluster->blocks.size());
    state.uses_open[current->block->rank] = current->block->cluster->uses;
  } else {
    happens_before_release(state.open, current);
  }
  word.bytes = static_cast<int32_t>(bytes);
  word.pending--;
  end_phase_if_complete(state, word);
}

// Copies left for later complete when no thread can run, which never happens while one polls for them.
void complete_pending_if_polled_long(Block& block) {
  constexpr int kPolls = 256;
  int& failed = extension<Mbarriers>(block).failed_polls;
  if (++failed < kPolls || block.pending.empty()) return;
  failed = 0;
  const std::function<void()> operation = std::move(block.pending.front());
  block.pending.erase(block.pending.begin());
  operation();
}

bool phase_has_ended(const Mbarrier* barrier, uint32_t parity) {
  return load(barrier).phase != (parity & 1);
}

const BarrierState& wait_for_phase(Mbarrier* barrier, uint32_t parity, const char* operation, Where where) {
  use_by_thread(barrier, operation, where);
  while (!phase_has_ended(barrier, parity)) {
    find(*current->block, barrier)->waiting.push_back(current);
    wait(operation, where);
  }
  return *find(*current->block, barrier);
}

void acquire(const BarrierState& state) {
  happens_before_acquire(state.completed, current);
  for (size_t rank = 0; rank < state.uses_completed.size(); rank++) {
    RemoteUse& use = current->block->remote_uses[rank];
    if (use.number <= state.uses_completed[rank]) use = RemoteUse{};
  }
}

}  // namespace

void mbarrier_check_issue(Block& owner, Mbarrier* barrier, const char* operation, Where where) {
  if (use_by_thread(owner, barrier, operation, where).unfenced) {
    fail(std::string(operation) + ": no fence_barrier_init() after the mbarrier was initialised", where);
  }
}

void mbarrier_check_issue(Mbarrier* barrier, const char* operation, Where where) {
  check_shared(barrier, sizeof(Mbarrier), alignof(Mbarrier), operation, where);
  mbarrier_check_issue(*current->block, barrier, operation, where);
}

void mbarrier_complete_tx(Block& block, Mbarrier* barrier, uint32_t bytes, Fiber* fiber) {
  BarrierState& state = use(block, barrier, "a bulk copy's completion", {});
  Word word = load(barrier);
  if (fiber->block == &block) {
    happens_before_release(state.open, fiber);
  } else {
    happens_before_release_remote(state.open, fiber);
  }
  word.bytes -= static_cast<int32_t>(bytes);
  end_phase_if_complete(state, word);
}

}  // namespace emulator

using namespace emulator;

void mbarrier_init(Mbarrier* barrier, uint32_t arrivals, Where where) {
  RuntimeScope scope;
  check_shared(barrier, sizeof(Mbarrier), alignof(Mbarrier), "mbarrier_init", where);
  record_access(current, barrier, sizeof(Mbarrier), Access::kWrite);
  if (arrivals == 0 || arrivals > kMaxCount) fail("mbarrier_init: the count is not 1 to 2^20 - 1", where);
  Block& block = *current->block;
  BarrierState* state = find(block, barrier);
  if (!state) {
    auto& states = extension<Mbarriers>(block).states;
    states.push_back({});
    state = &states.back();
  } else if (!state->waiting.empty()) {
    fail("mbarrier_init: threads are waiting on this mbarrier", where);
  }
  *state = BarrierState{};
  state->barrier = barrier;
  state->arrivals = arrivals;
  state->unfenced = current;
  Word word{};
  word.pending = arrivals;
  word.mark = kMark;
  store(barrier, word);
}

void fence_barrier_init() {
  RuntimeScope scope;
  for (BarrierState& state : extension<Mbarriers>(*current->block).states) {
    if (state.unfenced == current) state.unfenced = nullptr;
  }
}

void fence_proxy_async() {
  fence_async_proxy(current);
}

void mbarrier_arrive(Mbarrier* barrier, Where where) {
  RuntimeScope scope;
  arrive(use_by_thread(barrier, "mbarrier_arrive", where), 0, "mbarrier_arrive", where);
}

void mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes, Where where) {
  RuntimeScope scope;
  arrive(use_by_thread(barrier, "mbarrier_arrive_expect_tx", where), bytes, "mbarrier_arrive_expect_tx", where);
}

bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity, Where where) {
  RuntimeScope scope;
  spin_point("mbarrier_try_wait", where);
  BarrierState& state = use_by_thread(barrier, "mbarrier_try_wait", where);
  if (!phase_has_ended(barrier, parity)) {
    complete_pending_if_polled_long(*current->block);
    return false;
  }
  acquire(state);
  return true;
}

void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Where where) {
  RuntimeScope scope;
  acquire(wait_for_phase(barrier, parity, "mbarrier_wait", where));
}

void mbarrier_arrive_cluster(Mbarrier* barrier, uint32_t rank, Where where) {
  RuntimeScope scope;
  const RemotePlace place = remote_place(barrier, rank, "mbarrier_arrive_cluster", where);
  note_remote_use(place, sizeof(Mbarrier), alignof(Mbarrier), "mbarrier_arrive_cluster", where);
  auto* remote = reinterpret_cast<Mbarrier*>(place.address);
  mbarrier_check_issue(*place.owner, remote, "mbarrier_arrive_cluster", where);
  arrive(*find(*place.owner, remote), 0, "mbarrier_arrive_cluster", where, true);
}

void mbarrier_wait_cluster(Mbarrier* barrier, uint32_t parity, Where where) {
  RuntimeScope scope;
  const BarrierState& state = wait_for_phase(barrier, parity, "mbarrier_wait_cluster", where);
  acquire(state);
  happens_before_acquire_remote(state.remote_completed, current);
}

}  // namespace bigkern
