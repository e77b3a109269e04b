#include "emulator/race.h"

#if defined(BK_EMULATE_RACE)

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

#include "emulator/core.h"
#include "emulator/counters.h"
#include "emulator/race_internal.h"

namespace bigkern::emulator {

namespace {

// ---- Shadow memory: who touched which byte last

// Which access: the block (0: none yet), its generation, the thread and its clock, and where in the source.
struct Stamp {
  uint32_t block;
  uint32_t generation;
  uint32_t clock : 21;
  uint32_t thread : 10;
  uint32_t atomic : 1;
  uint32_t place;
};

// The newest readers are kept, others forgotten: of two that do not know of each other, at most one is ordered with a
// writer who forgot to wait.
constexpr int kReaders = 3;

struct Cell {
  Stamp writer;
  Stamp readers[kReaders];
  // The writer's fence.proxy.async count, or one of the two below.
  uint32_t proxy;
  uint32_t split;  // index + 1 of the word's four byte cells; a word is one cell until a part of it is touched
};

constexpr uint32_t kWrittenAsync = 0;
constexpr uint32_t kInFlight = 0xffffffffu;

constexpr uintptr_t kPageBytes = 1024;

struct Page {
  Cell words[kPageBytes / 4] = {};
  std::vector<std::array<Cell, 4>> bytes;
};

class Shadow {
 public:
  Page& page(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    Recent& recent = recent_[number % kRecent];
    if (recent.number != number) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return *recent.page;
  }

  // Between launches, as nothing older matters.
  void trim() {
    constexpr size_t kMostPages = 16384;
    if (pages_.size() < kMostPages) return;
    pages_.clear();
    recent_.fill({});
  }

