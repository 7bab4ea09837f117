// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on the CPU, for the ops that do: arguments with the seed in them, and the pruning itself.
#pragma once

#include "prune_args.h"

namespace sdgp {

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it gains (as in ATen)

// Work units per thread, at least, where `units` share `elements`.
inline int64_t grain_of(int64_t units, int64_t elements) { return 1 + units * kGrainElements / (elements + 1); }

// The given seed or, where a method needs one and none is given, a drawn one.
uint64_t seed_on_cpu(const Tensor& input, const PruneCall& call, int64_t n, int64_t m,
                     const std::optional<Tensor>& seed);

// describe_prune, with the seed.
PruneArgs describe_prune_cpu(const Tensor& input, const Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                             const std::optional<Tensor>& seed);

// prune_nm of `input` into `output`.
void prune_into(const Tensor& input, Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                const std::optional<Tensor>& seed, bool scale);

}  // namespace sdgp
