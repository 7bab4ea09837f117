// SPDX-License-Identifier: BSD-3-Clause
#include "prune_nm_launch.cuh"

namespace sdgp::cuda {

template void prune_nm_as<BFloat16>(const PruneArgs&, const int64_t*, const void*, void*);
template void rescale_factors_as<BFloat16>(const PruneArgs&, void*, void*, void*);

}  // namespace sdgp::cuda
