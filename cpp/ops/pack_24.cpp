// SPDX-License-Identifier: BSD-3-Clause
//
// _pack_24 has a kernel only on CUDA (cuda/ops/pack_24.cpp). This file checks its arguments on other devices.
#include "pack_24.h"

#include <torch/csrc/stable/library.h>

namespace sdgp {
namespace {

Tensor pack_24_unsupported(const Tensor& input, const SettingsAlong<-1>& settings, std::string_view layout) {
  validate_pack(input, settings, layout);
  refuse_device("_pack_24", input, "cuda, where sdgp was built for it");
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_pack_24", SDGP_BOX(&sdgp::pack_24_unsupported));
}
