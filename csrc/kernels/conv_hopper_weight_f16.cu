#include "kernels/conv_hopper_weight.cuh"

namespace bigkern {
namespace conv {

template int launch_hopper_weight<__half>(const HopperWeightPlan&, Stream);

}  // namespace conv
}  // namespace bigkern
