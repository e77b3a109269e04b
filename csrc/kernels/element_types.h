// The element types of tensors, by name only, so that headers compiled without CUDA can tell the instances of a
// launcher apart: float, __nv_bfloat16 and __half.
#pragma once

struct __nv_bfloat16;
struct __half;
