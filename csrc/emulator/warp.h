// Warp collectives. Shuffles and votes order no memory, as on the device; __syncwarp does.
#pragma once

#include "emulator/core.h"

namespace bigkern::emulator {

template <class T>
struct Shuffled {
  T value;
  int source;
  T result;
};

[[noreturn]] void fail_shuffle(const char* operation, int lane, int source, Where where);

template <class T>
BK_UNINSTRUMENTED T shuffle(const char* operation, unsigned mask, T value, int source, Where where) {
  Shuffled<T> mine{value, source, value};
  warp_collective(operation, mask, &mine, where, [operation, where](auto& meeting) BK_UNINSTRUMENTED {
    for (int lane = 0; lane < kWarpSize; lane++) {
      if (!(meeting.mask >> lane & 1)) continue;
      auto& entry = *static_cast<Shuffled<T>*>(meeting.argument[lane]);
      if (!(meeting.mask >> entry.source & 1)) fail_shuffle(operation, lane, entry.source, where);
      entry.result = static_cast<Shuffled<T>*>(meeting.argument[entry.source])->value;
    }
  });
  return mine.result;
}

unsigned ballot(const char* operation, unsigned mask, bool predicate, Where where);

}  // namespace bigkern::emulator

#define BK_WHERE ::bigkern::emulator::Where where = ::bigkern::emulator::Where::here()

void __syncwarp(unsigned mask = 0xffffffffu, BK_WHERE);

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, BK_WHERE) {
  const int lane = bigkern::emulator::lane_index();
  return bigkern::emulator::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, BK_WHERE) {
  const int lane = bigkern::emulator::lane_index(), source = lane ^ lane_mask;
  return bigkern::emulator::shuffle("__shfl_xor_sync", mask, value, source / width > lane / width ? lane : source,
                                    where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, BK_WHERE) {
  const int lane = bigkern::emulator::lane_index();
  const bool inside = lane % width + static_cast<int>(delta) < width;
  return bigkern::emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + static_cast<int>(delta) : lane,
                                    where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, BK_WHERE) {
  const int lane = bigkern::emulator::lane_index();
  const bool inside = lane % width >= static_cast<int>(delta);
  return bigkern::emulator::shuffle("__shfl_up_sync", mask, value, inside ? lane - static_cast<int>(delta) : lane,
                                    where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, BK_WHERE) {
  return bigkern::emulator::ballot("__ballot_sync", mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, BK_WHERE) {
  return bigkern::emulator::ballot("__any_sync", mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, BK_WHERE) {
  return bigkern::emulator::ballot("__all_sync", mask, predicate != 0, where) == mask;
}

// The lanes that exist and have not exited: with emulated divergence unknowable, the converged case.
unsigned __activemask();

namespace bigkern::emulator {

template <class T, class Combine>
BK_UNINSTRUMENTED T reduce(const char* operation, unsigned mask, T value, Where where, Combine combine) {
  Shuffled<T> mine{value, 0, value};
  warp_collective(operation, mask, &mine, where, [combine](auto& meeting) BK_UNINSTRUMENTED {
    const int first = __builtin_ctz(meeting.mask);
    T total = static_cast<Shuffled<T>*>(meeting.argument[first])->value;
    for (int lane = first + 1; lane < kWarpSize; lane++) {
      if (meeting.mask >> lane & 1) total = combine(total, static_cast<Shuffled<T>*>(meeting.argument[lane])->value);
    }
    for (int lane = first; lane < kWarpSize; lane++) {
      if (meeting.mask >> lane & 1) static_cast<Shuffled<T>*>(meeting.argument[lane])->result = total;
    }
  });
  return mine.result;
}

}  // namespace bigkern::emulator

template <class T>
T __reduce_add_sync(unsigned mask, T value, BK_WHERE) {
  return bigkern::emulator::reduce("__reduce_add_sync", mask, value, where, [](T a, T b) { return T(a + b); });
}

template <class T>
T __reduce_min_sync(unsigned mask, T value, BK_WHERE) {
  return bigkern::emulator::reduce("__reduce_min_sync", mask, value, where, [](T a, T b) { return b < a ? b : a; });
}

template <class T>
T __reduce_max_sync(unsigned mask, T value, BK_WHERE) {
  return bigkern::emulator::reduce("__reduce_max_sync", mask, value, where, [](T a, T b) { return a < b ? b : a; });
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, BK_WHERE) {
  return bigkern::emulator::reduce("__reduce_or_sync", mask, value, where,
                                   [](unsigned a, unsigned b) { return a | b; });
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned value, BK_WHERE) {
  return bigkern::emulator::reduce("__reduce_and_sync", mask, value, where,
                                   [](unsigned a, unsigned b) { return a & b; });
}

// The lanes of mask that hold the same bits.
template <class T>
BK_UNINSTRUMENTED unsigned __match_any_sync(unsigned mask, T value, BK_WHERE) {
  using namespace bigkern::emulator;
  struct Entry {
    T value;
    unsigned same;
  } mine{value, 0};
  warp_collective("__match_any_sync", mask, &mine, where, [](auto& meeting) BK_UNINSTRUMENTED {
    for (int a = 0; a < kWarpSize; a++) {
      if (!(meeting.mask >> a & 1)) continue;
      for (int b = 0; b < kWarpSize; b++) {
        if (!(meeting.mask >> b & 1)) continue;
        auto& entry = *static_cast<Entry*>(meeting.argument[a]);
        if (__builtin_memcmp(&entry.value, &static_cast<Entry*>(meeting.argument[b])->value, sizeof(T)) == 0) {
          entry.same |= 1u << b;
        }
      }
    }
  });
  return mine.same;
}
