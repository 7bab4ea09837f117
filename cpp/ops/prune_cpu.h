// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on the CPU for the ops that need it: the settings with what they take from tensors, and the pruning itself.
#pragma once

#include "prune_args.h"

namespace sdgp {

constexpr int64_t kGrainElements = 32768;  // with fewer, a second thread costs more than it gains (as in ATen)

// Returns the least number of work units per thread if `units` units share `elements` elements.
inline int64_t grain_of(int64_t units, int64_t elements) { return 1 + units * kGrainElements / (elements + 1); }

// Returns the call's settings with what the method needs: the caller's seed or else a drawn one, and the step.
Pruning complete(const Tensor& input, const PruneCall& call);

// Writes prune_nm of `input` to `output`.
void prune_into_cpu(const Tensor& input, Tensor& output, const PruneCall& call);

}  // namespace sdgp
