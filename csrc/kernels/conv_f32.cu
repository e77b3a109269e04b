#include "kernels/conv.cuh"

namespace bigkern {

template int conv_forward<float>(const ConvForwardParams&, Stream, const Allocate&);
template int conv_backward_epilogue<float>(const ConvBackwardEpilogueParams&, Stream, const Allocate&);
template int conv_backward_input<float>(const ConvBackwardInputParams&, Stream, const Allocate&);
template int conv_backward_weight<float>(const ConvBackwardWeightParams&, Stream, const Allocate&);

}  // namespace bigkern
