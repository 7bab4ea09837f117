// SPDX-License-Identifier: BSD-3-Clause
//
// _pack_24's arguments, checked alike on every device.
#pragma once

#include "../../cuda/kernels.h"
#include "prune_args.h"

namespace sdgp {

struct LayoutName {
  const char* name;
  cuda::Metadata layout;
};
inline constexpr LayoutName kLayouts[] = {{"cusparselt_sm80", cuda::Metadata::kCusparseLtSm80},
                                          {"cusparselt_sm90", cuda::Metadata::kCusparseLtSm90},
                                          {"cutlass_sm80", cuda::Metadata::kCutlassSm80}};

struct PackCall {
  PruneCall prune;
  cuda::Metadata layout;
};

// Patterns whose groups are 2:4 in every quad.
constexpr bool fits_24(int64_t n, int64_t m) { return (n <= 2 && m % 4 == 0) || (n == 1 && m == 2); }

inline PackCall validate_pack(const Tensor& input, int64_t n, int64_t m, std::string_view method,
                              const std::optional<Tensor>& seed, std::string_view layout) {
  constexpr const char* kOp = "_pack_24";
  const PruneCall prune = validate_prune(kOp, input, n, m, -1, method, seed);
  check(input.dim() == 2, kOp, ": expected a matrix, got ", name_of_shape(input));
  check(prune.dtype == DType::kFloat16 || prune.dtype == DType::kBFloat16, kOp, ": expected float16 or bfloat16, got ",
        name_of_dtype(dtype_of(input)));
  check(fits_24(n, m), kOp, ": expected n <= 2 and m a multiple of 4, or 1:2, got ", n, ":", m);
  for (const LayoutName& known : kLayouts) {
    if (layout == known.name) return {prune, known.layout};
  }
  check(false, kOp, ": expected layout to be cusparselt_sm80, cusparselt_sm90 or cutlass_sm80, got \"", layout, "\"");
  __builtin_unreachable();
}

}  // namespace sdgp
