// SPDX-License-Identifier: BSD-3-Clause
//
// Code that every pruning op shares: it checks the arguments and describes them to the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "../kernels/args.h"
#include "settings.h"

namespace sdgp {

// The checked Settings of a call. `pruning` has no seed until the tensor that holds the seed is read.
struct PruneCall {
  DType dtype;
  int64_t dim;  // counted from the front
  Pruning pruning;
  std::optional<Tensor> seed;

  bool draws() const { return traits(pruning.method).draws && !pruning.keeps_all(); }
};

PruneCall validate_prune(const char* op, const Tensor& input, const Settings& settings);

// `input` must not be empty. `output` gives only the strides: the caller sets the pointer to write to.
PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call);

// Completes `output` if no element exists or every element stays. Returns whether that was so.
bool prune_trivially(const Tensor& input, Tensor& output, const Pruning& pruning);

// Returns the caller's seed. If there is none, the generator of the input's device draws one on that device, as in
// sdgp's Python code.
Tensor seed_of(const Tensor& input, const PruneCall& call);

}  // namespace sdgp
