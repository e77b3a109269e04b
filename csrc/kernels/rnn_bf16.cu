#include "kernels/rnn.cuh"

namespace bigkern {

template int rnn_forward<__nv_bfloat16>(const RnnForwardParams&, Stream, const Allocate&);
template int rnn_backward<__nv_bfloat16>(const RnnBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
