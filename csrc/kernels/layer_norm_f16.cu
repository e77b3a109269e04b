#include "kernels/layer_norm.cuh"

namespace bigkern {

template int layer_norm_forward<__half>(const LayerNormForwardParams&, Stream, const Allocate&);
template int layer_norm_backward<__half>(const LayerNormBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
