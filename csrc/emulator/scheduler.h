// One worker: an OS thread that runs blocks, several of them interleaved when asked.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/core.h"
#include "emulator/options.h"

namespace bigkern::emulator {

// One kernel launch, shared by its workers.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned cluster = 1;
  void (*call)(void*) = nullptr;  // runs the kernel for the current fiber
  void* arguments = nullptr;
  Options options;
  int workers = 1;

  std::atomic<unsigned> next_cluster{0};
  std::atomic<unsigned> finished_blocks{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::string error;  // the first

  unsigned blocks() const { return grid.x * grid.y * grid.z; }
  unsigned clusters() const { return blocks() / cluster; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

// The fibers that could run, in the order the options ask for.
class ReadyQueue {
 public:
  void reset(const Options& options, size_t capacity);
  void reseed(uint64_t salt);
  void push(Fiber* fiber);
  void push_spinning(Fiber* fiber);  // behind everyone who is not polling
  Fiber* pop();                      // null when empty
  Fiber* likely_next() const;        // whom pop() may well return; null when that is open
  uint32_t random_bits();
  Order order() const { return order_; }

 private:
  struct Ranked {
    uint64_t rank;  // priority, then arrival
    Fiber* fiber;
    bool operator<(const Ranked& other) const { return rank < other.rank; }
  };
  uint64_t rank(const Fiber* fiber);

  Order order_ = Order::kForward;
  uint64_t seed_ = 1;
  uint64_t state_ = 1;        // of the random numbers
  std::vector<Fiber*> ring_;  // all orders but kPriority; a power of two
  size_t head_ = 0;
  size_t count_ = 0;
  std::vector<Ranked> heap_;      // kPriority
  std::vector<Fiber*> spinning_;  // kPriority
  uint32_t arrivals_ = 0;
};

class Scheduler {
 public:
  // Runs blocks of the launch until none are left or one fails.
  void run(Launch& launch);

  // For the running fiber.
  void wait(const char* what, Where where);
  void make_ready(Fiber* fiber) {
    quiet_ = 0;
    queue_.push(fiber);
  }
  void yield_spinning();
  void yield_released();  // the running fiber competes with those it made ready
  void spin_point(const char* what, Where where);
  void note_progress() { quiet_ = 0; }
  [[noreturn]] void fail(const std::string& message, Where where);

  ReadyQueue& queue() { return queue_; }
  const Options& options() const { return launch_->options; }
  const Stack& host_stack() const { return host_.stack; }

 private:
  static void fiber_entry();
  void prepare_blocks();
  void start_cluster(size_t slot, unsigned index);
  void start_block(Block& block, unsigned linear);
  void exit_thread(Fiber& fiber);
  bool start_waiting_clusters();
  void run_pending();
  void switch_to(Fiber* to);
  unsigned cluster_at(unsigned position) const;
  std::string report() const;

  Launch* launch_ = nullptr;
  Fiber host_;  // this OS thread's own stack: the loop in run()
  ReadyQueue queue_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // kept for later launches
  std::vector<std::unique_ptr<Block>> blocks_;  // a cluster's one after another
  std::vector<std::unique_ptr<Cluster>> clusters_;
  size_t resident_ = 0;  // blocks in use by this launch
  int running_ = 0;
  uint64_t quiet_ = 0;  // polls since anything changed
  int idle_polls_ = 0;
  unsigned finished_seen_ = 0;
  std::string error_;
};

}  // namespace bigkern::emulator
