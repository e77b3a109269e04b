// Kernels that break one rule of Hopper's asynchronous units each, and the same kernels without the fault (kFault =
// kNone). test_faults.py demands that the emulator catches every one.
#include "harness.cuh"

using namespace bigkern;
using conformance::as;
using conformance::Buffers;
using conformance::launch_case;

namespace {

enum Fault {
  kNone,
  kNoWait,
  kNoBarrierFence,
  kNoProxyFence,
  kNotInitialised,
  kTooManyArrivals,
  kTooManyBytes,
  kMisaligned,
  kNoFence,
  kNoProductWait,
  kWarpMissing,
  kDescriptorsDiffer,
  kNoStoreWait,
  kNoCommit,
  kWaitForNewer,
  kSourceReused,
  kNoRegisters,
  kRaiseDownwards,
  kPastTheEnd,
  kBarrierOverwritten,
  kNoEmptyWait,
  kNoStart,
  kNoReadBarrier,
  kNoReuseBarrier,
  kNoExitBarrier,
  kExitUnwaited,
  kArrivesTwice,
  kBlockMissing,
  kWrongBlock,
  kDeadlock,
  kBlockWait,
  kNoTail,
};

constexpr int kBytes = 1024;

// Warp 0 loads four chunks through one buffer; warp 1 copies each out.
template <Fault kFault>
__global__ void load_kernel(const char* in, char* out) {
  SharedMemory memory;
  char* tile = memory.take<char>(kBytes, 128);
  Mbarrier* full = memory.take<Mbarrier>(1, 8);
  Mbarrier* empty = memory.take<Mbarrier>(1, 8);
  if (threadIdx.x == 0 && kFault != kNotInitialised) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 32);
    if (kFault != kNoBarrierFence) fence_barrier_init();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (kFault == kBarrierOverwritten && threadIdx.x == 0) *full = 7;
  if (threadIdx.x == 0) {
    for (int step = 0; step < 4; step++) {
      if (kFault != kNoEmptyWait) mbarrier_wait(empty, (step & 1) ^ 1);
      mbarrier_arrive_expect_tx(full, kFault == kTooManyBytes ? kBytes + 16 : kBytes);
      if (kFault == kTooManyArrivals) mbarrier_arrive(full);
      bulk_load(kFault == kMisaligned ? tile + 8 : tile, in + kBytes * step, kBytes, full);
    }
  } else if (threadIdx.x >= 32) {
    for (int step = 0; step < 4; step++) {
      if (kFault != kNoWait) mbarrier_wait(full, step & 1);
      for (int i = lane; i < kBytes / 16; i += 32) as<uint4>(out + kBytes * step)[i] = as<uint4>(tile)[i];
      if (kFault != kNoEmptyWait) mbarrier_arrive(empty);
    }
  }
}

// The input through shared memory and back by the TMA unit.
template <Fault kFault>
__global__ void store_kernel(const char* in, char* out) {
  SharedMemory memory;
  uint4* tile = memory.take<uint4>(64, 128);
  const int i = threadIdx.x;
  for (int step = 0; step < 2; step++) {
    tile[i] = as<uint4>(in)[64 * step + i];
    if (kFault != kNoProxyFence) fence_proxy_async();
    __syncthreads();
    if (i == 0) {
      bulk_store(out + kBytes * step, tile, kBytes);
      if (kFault != kNoCommit) bulk_commit();
      if (kFault == kSourceReused && step == 0) {
        bulk_wait_read<1>();
      } else if (kFault != kNoStoreWait && kFault != kNoCommit) {
        bulk_wait_read<0>();
      }
    }
    __syncthreads();
  }
}

