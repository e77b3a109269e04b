#pragma once

namespace bigkern {

// A CUDA stream as a plain pointer, so that headers compiled without CUDA can name it. The emulator ignores it.
using Stream = void*;

}  // namespace bigkern
