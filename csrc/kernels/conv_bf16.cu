#include "kernels/conv.cuh"

namespace bigkern {

template int conv_forward<__nv_bfloat16>(const ConvForwardParams&, Stream, const Allocate&);
template int conv_backward_epilogue<__nv_bfloat16>(const ConvBackwardEpilogueParams&, Stream, const Allocate&);
template int conv_backward_input<__nv_bfloat16>(const ConvBackwardInputParams&, Stream, const Allocate&);
template int conv_backward_weight<__nv_bfloat16>(const ConvBackwardWeightParams&, Stream, const Allocate&);

}  // namespace bigkern
