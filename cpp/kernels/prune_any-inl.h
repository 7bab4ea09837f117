// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm for every method. The kernel table and compress_nm call these functions.
#pragma once

#include "rescale-inl.h"

namespace sdgp::SDGP_ISA {

// Prunes nothing, so prune_nm copies.
constexpr Pruning kKeepAll{.method = Method::kMagnitude, .n = 4, .m = 4, .seed = 0, .scale = false};

inline PruneArgs flattened(const PruneArgs& args) {
  PruneArgs flat = args;
  flatten_rows(flat);
  return flat;
}

inline int64_t prune_nm_units(const PruneArgs& args) {
  if (args.pruning.method == Method::kRescale) return make_block_plan(args).blocks;
  return make_plan(flattened(args), range_of(args.dtype, args.pruning.method).lanes).units;
}

inline void prune_nm_kernel(const PruneArgs& args, int64_t begin, int64_t end) {
  if (args.pruning.method == Method::kRescale) return rescale_range(args, begin, end);
  range_of(args.dtype, args.pruning.method).run(flattened(args), begin, end);
}

}  // namespace sdgp::SDGP_ISA
