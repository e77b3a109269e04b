#include "kernels/layer_norm.cuh"

namespace bigkern {

template int layer_norm_forward<__nv_bfloat16>(const LayerNormForwardParams&, Stream, const Allocate&);
template int layer_norm_backward<__nv_bfloat16>(const LayerNormBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
