#include "kernels/conv_hopper_weight.cuh"

namespace bigkern {
namespace conv {

template int launch_hopper_weight<__nv_bfloat16>(const HopperWeightPlan&, Stream);

}  // namespace conv
}  // namespace bigkern
