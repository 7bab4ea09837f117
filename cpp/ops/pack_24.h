// SPDX-License-Identifier: BSD-3-Clause
//
// Checks the arguments of _pack_24 in the same way on every device.
#pragma once

#include "../kernels/layout_24.h"
#include "prune_args.h"

namespace sdgp {

struct PackCall {
  PruneCall prune;
  Layout24 layout;
};

inline Layout24 check_layout(const char* op, std::string_view name) {
  for (const Layout24Name& known : kLayouts24) {
    if (name == known.name) return known.value;
  }
  check(false, op, ": expected layout to be ", names_of(kLayouts24), ", got \"", name, "\"");
  __builtin_unreachable();
}

inline PackCall validate_pack(const Tensor& input, const SettingsAlong<-1>& settings, std::string_view layout) {
  constexpr const char* kOp = "_pack_24";
  const PruneCall prune = validate_prune(kOp, input, settings);
  check(input.dim() == 2, kOp, ": expected a matrix, got ", name_of_shape(input));
  check(contains(PackedDTypes{}, prune.dtype), kOp, ": expected float16 or bfloat16, got ",
        name_of_dtype(dtype_of(input)));
  check(fits_24(prune.pruning.n, prune.pruning.m), kOp, ": expected n <= 2 and m a multiple of 4, or 1:2, got ",
        settings.n, ":", settings.m);
  return {prune, check_layout(kOp, layout)};
}

}  // namespace sdgp
