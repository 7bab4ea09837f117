// SPDX-License-Identifier: BSD-3-Clause
//
// What every op that prunes shares: its arguments checked, and described to the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "../kernels/args.h"
#include "settings.h"

namespace sdgp {

// The Settings of a call, checked; of its Pruning the seed is open until the tensor that holds it is read.
struct PruneCall {
  DType dtype;
  int64_t dim;  // counted from the front
  Pruning pruning;
  std::optional<Tensor> seed;

  bool draws() const { return traits(pruning.method).draws && !pruning.keeps_all(); }
};

PruneCall validate_prune(const char* op, const Tensor& input, const Settings& settings);

// `output` gives the strides; of a tensor with elements. The pointer to write to stays open.
PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call);

// Fills `output` where every element stays, or there is none; whether it did.
bool nothing_to_choose(const Tensor& input, Tensor& output, const Pruning& pruning);

// The seed that the caller gave, or one that the generator of the input's device draws there, as sdgp's Python does.
Tensor seed_of(const Tensor& input, const PruneCall& call);

}  // namespace sdgp
