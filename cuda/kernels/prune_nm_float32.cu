// SPDX-License-Identifier: BSD-3-Clause
#include "prune_nm_launch.cuh"

namespace sdgp::cuda {

template void launch_prune_nm<Float32>(const PruneArgs&, const int64_t*, const void*, void*);
template void launch_rescale_factors<Float32>(const PruneArgs&, void*, void*, void*);

}  // namespace sdgp::cuda
