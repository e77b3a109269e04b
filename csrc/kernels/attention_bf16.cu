#include "kernels/attention.cuh"

namespace bigkern {

template int attention_forward<__nv_bfloat16>(const AttentionForwardParams&, Stream, const AttentionAllocate&);
template int attention_backward<__nv_bfloat16>(const AttentionBackwardParams&, Stream, const AttentionAllocate&);

}  // namespace bigkern
