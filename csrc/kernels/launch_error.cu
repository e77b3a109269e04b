#include "kernels/launch_error.h"

#include "device/device.cuh"

namespace bigkern {

const char* launch_error(int code) {
  return error_string(code);
}

}  // namespace bigkern
