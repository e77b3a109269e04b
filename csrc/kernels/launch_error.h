#pragma once

namespace bigkern {

// What a launcher's non-zero code stands for.
const char* launch_error(int code);

}  // namespace bigkern