 private:
  static constexpr size_t kRecent = 1024;
  struct Recent {
    uintptr_t number = ~uintptr_t{0};
    Page* page = nullptr;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, kRecent> recent_{};
};

template <class Visit>
void for_each_cell(Shadow& shadow, uintptr_t address, size_t bytes, Visit visit) {
  while (bytes > 0) {
    const size_t first = address % 4, count = std::min<size_t>(4 - first, bytes);
    Page& page = shadow.page(address);
    Cell& word = page.words[address % kPageBytes / 4];
    if (count == 4 && word.split == 0) {
      visit(word, address);
    } else {
      if (word.split == 0) {
        page.bytes.push_back({word, word, word, word});
        word.split = static_cast<uint32_t>(page.bytes.size());
      }
      for (size_t i = 0; i < count; i++) visit(page.bytes[word.split - 1][first + i], address + i);
    }
    address += count;
    bytes -= count;
  }
}

// ---- Knowledge

using Clocks = std::vector<uint32_t>;
using ClocksPtr = std::shared_ptr<const Clocks>;

bool covers(const Clocks& a, const Clocks& b) {
  for (size_t i = 0; i < b.size(); i++) {
    if (b[i] > (i < a.size() ? a[i] : 0)) return false;
  }
  return true;
}

void raise(Clocks& a, const Clocks& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}

ClocksPtr merged(const ClocksPtr& a, const ClocksPtr& b) {
  if (a == b || covers(*a, *b)) return a;
  if (covers(*b, *a)) return b;
  auto result = std::make_shared<Clocks>(*a);
  raise(*result, *b);
  return result;
}

KnowledgePtr merged(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto result = std::make_shared<Knowledge>();
  result->reserve(a->size() + b->size());
  auto i = a->begin(), j = b->begin();
  while (i != a->end() || j != b->end()) {
    if (j == b->end() || (i != a->end() && i->block < j->block)) {
      result->push_back(*i++);
    } else if (i == a->end() || j->block < i->block) {
      result->push_back(*j++);
    } else {
      if (i->generation != j->generation) {
        result->push_back(i->generation > j->generation ? *i : *j);
      } else {
        result->push_back({i->block, i->generation, merged(i->clocks, j->clocks)});
      }
      ++i;
      ++j;
    }
  }
  return result;
}

const BlockKnowledge* find(const KnowledgePtr& knowledge, uint32_t block) {
  if (!knowledge) return nullptr;
  auto at = std::lower_bound(knowledge->begin(), knowledge->end(), block,
                             [](const BlockKnowledge& entry, uint32_t id) { return entry.block < id; });
  return at != knowledge->end() && at->block == block ? &*at : nullptr;
}

// A fiber's clocks belong to a generation of its block; in a new one all start over.
void refresh(Fiber& fiber) {
  FiberRace& race = fiber.race;
  const BlockRace& block = fiber.block->race;
  if (race.generation == block.generation) return;
  race.generation = block.generation;
  race.clock = 1;
  if (race.joined) std::fill(race.known.begin(), race.known.end(), 0u);
  race.joined = false;
}

void join_clocks(Fiber& fiber, const Clocks& clocks) {
  fiber.race.known.resize(static_cast<size_t>(fiber.block->threads));
  raise(fiber.race.known, clocks);
  fiber.race.joined = true;
}

// All that the fiber knows, itself included.
Clocks own_clocks(const Fiber& fiber) {
  Clocks clocks;
  if (fiber.race.joined) clocks = fiber.race.known;
  const auto index = static_cast<size_t>(fiber.index);
  if (clocks.size() <= index) clocks.resize(index + 1);
  clocks[index] = fiber.race.clock;
  return clocks;
}

KnowledgePtr snapshot(const Fiber& fiber) {
  const BlockRace& block = fiber.block->race;
  auto own = std::make_shared<Knowledge>();
  own->push_back({block.id, block.generation, std::make_shared<Clocks>(own_clocks(fiber))});
  return merged(fiber.race.foreign, own);
}

void learn(Fiber& fiber, const KnowledgePtr& knowledge) {
  if (!knowledge) return;
  fiber.race.foreign = merged(fiber.race.foreign, knowledge);
  const BlockKnowledge* own = find(knowledge, fiber.block->race.id);
  if (own && own->generation == fiber.block->race.generation) join_clocks(fiber, *own->clocks);
}

// ---- The checker's state; one worker, so no locks

struct Checker {
  Shadow shadow;
  std::unordered_map<uintptr_t, KnowledgePtr> published;  // by address of a synchronisation variable
  uint32_t first_id = 1;                                  // of the launch's blocks
  uint32_t next_id = 1;
};

Checker& checker() {
  static auto* all = new Checker;  // outlives every static destructor
  return *all;
}

// The block of the cluster that the access was made by; null when it was made before the cluster ran.
const Block* find_block(const Cluster& cluster, uint32_t id) {
  const uint32_t rank = id - cluster.blocks[0]->race.id;  // ranks are numbered as blocks are
  return rank < cluster.blocks.size() ? cluster.blocks[rank] : nullptr;
}

// The block of the fiber's cluster in whose shared memory an address lies; null: global memory.
Block* shared_owner(const Fiber& fiber, const char* p) {
  auto holds = [p](const Block& block) { return static_cast<size_t>(p - block.arena) < kArenaBytes; };
  if (holds(*fiber.block)) return fiber.block;
  for (Block* block : fiber.block->cluster->blocks) {
    if (holds(*block)) return block;
  }
  return nullptr;
}

bool is_ordered(const Stamp& stamp, const Fiber& fiber) {
  const BlockRace& block = fiber.block->race;
  if (stamp.block < checker().first_id) return true;  // no access yet, or one of an earlier launch
  if (stamp.block == block.id) {
    if (stamp.generation < block.generation || stamp.thread == static_cast<unsigned>(fiber.index)) return true;
    return fiber.race.joined && stamp.clock <= fiber.race.known[stamp.thread];
  }
  const BlockKnowledge* known = find(fiber.race.foreign, stamp.block);
  if (!known) return false;
  if (stamp.generation != known->generation) return stamp.generation < known->generation;
  return stamp.thread < known->clocks->size() && stamp.clock <= (*known->clocks)[stamp.thread];
}

// ---- Reports

std::string triple(unsigned linear, dim3 size) {
  return "(" + std::to_string(linear % size.x) + "," + std::to_string(linear / size.x % size.y) + "," +
         std::to_string(linear / size.x / size.y) + ")";
}

std::string who(const Stamp& stamp, const Fiber& fiber) {
  const Block& block = *fiber.block;
  std::string text = "thread " + triple(stamp.thread, block.block_dim);
  if (stamp.block != block.race.id) {
    text += " of block " + triple(stamp.block - checker().first_id, block.grid_dim);
  }
  return text + " at " + place_text(stamp.place);
}

struct AccessUnderWay {
  Fiber& fiber;
  bool write;
  bool atomic;
  bool copy_issue;  // the start of an asynchronous write
  bool emulated;    // by emulated hardware rather than the kernel's own code
  Proxy proxy;
  const Block* owner;  // of the shared memory; null: global memory
  Stamp stamp;

