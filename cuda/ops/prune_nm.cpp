// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm and _prune_nm_scale on CUDA.
#include "../../cpp/ops/prune_nm.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "prune_cuda.h"

namespace sdgp {
namespace {

template <bool kScale>
Tensor prune_nm_cuda(const Tensor& input, const Settings& settings) {
  const PruneCall call = validate_prune_nm<kScale>(input, settings);
  const torch::stable::accelerator::DeviceGuard guard(device_of(input).index);
  Tensor output = torch::stable::empty_like(input);
  prune_into_cuda(input, output, call);
  return output;
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CUDA, library) {
  library.impl("prune_nm", SDGP_BOX(&sdgp::prune_nm_cuda<false>));
  library.impl("_prune_nm_scale", SDGP_BOX(&sdgp::prune_nm_cuda<true>));
}
