#include "emulator/launch.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device/capability.h"
#include "emulator/control.h"
#include "emulator/counters.h"
#include "emulator/scheduler.h"

namespace bigkern {

namespace emulator {

namespace {

// Apart from CUDA's codes, so that one met in a log tells where it is from.
constexpr int kBadLaunch = 10001;
constexpr int kKernelFailed = 10002;

constexpr unsigned kMaxCluster = 8;  // what every GPU with clusters runs

thread_local std::string thread_error;

std::mutex last_error_mutex;
std::string last_error_text;

int report(int code, const std::string& message) {
  thread_error = message;
  std::lock_guard<std::mutex> lock(last_error_mutex);
  last_error_text = message;
  return code;
}

std::string refusal(const LaunchConfig& config, const Options& options) {
  const dim3 grid = config.grid, block = config.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || threads == 0) return "launch: the grid or the block is empty";
  if (threads > kMaxThreads || block.z > 64) {
    return "launch: a block of " + std::to_string(threads) + " threads (at most 1024, 64 in z)";
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "launch: grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
           " (at most 2147483647 x 65535 x 65535)";
  }
  if (blocks > 0x7fffffffu) return "launch: more blocks than the emulator counts";
  if (config.shared_bytes > options.max_shared_bytes) {
    return "launch: " + std::to_string(config.shared_bytes) + " bytes of dynamic shared memory (at most " +
           std::to_string(options.max_shared_bytes) + ")";
  }
  if (config.cluster > 1 && options.compute_capability < 90) {
    return "launch: clusters need compute capability 90, this device has " + std::to_string(options.compute_capability);
  }
  if (config.cluster < 1 || config.cluster > kMaxCluster || grid.x % config.cluster != 0) {
    return "launch: clusters of " + std::to_string(config.cluster) + " blocks (1 to " + std::to_string(kMaxCluster) +
           ", a divisor of the grid's " + std::to_string(grid.x) + " in x)";
  }
  const uint64_t resident =
      uint64_t(options.multiprocessors) * uint64_t(occupancy(static_cast<int>(threads), config.shared_bytes));
  if (config.cooperative && blocks > resident) {
    return "cooperative launch: " + std::to_string(blocks) + " blocks, but only " + std::to_string(resident) +
           " fit the device at once";
  }
  return "";
}

}  // namespace

int launch(const LaunchConfig& config, void (*call)(void*), void* arguments) {
  static std::mutex one_at_a_time;
  static auto* schedulers = new std::vector<std::unique_ptr<Scheduler>>;  // outlives every static destructor
  std::lock_guard<std::mutex> lock(one_at_a_time);

  const Options chosen = options();
  const std::string refused = refusal(config, chosen);
  if (!refused.empty()) return report(kBadLaunch, refused);

  Launch state;
  state.grid = config.grid;
  state.block = config.block;
  state.shared_bytes = config.shared_bytes;
  state.cooperative = config.cooperative;
  state.cluster = config.cluster;
  state.call = call;
  state.arguments = arguments;
  state.options = chosen;
  // Blocks that wait for each other share a worker; the race checker's shadow memory has no locks.
  state.workers = chosen.workers > 0 ? chosen.workers : static_cast<int>(std::thread::hardware_concurrency());
#if defined(BK_EMULATE_RACE)
  state.workers = 1;
#endif
  if (config.cooperative) state.workers = 1;
  state.workers = static_cast<int>(std::min<unsigned>(std::max(1, state.workers), state.clusters()));

  counters().launches++;
  race_start_launch(state.blocks());
  while (static_cast<int>(schedulers->size()) < state.workers) schedulers->push_back(std::make_unique<Scheduler>());
  std::vector<std::thread> threads;
  for (int i = 1; i < state.workers; i++) threads.emplace_back([&, i] { (*schedulers)[i]->run(state); });
  (*schedulers)[0]->run(state);
  for (std::thread& thread : threads) thread.join();
  return state.error.empty() ? 0 : report(kKernelFailed, state.error);
}

int occupancy(int threads, size_t shared_bytes) {
  const Options& chosen = options();
  if (threads <= 0 || threads > kMaxThreads || shared_bytes > chosen.max_shared_bytes) return 0;
  return chosen.blocks_per_multiprocessor;
}

int occupancy_clusters(const LaunchConfig& config) {
  if (!refusal(config, options()).empty()) return 0;
  const dim3 block = config.block;
  const int blocks = occupancy(static_cast<int>(block.x * block.y * block.z), config.shared_bytes);
  return options().multiprocessors * blocks / static_cast<int>(config.cluster);
}

std::string last_error() {
  std::lock_guard<std::mutex> lock(last_error_mutex);
  return last_error_text;
}

void clear_last_error() {
  std::lock_guard<std::mutex> lock(last_error_mutex);
  last_error_text.clear();
}

Options& options() {
  static Options chosen;
  return chosen;
}

Counters& counters() {
  static Counters all;
  return all;
}

}  // namespace emulator

const char* error_string(int code) {
  if (code == 0) return "no error";
  return code == emulator::kBadLaunch || code == emulator::kKernelFailed ? emulator::thread_error.c_str()
                                                                         : "not a code of the emulator";
}

int multiprocessor_count() {
  return emulator::options().multiprocessors;
}
int max_shared_bytes() {
  return static_cast<int>(emulator::options().max_shared_bytes);
}
int compute_capability() {
  return allowed_capability(emulator::options().compute_capability);
}

}  // namespace bigkern
