#include "kernels/attention_decode.cuh"

namespace bigkern {

template int attention_decode_forward<__nv_bfloat16>(const AttentionDecodeParams&, Stream,
                                                     const std::function<void*(size_t)>&);

}  // namespace bigkern
