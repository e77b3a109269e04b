#include "kernels/conv.cuh"

namespace bigkern {

template int conv_forward<__half>(const ConvForwardParams&, Stream, const Allocate&);
template int conv_backward_epilogue<__half>(const ConvBackwardEpilogueParams&, Stream, const Allocate&);
template int conv_backward_input<__half>(const ConvBackwardInputParams&, Stream, const Allocate&);
template int conv_backward_weight<__half>(const ConvBackwardWeightParams&, Stream, const Allocate&);

}  // namespace bigkern
