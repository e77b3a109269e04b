// What the launches of this process did.
#pragma once

#include <atomic>
#include <cstdint>

namespace bigkern::emulator {

struct Counters {
  std::atomic<uint64_t> launches{0};
  std::atomic<uint64_t> wgmmas{0};          // of whole warpgroups
  std::atomic<uint64_t> tma_load_bytes{0};  // of whole boxes, tensor maps' alone
  // Bytes the kernels asked for, counted by the race build only.
  std::atomic<uint64_t> global_load_bytes{0};
  std::atomic<uint64_t> global_store_bytes{0};
  std::atomic<uint64_t> global_atomic_bytes{0};
  std::atomic<uint64_t> shared_load_bytes{0};
  std::atomic<uint64_t> shared_store_bytes{0};
  // Accesses of 16 bytes at once, against all.
  std::atomic<uint64_t> global_accesses{0};
  std::atomic<uint64_t> global_accesses_16{0};
};

Counters& counters();

}  // namespace bigkern::emulator
