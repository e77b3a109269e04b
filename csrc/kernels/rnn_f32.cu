#include "kernels/rnn.cuh"

namespace bigkern {

template int rnn_forward<float>(const RnnForwardParams&, Stream, const Allocate&);
template int rnn_backward<float>(const RnnBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
