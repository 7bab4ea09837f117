// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm and _prune_nm_scale. One host function checks the arguments for every device. Only the function that fills
// the output differs.
#include "prune_nm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "prune_cpu.h"

namespace sdgp {
namespace {

// The output has the input's strides if these leave no holes and do not overlap, otherwise the strides of clone().
Tensor allocate(const Tensor& input) { return torch::stable::empty_like(input); }

template <bool kScale>
Tensor prune_nm_cpu(const Tensor& input, const Settings& settings) {
  const PruneCall call = validate_prune_nm<kScale>(input, settings);
  Tensor output = allocate(input);
  prune_into_cpu(input, output, call);
  return output;
}

template <bool kScale>
Tensor prune_nm_meta(const Tensor& input, const Settings& settings) {
  validate_prune_nm<kScale>(input, settings);
  return allocate(input);
}

// Handles tensors for which there is no kernel. Quantized and sparse tensors fail the checks. For other tensors, the
// message names the device.
template <bool kScale>
Tensor prune_nm_unsupported(const Tensor& input, const Settings& settings) {
  validate_prune_nm<kScale>(input, settings);
  refuse_device(kPruneNmName<kScale>, input, "cpu, or cuda where sdgp was built for it");
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("prune_nm", SDGP_BOX(&sdgp::prune_nm_cpu<false>));
  library.impl("_prune_nm_scale", SDGP_BOX(&sdgp::prune_nm_cpu<true>));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, Meta, library) {
  library.impl("prune_nm", SDGP_BOX(&sdgp::prune_nm_meta<false>));
  library.impl("_prune_nm_scale", SDGP_BOX(&sdgp::prune_nm_meta<true>));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("prune_nm", SDGP_BOX(&sdgp::prune_nm_unsupported<false>));
  library.impl("_prune_nm_scale", SDGP_BOX(&sdgp::prune_nm_unsupported<true>));
}