// Two 64 x 64 x 16 products of K-major tiles, each in a group of its own.
template <Fault kFault>
__global__ void product_kernel(const char* in, char* out) {
  SharedMemory memory;
  uint4* tiles = memory.take<uint4>(2 * 512, 1024);
  for (int i = threadIdx.x; i < 2 * 512; i += blockDim.x) tiles[i] = as<uint4>(in)[i];
  if (kFault != kNoProxyFence) fence_proxy_async();
  __syncthreads();
  const int thread = threadIdx.x;
  const uint64_t a = wgmma_descriptor(tiles, 0, 1024, 128);
  uint64_t b = wgmma_descriptor(tiles + 512, 0, 1024, 128);
  if (kFault == kPastTheEnd) b = wgmma_descriptor(tiles + 512, 0, 0x3fff0, 128);
  if (kFault == kDescriptorsDiffer && thread >= 64) b += 2;
  float first[32], second[32];
  if (kFault != kNoFence) wgmma_fence();
  if (kFault != kWarpMissing || thread < 96) wgmma_ss<__nv_bfloat16, 64>(first, a, b, false);
  wgmma_commit();
  wgmma_ss<__nv_bfloat16, 64>(second, a + 2, b + 2, false);
  wgmma_commit();
  if (kFault == kWaitForNewer) wgmma_wait<2>();
  if (kFault != kWaitForNewer) wgmma_wait<1>();
  for (int j = 0; j < 32; j++) as<float>(out)[thread * 32 + j] = first[j];
  if (kFault != kNoProductWait) wgmma_wait<0>();
  for (int j = 0; j < 32; j++) as<float>(out)[(128 + thread) * 32 + j] = second[j];
}

template <Fault kFault>
__global__ void registers_kernel(const char*, char* out) {
  if (threadIdx.x < 128) {
    if (kFault == kNone) set_max_registers_dec<40>();
    if (kFault == kWarpMissing && threadIdx.x < 64) set_max_registers_dec<40>();
    if (kFault == kRaiseDownwards) set_max_registers_inc<40>();
  } else if (kFault == kNone || kFault == kNoRegisters) {
    set_max_registers_inc<232>();
  }
  as<int>(out)[threadIdx.x] = static_cast<int>(threadIdx.x);
}

// Two blocks show each other two words a thread, one after the other, in the same slot.
template <Fault kFault>
__global__ void cluster_kernel(const char* in, char* out) {
  BK_SHARED(int, slot, [32]);
  BK_SHARED(Mbarrier, never, [1]);
  const int thread = threadIdx.x;
  const uint32_t peer = kFault == kWrongBlock ? 2 : cluster_rank() ^ 1;
  if (kFault == kDeadlock && thread == 0) mbarrier_init(never, 1);
  __syncthreads();
  for (int step = 0; step < 2; step++) {
    const int at = (step * 2 + static_cast<int>(blockIdx.x)) * 32 + thread;
    slot[thread] = as<int>(in)[at];
    if (kFault == kDeadlock && blockIdx.x == 1) mbarrier_wait(never, 0);
    if (kFault == kArrivesTwice) cluster_arrive();
    if (kFault != kNoStart && (kFault != kNoReadBarrier || step == 0)) cluster_sync();
    as<int>(out)[at] = ld_cluster<int>(cluster_address(&slot[31 - thread], peer));
    if (step == 0) {
      if (kFault != kNoReuseBarrier) cluster_sync();
    } else if (kFault == kExitUnwaited) {
      cluster_arrive();
    } else if (kFault != kNoExitBarrier && (kFault != kBlockMissing || blockIdx.x == 0)) {
      cluster_sync();
    }
  }
}

// Block 0 hands block 1 four words a thread through mbarriers.
template <Fault kFault>
__global__ void signal_kernel(const char* in, char* out) {
  BK_SHARED(int, slot, [32]);
  BK_SHARED(Mbarrier, full, [1]);
  BK_SHARED(Mbarrier, empty, [1]);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    fence_barrier_init();
  }
  cluster_sync();
  for (int step = 0; step < 4; step++) {
    if (blockIdx.x == 0) {
      mbarrier_wait_cluster(empty, (step & 1) ^ 1);
      st_cluster(cluster_address(&slot[thread], 1), as<int>(in)[step * 32 + thread]);
      mbarrier_arrive_cluster(full, 1);
    } else {
      if (kFault == kBlockWait) {
        mbarrier_wait(full, step & 1);
      } else if (kFault != kNoWait) {
        mbarrier_wait_cluster(full, step & 1);
      }
      as<int>(out)[step * 32 + thread] = slot[31 - thread];
      mbarrier_arrive_cluster(empty, 0);
    }
  }
  if (kFault != kNoTail) cluster_sync();
}

