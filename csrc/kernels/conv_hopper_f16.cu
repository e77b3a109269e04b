#include "kernels/conv_hopper.cuh"

namespace bigkern {
namespace conv {

template int launch_hopper<__half>(const HopperPlan&, const StoreOutput<__half>&, Stream);

}  // namespace conv
}  // namespace bigkern
