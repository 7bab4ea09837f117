// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on the CPU, for the ops that do: settings with the seed in them, and the pruning itself.
#pragma once

#include "prune_args.h"

namespace sdgp {

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it gains (as in ATen)

// Work units per thread, at least, where `units` share `elements`.
inline int64_t grain_of(int64_t units, int64_t elements) { return 1 + units * kGrainElements / (elements + 1); }

// The call's settings with the given seed or, where a method needs one and none is given, a drawn one.
Pruning read_seed(const Tensor& input, const PruneCall& call);

// prune_nm of `input` into `output`.
void prune_into_cpu(const Tensor& input, Tensor& output, const PruneCall& call);

}  // namespace sdgp
