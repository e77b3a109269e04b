#include "kernels/attention.cuh"

namespace bigkern {

template int attention_forward<float>(const AttentionForwardParams&, Stream, const AttentionAllocate&);

}  // namespace bigkern
