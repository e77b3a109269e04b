#include "kernels/attention.cuh"

namespace bigkern {

template int attention_forward<__nv_bfloat16>(const AttentionForwardParams&, Stream, const AttentionAllocate&);

}  // namespace bigkern
