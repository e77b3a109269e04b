// What the Python module `bigkern_emulator` and the C entry points of test libraries share.
#pragma once

#include <string>

#include "emulator/options.h"

namespace bigkern::emulator {

// The message of the last launch that failed, on any thread; empty when none did.
std::string last_error();
void clear_last_error();

}  // namespace bigkern::emulator
