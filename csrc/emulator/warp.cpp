#include "emulator/warp.h"

#include <string>

namespace bigkern::emulator {

void fail_shuffle(const char* operation, int lane, int source, Where where) {
  fail(std::string(operation) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which is not in the mask",
       where);
}

unsigned ballot(const char* operation, unsigned mask, bool predicate, Where where) {
  struct Vote {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_collective(operation, mask, &mine, where, [](WarpMeeting& meeting) {
    unsigned votes = 0;
    for (int lane = 0; lane < kWarpSize; lane++) {
      if (meeting.mask >> lane & 1) votes |= unsigned{static_cast<Vote*>(meeting.argument[lane])->predicate} << lane;
    }
    for (int lane = 0; lane < kWarpSize; lane++) {
      if (meeting.mask >> lane & 1) static_cast<Vote*>(meeting.argument[lane])->result = votes;
    }
  });
  return mine.result;
}

}  // namespace bigkern::emulator

void __syncwarp(unsigned mask, bigkern::emulator::Where where) {
  using namespace bigkern::emulator;
  warp_collective("__syncwarp", mask, nullptr, where,
                  [](WarpMeeting& meeting) { happens_before_join(meeting.fiber, meeting.arrived); });
}

unsigned __activemask() {
  using bigkern::emulator::current;
  return current->block->warps[current->warp].alive;
}
