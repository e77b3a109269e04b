#include "emulator/tma.h"

#include "emulator/cluster.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "emulator/counters.h"

namespace bigkern {

namespace emulator {

size_t swizzled(size_t address, int bytes) {
  const size_t rows = bytes == 128 ? 7 : bytes == 64 ? 3 : bytes == 32 ? 1 : 0;
  return address ^ (address >> 7 & rows) << 4;
}

namespace {

constexpr size_t kPiece = 16;  // what a swizzle moves as a whole

struct Box {
  TensorMap map;
  int64_t start[5];
  uint32_t count[5];  // elements moved in each dimension
  size_t row_bytes;
  size_t bytes;
};

Box make_box(const TensorMap& map, const int* start, int rank, const char* operation, Where where) {
  if (rank != map.shape.rank) {
    fail(std::string(operation) + ": " + std::to_string(rank) + " coordinates for a tensor map of rank " +
             std::to_string(map.shape.rank),
         where);
  }
  Box box{map, {}, {}, 0, 0};
  size_t elements = 1;
  for (int i = 0; i < 5; i++) {
    box.start[i] = i < rank ? start[i] : 0;
    const uint32_t step = map.shape.element_strides[i];
    box.count[i] = (map.shape.box[i] + step - 1) / step;
    elements *= box.count[i];
  }
  const size_t element_bytes = map.shape.strides[0];
  box.row_bytes = box.count[0] * element_bytes;
  box.bytes = elements * element_bytes;
  return box;
}

// The part of one innermost row of a box that lies inside the tensor.
struct Row {
  char* global;            // of the first element inside
  size_t skipped, inside;  // bytes of the row before it, and inside
};

// Calls visit(row, offset in the box) for every innermost row, in the order in which they lie in shared memory.
template <class Visit>
void for_each_row(const Box& box, Visit visit) {
  const TensorMapShape& shape = box.map.shape;
  const int64_t element_bytes = static_cast<int64_t>(shape.strides[0]);
  const int64_t first = std::max<int64_t>(box.start[0], 0);
  const int64_t last = std::min<int64_t>(box.start[0] + box.count[0], static_cast<int64_t>(shape.dims[0]));
  size_t offset = 0;
  uint32_t at[5] = {};
  for (;;) {
    bool inside = first < last;
    int64_t distance = first * element_bytes;
    for (int i = 1; i < 5; i++) {
      const int64_t position = box.start[i] + int64_t{at[i]} * shape.element_strides[i];
      inside = inside && position >= 0 && position < static_cast<int64_t>(shape.dims[i]);
      distance += position * static_cast<int64_t>(shape.strides[i]);
    }
    if (inside) {
      visit(Row{box.map.global + distance, static_cast<size_t>((first - box.start[0]) * element_bytes),
                static_cast<size_t>((last - first) * element_bytes)},
            offset);
    } else {
      visit(Row{nullptr, 0, 0}, offset);
    }
    offset += box.row_bytes;
    int i = 1;
    while (i < 5 && ++at[i] == box.count[i]) at[i++] = 0;
    if (i == 5) return;
  }
}

// Into the block's shared memory. `reads`: the tensor is read for this block, not for another of the cluster.
void land(const Box& box, Block& block, char* dst, bool reads, Fiber* fiber) {
  const size_t base = dst - block.arena;
  std::vector<char> row_bytes(box.row_bytes);
  for_each_row(box, [&](const Row& row, size_t offset) {
    std::fill(row_bytes.begin(), row_bytes.end(), 0);
    if (row.inside) {
      if (reads) record_access(fiber, row.global, row.inside, Access::kRead);
      std::memcpy(row_bytes.data() + row.skipped, row.global, row.inside);
    }
    for (size_t piece = 0; piece < box.row_bytes; piece += kPiece) {
      char* to = block.arena + swizzled(base + offset + piece, box.map.shape.swizzle);
      record_access(fiber, to, kPiece, Access::kWrite, Proxy::kAsync);
      std::memcpy(to, row_bytes.data() + piece, kPiece);
    }
  });
}

// The box's bytes in shared memory, rows one after another.
std::vector<char> read_box(const Box& box, const char* src, Fiber* fiber) {
  Block& block = *fiber->block;
  const size_t base = src - block.arena;
  std::vector<char> bytes(box.bytes);
  for (size_t piece = 0; piece < box.bytes; piece += kPiece) {
    const char* from = block.arena + swizzled(base + piece, box.map.shape.swizzle);
    record_access(fiber, from, kPiece, Access::kRead, Proxy::kAsync);
    std::memcpy(bytes.data() + piece, from, kPiece);
  }
  return bytes;
}

template <class T>
T sum(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    return a + b;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(__half2float(a) + __half2float(b));
  } else {
    return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
  }
}

template <class T, class Word>
void add_elements(char* dst, const char* src, size_t bytes, Fiber* fiber) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T addend;
    std::memcpy(&addend, src + i, sizeof(T));
    auto* target = reinterpret_cast<Word*>(dst + i);
    record_access(fiber, target, sizeof(T), Access::kAtomic);
    Word old = __atomic_load_n(target, __ATOMIC_RELAXED), next;
    do {
      T value;
      std::memcpy(static_cast<void*>(&value), &old, sizeof(T));
      value = sum(value, addend);
      std::memcpy(&next, &value, sizeof(T));
    } while (!__atomic_compare_exchange_n(target, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
}

void add_bytes(Element element, char* dst, const char* src, size_t bytes, Fiber* fiber) {
  if (element == Element::kFloat) {
    add_elements<float, uint32_t>(dst, src, bytes, fiber);
  } else if (element == Element::kHalf) {
    add_elements<__half, uint16_t>(dst, src, bytes, fiber);
  } else {
    add_elements<__nv_bfloat16, uint16_t>(dst, src, bytes, fiber);
  }
}

void put_bytes(char* dst, const char* src, size_t bytes, Fiber* fiber) {
  record_access(fiber, dst, bytes, Access::kWrite);
  std::memcpy(dst, src, bytes);
}

void issue_load(std::function<void()> load) {
  issue_copy(*current->block, std::move(load));
}

// A store in two steps, which the hardware also tells apart: reading shared memory, writing global memory.
struct Store {
  std::function<std::vector<char>()> read;
  std::function<void(const std::vector<char>&)> write;
  std::vector<char> bytes;
};

struct StoreGroup {
  std::vector<Store> stores;
  bool read = false;
  bool written = false;
  bool released = false;  // the thread has waited for its reads

  void do_read() {
    for (Store& store : stores) {
      if (!read) store.bytes = store.read();
    }
    read = true;
  }
  void do_write() {
    do_read();
    for (Store& store : stores) {
      if (!written) store.write(store.bytes);
    }
    written = true;
  }
};

struct ThreadStores {
  std::vector<Store> open;
  std::deque<StoreGroup> groups;  // committed and not yet waited for, oldest first
  AsyncInterval interval;
};

struct BulkStores : BlockExtension {
  std::vector<ThreadStores> threads;

  void on_thread_exit(Fiber& fiber) override {
    if (static_cast<size_t>(fiber.index) >= threads.size()) return;
    ThreadStores& mine = threads[fiber.index];
    if (!mine.open.empty()) fail("a thread exits with bulk stores it has not committed");
    for (StoreGroup& group : mine.groups) {
      if (!group.released) {
        fail("a thread exits with bulk stores that may still read shared memory: no bulk_wait_read()");
      }
      group.do_write();  // writes nobody waits for complete by the end of the kernel
    }
  }
};

ThreadStores& my_stores() {
  auto& threads = extension<BulkStores>(*current->block).threads;
  if (threads.empty()) threads.resize(current->block->threads);
  return threads[current->index];
}

void check_bulk(const void* shared, const void* global, uint32_t bytes, const char* operation, Where where) {
  check_shared(shared, bytes, kPiece, operation, where);
  check_global_alignment(global, kPiece, operation, where);
  if (bytes % kPiece != 0) fail(std::string(operation) + ": the size is not a multiple of 16", where);
}

std::vector<char> read_plain(const void* src, uint32_t bytes, Fiber* fiber) {
  record_access(fiber, src, bytes, Access::kRead, Proxy::kAsync);
  const char* from = static_cast<const char*>(src);
  return std::vector<char>(from, from + bytes);
}

}  // namespace

void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier, const int* start, int rank, Where where) {
  RuntimeScope scope;
  const Box box = make_box(map, start, rank, "tma_load", where);
  check_shared(dst, box.bytes, 128, "tma_load", where);
  mbarrier_check_issue(barrier, "tma_load", where);
  counters().tma_load_bytes += box.bytes;
  issue_load([box, dst, barrier, fiber = current] {
    land(box, *fiber->block, static_cast<char*>(dst), true, fiber);
    mbarrier_complete_tx(*fiber->block, barrier, static_cast<uint32_t>(box.bytes), fiber);
  });
}

void tma_load_multicast(void* dst, const TensorMap& map, Mbarrier* barrier, const int* start, int rank, unsigned blocks,
                        Where where) {
  RuntimeScope scope;
  const char* operation = "tma_load_multicast";
  const Box box = make_box(map, start, rank, operation, where);
  if (blocks == 0 || blocks >> current->block->cluster->blocks.size() != 0) {
    fail(std::string(operation) + ": the mask names no block, or one that the cluster does not have", where);
  }
  counters().tma_load_bytes += box.bytes;
  bool reads = true;
  for (uint32_t target = 0; blocks >> target != 0; target++) {
    if (!(blocks >> target & 1)) continue;
    const RemotePlace tile = remote_place(dst, target, operation, where);
    const RemotePlace on = remote_place(barrier, target, operation, where);
    check_remote(tile, box.bytes, 128, operation, where);
    check_remote(on, sizeof(Mbarrier), alignof(Mbarrier), operation, where);
    auto* remote = reinterpret_cast<Mbarrier*>(on.address);
    mbarrier_check_issue(*on.owner, remote, operation, where);
    issue_copy(*tile.owner, [box, tile, remote, reads, fiber = current] {
      land(box, *tile.owner, tile.address, reads, fiber);
      mbarrier_complete_tx(*tile.owner, remote, static_cast<uint32_t>(box.bytes), fiber);
    });
    reads = false;
  }
}

void tma_store(const TensorMap& map, const void* src, const int* start, int rank, bool add, const char* operation,
               Where where) {
  RuntimeScope scope;
  const Box box = make_box(map, start, rank, operation, where);
  check_shared(src, box.bytes, 128, operation, where);
  Fiber* fiber = current;
  my_stores().open.push_back({[box, src, fiber] { return read_box(box, static_cast<const char*>(src), fiber); },
                              [box, add, fiber](const std::vector<char>& bytes) {
                                for_each_row(box, [&](const Row& row, size_t offset) {
                                  const char* from = bytes.data() + offset + row.skipped;
                                  if (row.inside && add)
                                    add_bytes(box.map.element, row.global, from, row.inside, fiber);
                                  if (row.inside && !add) put_bytes(row.global, from, row.inside, fiber);
                                });
                              },
                              {}});
}

void bulk_reduce_add(void* dst, const void* src, uint32_t bytes, Element element, Where where) {
  RuntimeScope scope;
  check_bulk(src, dst, bytes, "bulk_reduce_add", where);
  Fiber* fiber = current;
  my_stores().open.push_back({[src, bytes, fiber] { return read_plain(src, bytes, fiber); },
                              [dst, element, fiber](const std::vector<char>& data) {
                                add_bytes(element, static_cast<char*>(dst), data.data(), data.size(), fiber);
                              },
                              {}});
}

void bulk_wait(size_t groups, bool written) {
  RuntimeScope scope;
  ThreadStores& mine = my_stores();
  mine.interval.end();
  for (size_t i = 0; i + groups < mine.groups.size(); i++) {
    mine.groups[i].do_read();
    mine.groups[i].released = true;
    if (written) mine.groups[i].do_write();
  }
  while (!mine.groups.empty() && mine.groups.front().written && mine.groups.front().released) mine.groups.pop_front();
}

}  // namespace emulator

