#include "kernels/attention_hopper_forward.cuh"

namespace bigkern {
namespace attention {

template int hopper_forward<__nv_bfloat16>(const AttentionForwardParams&, Stream);

}  // namespace attention
}  // namespace bigkern
