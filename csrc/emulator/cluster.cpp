#include "emulator/cluster.h"

#include <array>
#include <string>
#include <utility>

#include "emulator/scheduler.h"

namespace bigkern {

namespace emulator {
namespace {

constexpr int kRankShift = 24;

std::string name(const Block& block) {
  return "block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
         std::to_string(block.index.z) + ")";
}

int live_threads(const Cluster& cluster) {
  int live = 0;
  for (const Block* block : cluster.blocks) live += block->live;
  return live;
}

Block& block_of_rank(uint32_t rank, const char* operation, Where where) {
  const auto& blocks = current->block->cluster->blocks;
  if (rank >= blocks.size()) {
    fail(std::string(operation) + ": rank " + std::to_string(rank) + " in a cluster of " +
             std::to_string(blocks.size()) + " blocks",
         where);
  }
  return *blocks[rank];
}

// Static variables lie where the first thread to ask made room, which may differ between blocks; on the device they are
// at the same offset in all of them.
char* same_variable(Block& owner, const char* p) {
  for (const SharedVariable& variable : current->block->variables) {
    if (variable.address <= p && p < variable.address + variable.bytes) {
      return shared_variable(owner, variable.tag, variable.bytes, variable.align) + (p - variable.address);
    }
  }
  return nullptr;
}

void end_phase_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < live_threads(cluster)) return;
  cluster_phase_ended(cluster);
  cluster.arrived = 0;
  cluster.phases++;
  const std::vector<Fiber*> released = std::move(cluster.waiting);
  cluster.waiting.clear();
  make_ready(released.data(), static_cast<int>(released.size()));
}

}  // namespace

RemotePlace remote_place(const void* p, uint32_t rank, const char* operation, Where where) {
  const size_t offset = check_shared(p, 1, 1, operation, where);
  Block& owner = block_of_rank(rank, operation, where);
  if (&owner == current->block || offset < current->block->static_start) return {&owner, owner.arena + offset};
  char* address = same_variable(owner, static_cast<const char*>(p));
  if (!address) fail(std::string(operation) + ": not in shared memory that the kernel has taken", where);
  return {&owner, address};
}

RemotePlace remote_place(uint32_t address, const char* operation, Where where) {
  const uint32_t rank = address >> kRankShift;
  Block& owner = rank == 0 ? *current->block : block_of_rank(rank - 1, operation, where);
  return {&owner, owner.arena + (address & ((1u << kRankShift) - 1))};
}

void check_remote(const RemotePlace& place, size_t bytes, size_t align, const char* operation, Where where) {
  const Block& owner = *place.owner;
  const size_t offset = static_cast<size_t>(place.address - owner.arena);
  if (offset >= kArenaBytes || bytes > kArenaBytes - offset) {
    fail(std::string(operation) + ": not an address in shared memory", where);
  }
  if (offset % align != 0) {
    fail(std::string(operation) + ": shared address not aligned to " + std::to_string(align) + " bytes", where);
  }
  if (&owner == current->block) return;
  if (current->cluster_waits == 0) {
    fail(std::string(operation) + ": " + name(owner) +
             " may not have started; the cluster's barrier must stand before the first access to another block",
         where);
  }
  if (owner.live == 0) fail(std::string(operation) + ": " + name(owner) + " has left the cluster", where);
}

void note_remote_use(const RemotePlace& place, size_t bytes, size_t align, const char* operation, Where where) {
  check_remote(place, bytes, align, operation, where);
  if (place.owner == current->block) return;
  RemoteUse& use = place.owner->remote_uses[current->block->rank];
  use = {current, ++current->block->cluster->uses, current->cluster_arrivals + 1, operation, where};
}

void load_remote(void* value, uint32_t address, size_t bytes, Where where) {
  RuntimeScope scope;
  const RemotePlace place = remote_place(address, "ld_cluster", where);
  note_remote_use(place, bytes, bytes, "ld_cluster", where);
  record_access(current, place.address, bytes, Access::kRead, Proxy::kGeneric, where);
  std::memcpy(value, place.address, bytes);
}

void store_remote(uint32_t address, const void* value, size_t bytes, Where where) {
  RuntimeScope scope;
  const RemotePlace place = remote_place(address, "st_cluster", where);
  note_remote_use(place, bytes, bytes, "st_cluster", where);
  record_access(current, place.address, bytes, Access::kWrite, Proxy::kGeneric, where);
  std::memcpy(place.address, value, bytes);
}