  std::string name() const {
    return copy_issue ? "asynchronous copy" : atomic ? (write ? "atomic" : "atomic load") : write ? "write" : "read";
  }
  std::string where(uintptr_t address) const {
    if (!owner) return "global memory";
    const std::string byte = "byte " + std::to_string(address - reinterpret_cast<uintptr_t>(owner->arena));
    if (owner == fiber.block) return "shared memory (" + byte + ")";
    return "shared memory (" + byte + " of block " + triple(owner->linear, owner->grid_dim) + ")";
  }

  [[noreturn]] void fail_race(const char* earlier, const Stamp& other, uintptr_t address) const {
    std::string message = "race in " + where(address) + ": " + name() + " at " + place_text(stamp.place) + " after a " +
                          earlier + " by " + who(other, fiber) + ", with nothing that orders them";
    if (other.block != fiber.block->race.id && checker().published.size() > 0) {
      message += " (a relaxed atomic orders only with a fence before the write and a fence after the read)";
    }
    fail(message);
  }

  void check(const Cell& cell, uintptr_t address) const {
    const Cluster& cluster = *fiber.block->cluster;
    const Block* writer = owner ? find_block(cluster, cell.writer.block) : nullptr;
    auto races = [&](const Stamp& other) {
      if (other.block == 0 || (other.atomic && atomic) || is_ordered(other, fiber)) return false;
      // Shared memory still shows the block that had it before; a fiber's stack holds locals lent to a collective.
      return owner ? find_block(cluster, other.block) != nullptr
                   : !is_fiber_stack(reinterpret_cast<const void*>(address));
    };
    if (owner && !write && !writer) {
      fail("read of uninitialised " + where(address) + " at " + place_text(stamp.place));
    }
    if (races(cell.writer)) fail_race(cell.writer.atomic ? "atomic" : "write", cell.writer, address);
    if (write) {
      for (const Stamp& reader : cell.readers) {
        if (races(reader)) fail_race(reader.atomic ? "atomic load" : "read", reader, address);
      }
    }
    if (writer && cell.proxy == kInFlight && !emulated) {
      fail(name() + " at " + place_text(stamp.place) + " of " + where(address) +
           ", which an asynchronous copy started at " + place_text(cell.writer.place) + " is still writing");
    }
    if (writer && proxy == Proxy::kAsync && !write && cell.proxy != kWrittenAsync && cell.proxy != kInFlight &&
        cell.proxy >= writer->fibers[cell.writer.thread]->race.proxy_epoch) {
      fail("fence_proxy_async is missing after the write to " + where(address) + " by " + who(cell.writer, fiber) +
           ", which is read through the asynchronous proxy");
    }
  }