// Each of two blocks sends the other a word a thread.
template <Fault kFault>
__global__ void send_kernel(const char* in, char* out) {
  BK_SHARED(int, slot, [32]);
  BK_SHARED(Mbarrier, landed, [1]);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(landed, 1);
    if (kFault != kNoBarrierFence) fence_barrier_init();
    mbarrier_arrive_expect_tx(landed, kFault == kTooManyBytes ? 132 : 128);
  }
  cluster_sync();
  st_async(&slot[31 - thread], as<int>(in)[blockIdx.x * 32 + thread], landed, cluster_rank() ^ 1);
  if (kFault != kNoWait) mbarrier_wait_cluster(landed, 0);
  as<int>(out)[blockIdx.x * 32 + thread] = slot[thread];
}

template <Fault kFault>
constexpr auto kCluster = launch_case<cluster_kernel<kFault>, 32, 2, 0, false, 2>;
template <Fault kFault>
constexpr auto kSignal = launch_case<signal_kernel<kFault>, 32, 2, 0, false, 2>;
template <Fault kFault>
constexpr auto kSend = launch_case<send_kernel<kFault>, 32, 2, 0, false, 2>;
template <Fault kFault>
constexpr auto kLoad = launch_case<load_kernel<kFault>, 64, 1, kBytes + 64>;
template <Fault kFault>
constexpr auto kStore = launch_case<store_kernel<kFault>, 64, 1, kBytes>;
template <Fault kFault>
constexpr auto kProduct = launch_case<product_kernel<kFault>, 128, 1, 16384>;
template <Fault kFault>
constexpr auto kRegisters = launch_case<registers_kernel<kFault>, 384>;

const conformance::Case kCases[] = {
    {"load", kLoad<kNone>},
    {"load_no_wait", kLoad<kNoWait>},
    {"load_no_empty_wait", kLoad<kNoEmptyWait>},
    {"load_no_barrier_fence", kLoad<kNoBarrierFence>},
    {"load_not_initialised", kLoad<kNotInitialised>},
    {"load_barrier_overwritten", kLoad<kBarrierOverwritten>},
    {"load_too_many_arrivals", kLoad<kTooManyArrivals>},
    {"load_too_many_bytes", kLoad<kTooManyBytes>},
    {"load_misaligned", kLoad<kMisaligned>},
    {"store", kStore<kNone>},
    {"store_no_proxy_fence", kStore<kNoProxyFence>},
    {"store_no_wait", kStore<kNoStoreWait>},
    {"store_no_commit", kStore<kNoCommit>},
    {"store_source_reused", kStore<kSourceReused>},
    {"product", kProduct<kNone>},
    {"product_no_fence", kProduct<kNoFence>},
    {"product_no_wait", kProduct<kNoProductWait>},
    {"product_wait_for_newer", kProduct<kWaitForNewer>},
    {"product_no_proxy_fence", kProduct<kNoProxyFence>},
    {"product_warp_missing", kProduct<kWarpMissing>},
    {"product_descriptors_differ", kProduct<kDescriptorsDiffer>},
    {"product_past_the_end", kProduct<kPastTheEnd>},
    {"registers", kRegisters<kNone>},
    {"registers_none_left", kRegisters<kNoRegisters>},
    {"registers_raise_downwards", kRegisters<kRaiseDownwards>},
    {"registers_warp_missing", kRegisters<kWarpMissing>},
    {"cluster", kCluster<kNone>},
    {"cluster_no_start", kCluster<kNoStart>},
    {"cluster_no_read_barrier", kCluster<kNoReadBarrier>},
    {"cluster_no_reuse_barrier", kCluster<kNoReuseBarrier>},
    {"cluster_no_exit_barrier", kCluster<kNoExitBarrier>},
    {"cluster_exit_unwaited", kCluster<kExitUnwaited>},
    {"cluster_arrives_twice", kCluster<kArrivesTwice>},
    {"cluster_block_missing", kCluster<kBlockMissing>},
    {"cluster_wrong_block", kCluster<kWrongBlock>},
    {"cluster_deadlock", kCluster<kDeadlock>},
    {"signal", kSignal<kNone>},
    {"signal_no_wait", kSignal<kNoWait>},
    {"signal_block_wait", kSignal<kBlockWait>},
    {"signal_no_tail", kSignal<kNoTail>},
    {"send", kSend<kNone>},
    {"send_no_wait", kSend<kNoWait>},
    {"send_no_barrier_fence", kSend<kNoBarrierFence>},
    {"send_too_many_bytes", kSend<kTooManyBytes>},
};

}  // namespace

BK_CONFORMANCE(kCases)
