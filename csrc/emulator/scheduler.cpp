#include "emulator/scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>

#include "emulator/cluster.h"
#include "emulator/counters.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace bigkern::emulator {

__thread Fiber* current = nullptr;

namespace {

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Thrown by fail() when no fiber runs: an operation completed from the scheduler's own loop.
struct HostFailure {};

std::string block_name(const Block& block) {
  return "(" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
         std::to_string(block.index.z) + ")";
}

std::string thread_name(const Fiber& fiber) {
  const uint3& t = fiber.thread_index;
  return "(" + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) + ")";
}

}  // namespace

// ---- ReadyQueue

void ReadyQueue::reset(const Options& options, size_t capacity) {
  order_ = options.order;
  seed_ = options.seed;
  size_t size = 1;
  while (size < capacity + 1) size *= 2;
  if (ring_.size() < size) ring_.resize(size);
  head_ = count_ = 0;
  heap_.clear();
  spinning_.clear();
  arrivals_ = 0;
  reseed(0);
}

void ReadyQueue::reseed(uint64_t salt) {
  state_ = mix(seed_ * 0x9e3779b97f4a7c15ull + salt) | 1;
}

uint32_t ReadyQueue::random_bits() {  // xorshift64
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return static_cast<uint32_t>(state_ >> 11);
}

// Every other seed ranks blocks rather than warps, so that whole blocks run ahead of each other too.
uint64_t ReadyQueue::rank(const Fiber* fiber) {
  const uint64_t warp = seed_ & 1 ? fiber->warp + 1 : 0;
  const uint64_t priority = mix(seed_ * 0x9e3779b97f4a7c15ull + warp + 4099ull * fiber->block->linear) >> 32;
  return priority << 32 | (0xffffffffu - arrivals_++);  // equal priorities: first come, first served
}

void ReadyQueue::push(Fiber* fiber) {
  if (order_ == Order::kPriority) {
    heap_.push_back({rank(fiber), fiber});
    std::push_heap(heap_.begin(), heap_.end());
  } else {
    ring_[(head_ + count_++) & (ring_.size() - 1)] = fiber;
  }
}

void ReadyQueue::push_spinning(Fiber* fiber) {
  if (order_ == Order::kPriority) {
    spinning_.push_back(fiber);
  } else if (order_ == Order::kReverse) {  // last in line, else it would be taken again at once
    head_ = (head_ - 1) & (ring_.size() - 1);
    ring_[head_] = fiber;
    count_++;
  } else {
    push(fiber);
  }
}

Fiber* ReadyQueue::pop() {
  if (order_ == Order::kPriority) {
    // Mostly the polling ones wait until nobody else can run; now and then they look earlier.
    if (!spinning_.empty() && (heap_.empty() || random_bits() % 4 == 0)) {
      for (Fiber* fiber : spinning_) push(fiber);
      spinning_.clear();
    }
    if (heap_.empty()) return nullptr;
    std::pop_heap(heap_.begin(), heap_.end());
    Fiber* fiber = heap_.back().fiber;
    heap_.pop_back();
    return fiber;
  }
  if (count_ == 0) return nullptr;
  const size_t mask = ring_.size() - 1;
  count_--;
  if (order_ == Order::kReverse) return ring_[(head_ + count_) & mask];
  if (order_ == Order::kRandom) {
    const size_t i = (head_ + random_bits() % (count_ + 1)) & mask;
    std::swap(ring_[i], ring_[head_]);
  }
  Fiber* fiber = ring_[head_];
  head_ = (head_ + 1) & mask;
  return fiber;
}

Fiber* ReadyQueue::likely_next() const {
  if (order_ == Order::kPriority) return heap_.empty() ? nullptr : heap_.front().fiber;
  if (count_ == 0 || order_ == Order::kRandom) return nullptr;
  return ring_[(head_ + (order_ == Order::kReverse ? count_ - 1 : 0)) & (ring_.size() - 1)];
}

// ---- Scheduler: switching

