#include "kernels/attention.cuh"

namespace bigkern {

template int attention_forward<float>(const AttentionForwardParams&, Stream, const AttentionAllocate&);
template int attention_backward<float>(const AttentionBackwardParams&, Stream, const AttentionAllocate&);

}  // namespace bigkern
