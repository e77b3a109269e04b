#include "kernels/conv_hopper.cuh"

namespace bigkern {
namespace conv {

template int launch_hopper<__nv_bfloat16>(const HopperPlan&, const StoreOutput<__nv_bfloat16>&, Stream);

}  // namespace conv
}  // namespace bigkern
