// SPDX-License-Identifier: BSD-3-Clause
//
// Just enough of the kernel library for kernels_test: prune_nm with the baseline's instructions; with SDGP_FEW of
// float32, magnitude and random alone, which compiles in a tenth of the time.
#define SDGP_ISA baseline
#include "kernels/prune_any-inl.h"

namespace sdgp {
namespace {

#if defined(SDGP_FEW)
void prune_nm(const PruneArgs& args, int64_t begin, int64_t end) {
  using namespace baseline;
  const auto run = args.method == Method::kRandom ? &prune_range<Float32, Method::kRandom>
                                                  : &prune_range<Float32, Method::kMagnitude>;
  run(flattened(args), begin, end);
}
#else
using baseline::prune_nm;
#endif

}  // namespace

int64_t first_level_cache_bytes() { return 32768; }

const Kernels& kernels() {
  static const Kernels table{.isa = "baseline", .prune_nm_units = &baseline::prune_nm_units, .prune_nm = &prune_nm};
  return table;
}

}  // namespace sdgp
