#include "kernels/layer_norm.cuh"

namespace bigkern {

template int layer_norm_forward<__half, float>(const LayerNormForwardParams&, Stream, const Allocate&);
template int layer_norm_backward<__half, float>(const LayerNormBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
