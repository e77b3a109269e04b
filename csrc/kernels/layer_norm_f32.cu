#include "kernels/layer_norm.cuh"

namespace bigkern {

template int layer_norm_forward<float>(const LayerNormForwardParams&, Stream, const Allocate&);
template int layer_norm_backward<float>(const LayerNormBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