inline void Scheduler::switch_to(Fiber* to) {
  Fiber* from = current;
  if (to == from) return;
  current = to;
  void* fake_stack = nullptr;
  announce_switch(&fake_stack, to->stack);
  switch_context(from->context, to->context);
  finish_switch(fake_stack);
}

void Scheduler::wait(const char* what, Where where) {
  Fiber* fiber = current;
  fiber->waiting_for = what;
  fiber->waiting_at = where;
  fiber->spins = 0;
  quiet_ = 0;
  Fiber* next = queue_.pop();
  if (const Fiber* after_next = queue_.likely_next()) prefetch(after_next->context);
  switch_to(next ? next : &host_);
}

void Scheduler::yield_spinning() {
  queue_.push_spinning(current);
  switch_to(queue_.pop());
}

void Scheduler::yield_released() {
  queue_.push(current);
  switch_to(queue_.pop());
}

void Scheduler::spin_point(const char* what, Where where) {
  // Long enough for any poll that will succeed; when other workers still finish blocks, they may be the ones awaited.
  constexpr uint64_t kQuietPolls = 4'000'000;
  constexpr int kIdlePolls = 5'000;
  Fiber* fiber = current;
  fiber->waiting_for = what;
  fiber->waiting_at = where;
  if (++quiet_ > kQuietPolls) {
    const unsigned finished = launch_->finished_blocks.load(std::memory_order_relaxed);
    if (finished != finished_seen_) {
      finished_seen_ = finished;
      idle_polls_ = 0;
      quiet_ = 0;
    } else if (launch_->workers == 1 || ++idle_polls_ > kIdlePolls || launch_->stop) {
      fail("livelock: threads poll and nothing changes" + report(), {});
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  // Yielding at every poll would make an uncontended atomic cost a switch.
  constexpr unsigned kPollsPerYield = 8;
  if (++fiber->spins % kPollsPerYield == 0 || launch_->options.order == Order::kRandom) yield_spinning();
}

void Scheduler::fail(const std::string& message, Where where) {
  Fiber* fiber = current;
  if (error_.empty()) {
    error_ = message;
    if (where.file) error_ += ", " + where.text();
    if (fiber != &host_) error_ += " [block " + block_name(*fiber->block) + " thread " + thread_name(*fiber) + "]";
  }
  if (fiber == &host_) throw HostFailure();
  switch_to(&host_);
  std::abort();  // a failed launch never resumes its fibers
}

// ---- Scheduler: blocks

void Scheduler::fiber_entry() {
  finish_switch(nullptr);
  for (;;) {
    Fiber* fiber = current;
    Scheduler* scheduler = fiber->scheduler;
    scheduler->launch_->call(scheduler->launch_->arguments);
    scheduler->exit_thread(*fiber);
    // run() fills a finished block's place at once: blocks still in flight may wait for the next one.
    Fiber* next = fiber->block->live > 0 ? scheduler->queue_.pop() : nullptr;
    scheduler->switch_to(next ? next : &scheduler->host_);
  }
}

void Scheduler::prepare_blocks() {
  const size_t threads = launch_->threads();
  resident_ = launch_->cooperative ? launch_->blocks() : std::max(1, launch_->options.resident) * launch_->cluster;
  resident_ = std::min<size_t>(resident_, launch_->blocks());
  while (blocks_.size() < resident_) blocks_.push_back(std::make_unique<Block>());
  while (clusters_.size() < resident_ / launch_->cluster) clusters_.push_back(std::make_unique<Cluster>());
  size_t used = 0;
  for (size_t i = 0; i < resident_; i++) {
    Block& block = *blocks_[i];
    block.live = 0;
    block.fibers.resize(threads);
    for (Fiber*& fiber : block.fibers) {
      if (used == fibers_.size()) {
        fibers_.push_back(std::make_unique<Fiber>());
        fibers_.back()->stack = allocate_stack();
      }
      fiber = fibers_[used].get();
      fiber->scheduler = this;
      // A new stack for every launch: the last one may have failed, and compilers keep thread-local addresses in
      // frames, which must not outlive their OS thread.
      prepare(fiber->context, fiber->stack, static_cast<unsigned>(used), &fiber_entry);
      used++;
    }
  }
  queue_.reset(launch_->options, used);
}

void Scheduler::start_cluster(size_t slot, unsigned index) {
  const unsigned size = launch_->cluster;
  Cluster& cluster = *clusters_[slot];
  cluster = Cluster{};
  for (unsigned rank = 0; rank < size; rank++) {
    Block& block = *blocks_[slot * size + rank];
    block.cluster = &cluster;
    block.rank = rank;
    block.remote_uses.assign(size, RemoteUse{});
    cluster.blocks.push_back(&block);
  }
  queue_.reseed(index + 1);  // a block's schedule depends on its index, not on the worker it lands on
  for (unsigned rank = 0; rank < size; rank++) start_block(*cluster.blocks[rank], index * size + rank);
}

void Scheduler::start_block(Block& block, unsigned linear) {
  const dim3 grid = launch_->grid, dim = launch_->block;
  block.linear = linear;
  block.index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  block.threads = block.live = static_cast<int>(launch_->threads());
  block.block_dim = dim;
  block.grid_dim = grid;
  block.dynamic_bytes = launch_->shared_bytes;
  block.static_start = kArenaBytes;
  block.carved = 0;
  block.variables.clear();
  block.pending.clear();
  block.extensions.clear();
  if (!block.arena) {
    void* arena = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED) throw std::bad_alloc();
    block.arena = static_cast<char*>(arena);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.arena, kArenaBytes);
#else
  std::memset(block.arena, 0xff, block.dynamic_bytes);
#endif
  block.barrier.arrived = 0;
  for (NamedBarrier& barrier : block.named) barrier = NamedBarrier{};
  block.warps.assign((block.threads + kWarpSize - 1) / kWarpSize, Warp{});
  block.bank_counter = launch_->options.bank_conflicts ? &start_bank_counter(block) : nullptr;
  race_start_block(block);
  for (int i = 0; i < block.threads; i++) {
    Fiber* fiber = block.fibers[i];
    fiber->block = &block;
    fiber->index = i;
    fiber->lane = i % kWarpSize;
    fiber->warp = i / kWarpSize;
    fiber->own_warp = &block.warps[fiber->warp];
    fiber->thread_index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    fiber->done = fiber->in_runtime = false;
    fiber->spins = 0;
    fiber->waiting_for = "not started";
    fiber->waiting_at = {};
    fiber->copies.clear();
    fiber->copy_groups.clear();
    fiber->open_copies = 0;
    fiber->copy_interval.end();
    fiber->cluster_arrivals = fiber->cluster_waits = 0;
    fiber->race = FiberRace{};
    block.warps[fiber->warp].alive |= 1u << fiber->lane;
    queue_.push(fiber);
  }
  running_++;
}

void Scheduler::exit_thread(Fiber& fiber) {
  RuntimeScope scope;
  Block& block = *fiber.block;
  if (fiber.open_copies > 0) fail("a thread exits with cp.async copies it never committed", {});
  if (!fiber.copies.empty()) fail("a thread exits with cp.async copies it never waited for", {});
  for (auto& entry : block.extensions) entry.second->on_thread_exit(fiber);
  for (const WarpMeeting& meeting : block.warps[fiber.warp].meetings) {
    if (meeting.arrived > 0 && (meeting.mask >> fiber.lane & 1)) {
      fail(std::string("a lane exits while others wait for it in ") + meeting.operation, meeting.where);
    }
  }
  fiber.done = true;
  fiber.waiting_for = "exited";
  fiber.waiting_at = {};
  block.live--;
  block.warps[fiber.warp].alive &= ~(1u << fiber.lane);
  quiet_ = 0;
  cluster_thread_exits(fiber);
  BlockBarrier& barrier = block.barrier;
  if (block.live > 0) {
    if (barrier.arrived > 0 && options().strict_exit) {
      fail("a thread exits while " + std::to_string(barrier.arrived) + " others wait at __syncthreads", barrier.where);
    }
    if (barrier.arrived == block.live) {
      barrier.arrived = 0;
      happens_before_barrier(block);
      align_banks(block);
      for (int i = 0; i < block.live; i++) queue_.push(barrier.fiber[i]);
    }
    return;
  }
  cluster_block_exits(block);
  if (!block.pending.empty()) fail("a block exits with asynchronous copies in flight", {});
  for (int id = 0; id < kNamedBarriers; id++) {
    if (block.named[id].arrived) {
      fail("a block exits with named barrier " + std::to_string(id) + " half complete", block.named[id].where);
    }
  }
  for (auto& entry : block.extensions) entry.second->on_block_exit(block);
  running_--;
  launch_->finished_blocks++;
}

// CUDA promises no order of blocks, so every schedule but forward changes it.
unsigned Scheduler::cluster_at(unsigned position) const {
  const unsigned total = launch_->clusters();
  switch (launch_->options.order) {
    case Order::kForward:
      return position;
    case Order::kReverse:
      return total - 1 - position;
    default:
      break;
  }
  // An affine permutation; the stride must be coprime to the total.
  const uint64_t hash = mix(launch_->options.seed);
  unsigned stride = static_cast<unsigned>(hash % total) | 1;
  auto gcd = [](unsigned a, unsigned b) {
    while (b) std::swap(a %= b, b);
    return a;
  };
  while (gcd(stride, total) != 1) stride += 2;
  return static_cast<unsigned>((uint64_t{stride} * position + (hash >> 32)) % total);
}

bool Scheduler::start_waiting_clusters() {
  const unsigned size = launch_->cluster;
  for (size_t slot = 0; slot < resident_ / size; slot++) {
    bool free = true;
    for (unsigned rank = 0; rank < size; rank++) free = free && blocks_[slot * size + rank]->live == 0;
    if (!free) continue;
    const unsigned position = launch_->next_cluster++;
    if (position < launch_->clusters()) start_cluster(slot, cluster_at(position));
  }
  return running_ > 0;
}

// No fiber can run: completes one asynchronous operation of every block.
void Scheduler::run_pending() {
  bool any = false;
  for (size_t i = 0; i < resident_; i++) {
    Block& block = *blocks_[i];
    if (block.live == 0 || block.pending.empty()) continue;
    const bool draw = launch_->options.order == Order::kRandom || launch_->options.order == Order::kPriority;
    const size_t at = draw ? queue_.random_bits() % block.pending.size() : 0;
    const std::function<void()> operation = std::move(block.pending[at]);
    block.pending.erase(block.pending.begin() + static_cast<ptrdiff_t>(at));
    operation();
    any = true;
  }
  if (!any) fail("deadlock: no thread can run" + report(), {});
}

void Scheduler::run(Launch& launch) {
  launch_ = &launch;
  error_.clear();
  running_ = 0;
  quiet_ = 0;
  idle_polls_ = 0;
  finished_seen_ = 0;
  host_.scheduler = this;
  host_.stack = thread_stack();
  current = &host_;
  try {
    prepare_blocks();
    while (error_.empty() && !launch.stop && start_waiting_clusters()) {
      if (Fiber* fiber = queue_.pop()) {
        switch_to(fiber);
      } else {
        run_pending();
      }
    }
  } catch (const HostFailure&) {
  } catch (const std::bad_alloc&) {
    error_ = "the emulator is out of memory";
  }
  current = nullptr;
  if (!error_.empty()) {
    std::lock_guard<std::mutex> lock(launch.mutex);
    if (launch.error.empty()) launch.error = error_;
    launch.stop = true;
  }
}

// Who waits where, threads at the same place together; the first two unfinished blocks, or as many as a cluster has.
std::string Scheduler::report() const {
  std::string text;
  unsigned shown = 0;
  for (size_t i = 0; i < resident_ && shown < std::max(2u, launch_->cluster); i++) {
    const Block& block = *blocks_[i];
    if (block.live == 0) continue;
    shown++;
    std::vector<std::pair<std::string, std::vector<const Fiber*>>> places;
    for (const Fiber* fiber : block.fibers) {
      std::string place = fiber->waiting_for;
      if (fiber->waiting_at.file) place += " at " + fiber->waiting_at.text();
      auto found = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
      if (found == places.end()) found = places.insert(places.end(), {place, {}});
      found->second.push_back(fiber);
    }
    for (const auto& [place, fibers] : places) {
      text += "\n  block " + block_name(block) + ": " + std::to_string(fibers.size()) + " thread(s), first " +
              thread_name(*fibers[0]) + ": " + place;
    }
  }
  return text;
}

// ---- core.h

void fail(const std::string& message, Where where) {
  current->scheduler->fail(message, where);
}
void wait(const char* what, Where where) {
  current->scheduler->wait(what, where);
}
void make_ready(Fiber* fiber) {
  fiber->scheduler->make_ready(fiber);
}
void make_ready(Fiber* const* fibers, int count) {
  for (int i = 0; i < count; i++) fibers[i]->scheduler->make_ready(fibers[i]);
}
void spin_point(const char* what, Where where) {
  current->scheduler->spin_point(what, where);
}
void note_progress() {
  current->scheduler->note_progress();
}
uint32_t random_bits() {
  return current->scheduler->queue().random_bits();
}

void release_together(Fiber* const* fibers, int count) {
  Scheduler* scheduler = current->scheduler;
  bool self = false;
  for (int i = 0; i < count; i++) {
    if (fibers[i] == current) {
      self = true;
    } else {
      scheduler->make_ready(fibers[i]);
    }
  }
  // Under kPriority the last to arrive is of low rank, as a rule, and must not get a head start.
  if (self && scheduler->queue().order() == Order::kPriority) scheduler->yield_released();
}

bool AsyncInterval::late() {
  if (drawn_ < 0) {
    const Options& options = current->scheduler->options();
    const bool draws = options.order == Order::kRandom || options.order == Order::kPriority;
    drawn_ = options.async_mode == AsyncMode::kAtWait ||
             (options.async_mode == AsyncMode::kDrawn && (!draws || (random_bits() & 1)));
  }
  return drawn_ != 0;
}

bool same_operation(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

void fail_mismatch(const char* operation, Where where, const char* met, Where met_where) {
  fail(std::string(operation) + " meets " + met + " of other threads, " + met_where.text() + ": threads diverged",
       where);
}

WarpMeeting& find_meeting(Fiber& fiber, Warp& warp, const char* operation, unsigned mask, Where where) {
  if (!(mask >> fiber.lane & 1)) {
    RuntimeScope scope;
    fail(std::string(operation) + ": the calling lane is not in its mask", where);
  }
  if (mask & ~warp.alive) {
    // A full mask may name lanes that a short last warp never had.
    const int left = fiber.block->threads - fiber.warp * kWarpSize;
    RuntimeScope scope;
    fail(std::string(operation) + ": the mask names lanes that " +
             (left < kWarpSize && mask >> left ? "do not exist" : "have exited"),
         where);
  }
  WarpMeeting* own = nullptr;
  WarpMeeting* free = nullptr;
  for (WarpMeeting& meeting : warp.meetings) {
    if (meeting.arrived == 0) {
      if (!free) free = &meeting;
    } else if (meeting.mask == mask) {
      own = &meeting;
    } else if (meeting.mask >> fiber.lane & 1) {
      // Groups may overlap while one of them can still complete; two that wait for each other's lanes cannot.
      unsigned waiting = 0;
      for (int i = 0; i < meeting.arrived; i++) waiting |= 1u << meeting.fiber[i]->lane;
      if (!(mask & waiting)) continue;
      RuntimeScope scope;
      fail(std::string(operation) + ": its mask overlaps that of " + meeting.operation + ", " + meeting.where.text() +
               ", and each waits for lanes of the other",
           where);
    }
  }
  if (own) return *own;
  if (!free) fail(std::string(operation) + ": more than four groups of lanes meet at once", where);
  return *free;
}

}  // namespace bigkern::emulator