using namespace emulator;

void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier, Where where) {
  RuntimeScope scope;
  check_bulk(dst, src, bytes, "bulk_load", where);
  mbarrier_check_issue(barrier, "bulk_load", where);
  issue_load([=, fiber = current] {
    record_access(fiber, src, bytes, Access::kRead);
    record_access(fiber, dst, bytes, Access::kWrite, Proxy::kAsync);
    std::memcpy(dst, src, bytes);
    mbarrier_complete_tx(*fiber->block, barrier, bytes, fiber);
  });
}

void bulk_store(void* dst, const void* src, uint32_t bytes, Where where) {
  RuntimeScope scope;
  check_bulk(src, dst, bytes, "bulk_store", where);
  Fiber* fiber = current;
  my_stores().open.push_back({[src, bytes, fiber] { return read_plain(src, bytes, fiber); },
                              [dst, fiber](const std::vector<char>& data) {
                                put_bytes(static_cast<char*>(dst), data.data(), data.size(), fiber);
                              },
                              {}});
}

void bulk_commit() {
  RuntimeScope scope;
  ThreadStores& mine = my_stores();
  mine.groups.push_back({std::move(mine.open)});
  mine.open.clear();
  if (!mine.interval.late()) mine.groups.back().do_write();
}

}  // namespace bigkern
