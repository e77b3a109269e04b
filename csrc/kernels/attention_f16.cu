#include "kernels/attention.cuh"

namespace bigkern {

template int attention_forward<__half>(const AttentionForwardParams&, Stream, const AttentionAllocate&);
template int attention_backward<__half>(const AttentionBackwardParams&, Stream, const AttentionAllocate&);

}  // namespace bigkern
