// SPDX-License-Identifier: BSD-3-Clause
//
// What every op that prunes shares: its arguments checked, and described to the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string_view>

#include "../checks.h"
#include "../kernels/kernels.h"

namespace sdgp {

struct PruneCall {
  DType dtype;
  Method method;
  int64_t dim;  // counted from the front
};

PruneCall validate_prune(const char* op, const Tensor& input, int64_t n, int64_t m, int64_t dim,
                         std::string_view method, const std::optional<Tensor>& seed);

// `output` gives the strides; of a tensor with elements. The seed stays open.
PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call, int64_t n, int64_t m);

// Fills `output` where every element stays, or there is none; whether it did.
bool nothing_to_choose(const Tensor& input, Tensor& output, int64_t n, int64_t m, bool scale);

// One int64 from the generator of the input's device, on that device.
Tensor draw_seed(const Tensor& input);

}  // namespace sdgp
