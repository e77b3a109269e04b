#include "emulator/async_copy.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace bigkern {

namespace {

using namespace emulator;

void complete(const CopyRequest& request) {
  record_access(current, request.source, static_cast<size_t>(request.copied), Access::kRead, Proxy::kGeneric,
                request.where);
  record_access(current, request.destination, static_cast<size_t>(request.bytes), Access::kWrite, Proxy::kGeneric,
                request.where);
  char* destination = static_cast<char*>(request.destination);
  if (request.copied > 0) std::memcpy(destination, request.source, static_cast<size_t>(request.copied));
  std::memset(destination + request.copied, 0, static_cast<size_t>(request.bytes - request.copied));
}

}  // namespace

void cp_async16(void* destination, const void* source, bool pred, Where where) {
  RuntimeScope scope;
  constexpr int kBytes = 16;
  check_shared(destination, kBytes, kBytes, "cp_async16", where);
  if (pred) check_global_alignment(source, kBytes, "cp_async16", where);
  count_bank_access(*current, destination, kBytes, true, __builtin_return_address(0), where);
  record_copy_issue(current, destination, kBytes, Proxy::kGeneric, where);
  const CopyRequest request{destination, source, kBytes, pred ? kBytes : 0, where};
  if (current->copy_interval.late()) {
    current->copies.push_back(request);
    current->open_copies++;
  } else {
    complete(request);
  }
}

void cp_async_commit() {
  RuntimeScope scope;
  current->copy_groups.push_back(std::exchange(current->open_copies, 0));
}

void emulator::copy_async_wait(size_t groups_left) {
  RuntimeScope scope;
  auto& groups = current->copy_groups;
  if (groups.size() > groups_left) {
    const auto kept = groups.end() - static_cast<ptrdiff_t>(groups_left);
    const auto first = current->copies.begin();
    const auto last = first + static_cast<ptrdiff_t>(std::accumulate(groups.begin(), kept, size_t{0}));
    std::for_each(first, last, complete);
    current->copies.erase(first, last);
    groups.erase(groups.begin(), kept);
  }
  current->copy_interval.end();
}

}  // namespace bigkern
