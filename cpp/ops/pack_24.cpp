// SPDX-License-Identifier: BSD-3-Clause
//
// _pack_24 has a kernel on CUDA alone (cuda/ops/pack_24.cpp); here are its checks for the other devices.
#include "pack_24.h"

#include <torch/csrc/stable/library.h>

namespace sdgp {
namespace {

Tensor pack_24_unsupported(const Tensor& input, int64_t n, int64_t m, std::string_view method,
                           const std::optional<Tensor>& seed, std::string_view layout) {
  validate_pack(input, n, m, method, seed, layout);
  refuse_device("_pack_24", input, "cuda, where sdgp was built for it");
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_pack_24", TORCH_BOX(&sdgp::pack_24_unsupported));
}
