// SPDX-License-Identifier: BSD-3-Clause
//
// The kernel table of one instruction set: what isa_<name>.cpp compiles, with that set's flags and SDGP_ISA = <name>.
// Everything here lives in namespace SDGP_ISA and calls no inline function of the standard library: the linker would
// keep one copy of it for all, perhaps the one with instructions that this CPU lacks.
#include "rescale-inl.h"

namespace sdgp::SDGP_ISA {
namespace {

PruneArgs flattened(const PruneArgs& args) {
  PruneArgs flat = args;
  flatten_rows(flat);
  return flat;
}

int64_t prune_nm_units(const PruneArgs& args) {
  if (args.method == Method::kRescale) return make_block_plan(args).blocks;
  return make_plan(flattened(args), tile_lanes(args)).units;
}

void prune_nm(const PruneArgs& args, int64_t begin, int64_t end) {
  if (args.method == Method::kRescale) return rescale_range(args, begin, end);
  range_function(args)(flattened(args), begin, end);
}

}  // namespace

const Kernels table{SDGP_ISA_NAME, &prune_nm_units, &prune_nm};

}  // namespace sdgp::SDGP_ISA
