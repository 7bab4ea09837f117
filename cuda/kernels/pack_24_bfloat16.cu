// SPDX-License-Identifier: BSD-3-Clause
#include "pack_24_launch.cuh"

namespace sdgp::cuda {

template void launch_pack_24<BFloat16>(const PackArgs&, void*);

}  // namespace sdgp::cuda
