#include "kernels/rnn.cuh"

namespace bigkern {

template int rnn_forward<__half>(const RnnForwardParams&, Stream, const Allocate&);
template int rnn_backward<__half>(const RnnBackwardParams&, Stream, const Allocate&);

}  // namespace bigkern
