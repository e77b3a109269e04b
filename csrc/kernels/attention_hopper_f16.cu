#include "kernels/attention_hopper_forward.cuh"

namespace bigkern {
namespace attention {

template int hopper_forward<__half>(const AttentionForwardParams&, Stream);

}  // namespace attention
}  // namespace bigkern
