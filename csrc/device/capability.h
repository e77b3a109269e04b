#pragma once

#include <algorithm>
#include <cstdlib>

namespace bigkern {

// BIGKERN_MAX_CAPABILITY=80, for example, keeps launchers to the kernels of GPUs up to that compute capability: to
// measure one path beside another, and as a way around a fault of the newer.
inline int allowed_capability(int found) {
  const char* most = std::getenv("BIGKERN_MAX_CAPABILITY");
  return most != nullptr && *most != '\0' ? std::min(found, std::atoi(most)) : found;
}

}  // namespace bigkern
