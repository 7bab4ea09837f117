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

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it gains (as in ATen)

// Work units per thread, at least, where `units` share `elements`.
inline int64_t grain_of(int64_t units, int64_t elements) { return 1 + units * kGrainElements / (elements + 1); }

struct PruneCall {
  DType dtype;
  Method method;
  int64_t dim;  // counted from the front
};

PruneCall validate_prune(const char* op, const Tensor& input, int64_t n, int64_t m, int64_t dim,
                         std::string_view method, const std::optional<Tensor>& seed);

// `output` gives the strides; of a tensor with elements. Draws the seed where a method needs one and none is given.
PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                         const std::optional<Tensor>& seed);

// prune_nm of `input` into `output`, on the CPU.
void prune_into(const Tensor& input, Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                const std::optional<Tensor>& seed, bool scale);

}  // namespace sdgp
