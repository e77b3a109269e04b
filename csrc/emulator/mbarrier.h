// Transaction barriers and the fences of the asynchronous proxy; see device/cuda/mbarrier.cuh.
#pragma once

#include <cstdint>

#include "emulator/core.h"
#include "emulator/warp.h"

namespace bigkern {

using Mbarrier = uint64_t;

void mbarrier_init(Mbarrier* barrier, uint32_t arrivals, BK_WHERE);
void fence_barrier_init();
void fence_proxy_async();
void mbarrier_arrive(Mbarrier* barrier, BK_WHERE);
void mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes, BK_WHERE);
bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity, BK_WHERE);
void mbarrier_wait(Mbarrier* barrier, uint32_t parity, BK_WHERE);
void mbarrier_arrive_cluster(Mbarrier* barrier, uint32_t rank, BK_WHERE);
void mbarrier_wait_cluster(Mbarrier* barrier, uint32_t parity, BK_WHERE);

namespace emulator {

// For bulk copies. Issuing one fails unless the barrier's initialisation is fenced; completing it takes its bytes off
// the phase and publishes what `fiber`, possibly of another block of the cluster, had done: of threads' own accesses
// that is more than the hardware promises.
void mbarrier_check_issue(Mbarrier* barrier, const char* operation, Where where);
void mbarrier_check_issue(Block& owner, Mbarrier* barrier, const char* operation, Where where);
void mbarrier_complete_tx(Block& block, Mbarrier* barrier, uint32_t bytes, Fiber* fiber);

}  // namespace emulator

}  // namespace bigkern
