// SPDX-License-Identifier: BSD-3-Clause
//
// Views that the headers of the stable ABI lack before torch 2.14.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace sdgp {

inline torch::stable::Tensor movedim(const torch::stable::Tensor& self, int64_t source, int64_t destination) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(self), from(source), from(destination)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::movedim", "int", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace sdgp
