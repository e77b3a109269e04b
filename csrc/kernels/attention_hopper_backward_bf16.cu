#include "kernels/attention_hopper_backward.cuh"

namespace bigkern::attention {

template int hopper_backward<__nv_bfloat16>(const AttentionBackwardParams&, const HopperBackwardPlan&, Stream);

}  // namespace bigkern::attention