void store_remote_async(const void* p, const void* value, size_t bytes, Mbarrier* barrier, uint32_t rank, Where where) {
  RuntimeScope scope;
  const char* operation = "st_async";
  const RemotePlace to = remote_place(p, rank, operation, where), on = remote_place(barrier, rank, operation, where);
  check_remote(to, bytes, bytes, operation, where);
  check_remote(on, sizeof(Mbarrier), alignof(Mbarrier), operation, where);
  auto* remote = reinterpret_cast<Mbarrier*>(on.address);
  mbarrier_check_issue(*on.owner, remote, operation, where);
  std::array<char, 16> copy;
  std::memcpy(copy.data(), value, bytes);
  record_copy_issue(current, to.address, bytes, Proxy::kGeneric, where);
  issue_copy(*to.owner, [=, fiber = current] {
    record_access(fiber, to.address, bytes, Access::kWrite, Proxy::kGeneric, where);
    std::memcpy(to.address, copy.data(), bytes);
    mbarrier_complete_tx(*to.owner, remote, static_cast<uint32_t>(bytes), fiber);
  });
}

void issue_copy(Block& owner, std::function<void()> copy) {
  if (AsyncInterval().late()) {
    owner.pending.push_back(std::move(copy));
  } else {
    copy();
  }
}

void cluster_thread_exits(Fiber& fiber) {
  Cluster& cluster = *fiber.block->cluster;
  if (fiber.cluster_waits < fiber.cluster_arrivals) fail("a thread exits between cluster_arrive and cluster_wait", {});
  if (cluster.arrived > 0 && fiber.scheduler->options().strict_exit) {
    fail("a thread exits while " + std::to_string(cluster.arrived) + " others wait for it at the cluster's barrier",
         cluster.where);
  }
  end_phase_if_complete(cluster);
}

void cluster_block_exits(Block& block) {
  const Cluster& cluster = *block.cluster;
  for (const RemoteUse& use : block.remote_uses) {
    if (use.fiber && use.phase > cluster.phases) {
      fail("the block leaves the cluster while " + name(*use.fiber->block) + " may still be at its " + use.operation +
               " of this block's shared memory: no barrier of the cluster stands behind that",
           use.where);
    }
  }
}

}  // namespace emulator

using namespace emulator;

uint32_t cluster_rank() {
  return current->block->rank;
}
uint32_t cluster_size() {
  return static_cast<uint32_t>(current->block->cluster->blocks.size());
}

void cluster_arrive(Where where) {
  RuntimeScope scope;
  Fiber* fiber = current;
  Cluster& cluster = *fiber->block->cluster;
  if (fiber->cluster_waits < fiber->cluster_arrivals) {
    fail("cluster_arrive: the thread has not waited since it last arrived", where);
  }
  const int threads = fiber->block->threads * static_cast<int>(cluster.blocks.size());
  if (live_threads(cluster) != threads && fiber->scheduler->options().strict_exit) {
    fail("cluster_arrive after " + std::to_string(threads - live_threads(cluster)) +
             " threads of the cluster have exited",
         where);
  }
  if (cluster.arrived++ == 0) cluster.where = where;
  fiber->cluster_arrivals++;
  cluster_arrived(cluster, fiber);
  end_phase_if_complete(cluster);
}

void cluster_wait(Where where) {
  RuntimeScope scope;
  Fiber* fiber = current;
  Cluster& cluster = *fiber->block->cluster;
  if (fiber->cluster_waits == fiber->cluster_arrivals) fail("cluster_wait: the thread has not arrived", where);
  if (cluster.phases < fiber->cluster_arrivals) {
    cluster.waiting.push_back(fiber);
    emulator::wait("cluster_wait", where);
  } else if (fiber->scheduler->queue().order() == Order::kPriority) {
    fiber->scheduler->yield_released();  // the last to arrive is of low rank, as a rule, and gets no head start
  }
  fiber->cluster_waits++;
  cluster_waited(cluster, fiber);
}

uint32_t cluster_address(const void* p, uint32_t rank, Where where) {
  RuntimeScope scope;
  const RemotePlace place = remote_place(p, rank, "cluster_address", where);
  return (rank + 1) << kRankShift | static_cast<uint32_t>(place.address - place.owner->arena);
}

}  // namespace bigkern