  void record(Cell& cell) const {
    if (write) {
      cell.writer = stamp;
      for (Stamp& reader : cell.readers) reader = {};
      cell.proxy = copy_issue ? kInFlight : proxy == Proxy::kAsync ? kWrittenAsync : fiber.race.proxy_epoch;
      return;
    }
    // The place of a reader this one knows of is free: a writer who knows this one knows both.
    int slot = 0;
    while (slot < kReaders - 1 && !is_ordered(cell.readers[slot], fiber)) slot++;
    for (; slot > 0; slot--) cell.readers[slot] = cell.readers[slot - 1];
    cell.readers[0] = stamp;
  }
};

void add(std::atomic<uint64_t>& counter, uint64_t n) {  // one worker: no need for a locked add
  counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
}

void count(bool shared, bool write, bool atomic, size_t bytes) {
  Counters& c = counters();
  if (shared) {
    add(write ? c.shared_store_bytes : c.shared_load_bytes, bytes);
    return;
  }
  add(atomic ? c.global_atomic_bytes : write ? c.global_store_bytes : c.global_load_bytes, bytes);
  add(c.global_accesses, 1);
  if (bytes == 16) add(c.global_accesses_16, 1);
}

void access(Fiber* fiber, const void* pointer, size_t bytes, Access kind, Proxy proxy, uint32_t place, bool emulated,
            bool copy_issue) {
  if (!fiber || !fiber->block || bytes == 0) return;
  Block& block = *fiber->block;
  const auto* p = static_cast<const char*>(pointer);
  const Block* owner = shared_owner(*fiber, p);
  if (!owner && is_private(p, *fiber)) return;
  RuntimeScope scope;
  const bool write = kind == Access::kWrite || kind == Access::kAtomic;
  const bool atomic = kind == Access::kAtomic || kind == Access::kAtomicRead;
  if (!copy_issue && !is_image(p)) count(owner != nullptr, write, atomic, bytes);
  refresh(*fiber);
  const Stamp stamp{
      block.race.id, block.race.generation, fiber->race.clock, static_cast<unsigned>(fiber->index), atomic, place};
  const AccessUnderWay now{*fiber, write, atomic, copy_issue, emulated, proxy, owner, stamp};
  for_each_cell(checker().shadow, reinterpret_cast<uintptr_t>(pointer), bytes, [&](Cell& cell, uintptr_t address) {
    now.check(cell, address);
    now.record(cell);
  });
}

}  // namespace

void instrumented_access(Fiber* fiber, const void* address, size_t bytes, Access kind, const void* pc) {
  if (fiber->block && static_cast<size_t>(static_cast<const char*>(address) - fiber->block->arena) < kArenaBytes) {
    RuntimeScope scope;
    count_bank_access(*fiber, address, bytes, kind == Access::kWrite || kind == Access::kAtomic, pc);
  }
  access(fiber, address, bytes, kind, Proxy::kGeneric, place_of_pc(pc), false, false);
}

void record_access(Fiber* fiber, const void* address, size_t bytes, Access kind, Proxy proxy, Where where) {
  access(fiber, address, bytes, kind, proxy, place_of(where), true, false);
}

void record_copy_issue(Fiber* fiber, const void* address, size_t bytes, Proxy proxy, Where where) {
  access(fiber, address, bytes, Access::kWrite, proxy, place_of(where), true, true);
}

// ---- Happens-before

void happens_before_release(SyncClock& clock, Fiber* fiber) {
  refresh(*fiber);
  const uint32_t generation = fiber->block->race.generation;
  if (clock.generation != generation) {
    clock.generation = generation;
    clock.clocks.clear();
  }
  raise(clock.clocks, own_clocks(*fiber));
  clock.foreign = merged(clock.foreign, fiber->race.foreign);
  clock.released = merged(clock.released, fiber->race.released);
  fiber->race.clock++;
}

void happens_before_acquire(const SyncClock& clock, Fiber* fiber) {
  refresh(*fiber);
  if (clock.generation == fiber->block->race.generation) join_clocks(*fiber, clock.clocks);
  fiber->race.foreign = merged(fiber->race.foreign, clock.foreign);
  fiber->race.released = merged(fiber->race.released, clock.released);
  if (clock.foreign) fiber->block->race.exchanged = true;
}

void happens_before_release_remote(SyncClock& clock, Fiber* fiber) {
  refresh(*fiber);
  clock.foreign = merged(clock.foreign, snapshot(*fiber));
  clock.released = merged(clock.released, fiber->race.released);
  fiber->race.clock++;
}

void happens_before_acquire_remote(const SyncClock& clock, Fiber* fiber) {
  refresh(*fiber);
  learn(*fiber, clock.foreign);
  fiber->race.released = merged(fiber->race.released, clock.released);
  fiber->block->race.exchanged = true;
}

// Every thread arrives, so that each one's own clock is enough: what it knows of others, they bring themselves.
void cluster_arrived(Cluster& cluster, Fiber* fiber) {
  refresh(*fiber);
  cluster.clock.arrived.resize(cluster.blocks.size());
  SyncClock& clock = cluster.clock.arrived[fiber->block->rank];
  if (clock.generation != fiber->race.generation) {
    clock.generation = fiber->race.generation;
    clock.clocks.assign(static_cast<size_t>(fiber->block->threads), 0);
  }
  clock.clocks[static_cast<size_t>(fiber->index)] = fiber->race.clock++;
  clock.foreign = merged(clock.foreign, fiber->race.foreign);
  clock.released = merged(clock.released, fiber->race.released);
}

void cluster_phase_ended(Cluster& cluster) {
  SyncClock all;
  auto own = std::make_shared<Knowledge>();
  for (const Block* block : cluster.blocks) {
    SyncClock& clock = cluster.clock.arrived[block->rank];
    own->push_back({block->race.id, clock.generation, std::make_shared<Clocks>(std::move(clock.clocks))});
    all.foreign = merged(all.foreign, clock.foreign);
    all.released = merged(all.released, clock.released);
    clock = SyncClock{};
  }
  all.foreign = merged(all.foreign, own);
  cluster.clock.completed = std::move(all);
}

void cluster_waited(const Cluster& cluster, Fiber* fiber) {
  happens_before_acquire_remote(cluster.clock.completed, fiber);
}

void happens_before_join(Fiber* const* fibers, int count) {
  SyncClock clock;
  for (int i = 0; i < count; i++) happens_before_release(clock, fibers[i]);
  for (int i = 0; i < count; i++) happens_before_acquire(clock, fibers[i]);
}

// All clocks start over, and all threads come to know what each learnt of other blocks. A fence any thread made counts
// for the atomics of all: "all fence, __syncthreads, thread 0 adds" is how CUDA's own samples publish.
void happens_before_barrier(Block& block) {
  block.race.generation++;
  if (!block.race.exchanged) return;
  block.race.exchanged = false;
  KnowledgePtr foreign, released;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->done) continue;
    foreign = merged(foreign, fiber->race.foreign);
    released = merged(released, fiber->race.released);
  }
  for (Fiber* fiber : block.fibers) {
    fiber->race.foreign = foreign;
    fiber->race.released = released;
  }
}

namespace {

KnowledgePtr* published_at(const void* address) {
  auto at = checker().published.find(reinterpret_cast<uintptr_t>(address));
  return at == checker().published.end() ? nullptr : &at->second;
}

void publish(const void* address, KnowledgePtr knowledge) {
  checker().published[reinterpret_cast<uintptr_t>(address)] = std::move(knowledge);
}

}  // namespace

void release_store(Fiber* fiber, const void* address) {
  refresh(*fiber);
  publish(address, snapshot(*fiber));
  fiber->race.clock++;
}

void acquire_load(Fiber* fiber, const void* address) {
  refresh(*fiber);
  if (const KnowledgePtr* published = published_at(address)) {
    learn(*fiber, *published);
    fiber->block->race.exchanged = true;
  }
}

// Ends the release sequence an earlier store headed.
void relaxed_store(Fiber* fiber, const void* address) {
  if (fiber->race.released) {
    publish(address, fiber->race.released);
  } else {
    checker().published.erase(reinterpret_cast<uintptr_t>(address));
  }
}

void relaxed_load(Fiber* fiber, const void* address) {
  if (const KnowledgePtr* published = published_at(address)) {
    fiber->race.pending = merged(fiber->race.pending, *published);
  }
}

// Continues the release sequence.
void relaxed_update(Fiber* fiber, const void* address) {
  KnowledgePtr* published = published_at(address);
  if (published) fiber->race.pending = merged(fiber->race.pending, *published);
  if (!fiber->race.released) return;
  if (published) {
    *published = merged(*published, fiber->race.released);
  } else {
    publish(address, fiber->race.released);
  }
}

void fence(Fiber* fiber) {
  refresh(*fiber);
  learn(*fiber, std::exchange(fiber->race.pending, nullptr));
  fiber->race.released = snapshot(*fiber);
  fiber->race.clock++;
  fiber->block->race.exchanged = true;
}

void fence_async_proxy(Fiber* fiber) {
  fiber->race.proxy_epoch++;
}

void race_start_launch(unsigned blocks) {
  Checker& all = checker();
  all.published.clear();
  all.shadow.trim();
  all.first_id = all.next_id;
  all.next_id += blocks;
}

void race_start_block(Block& block) {
  block.race = BlockRace{};
  block.race.id = checker().first_id + block.linear;
}

}  // namespace bigkern::emulator

#endif
