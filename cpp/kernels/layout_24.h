// SPDX-License-Identifier: BSD-3-Clause
//
// The operand of a 2:4 product as _pack_24 writes it: [kept values (rows, cols / 2)][metadata]. Here are its tile size,
// the known layouts of its metadata, and the patterns that it supports.
#pragma once

#include "pruning.h"

namespace sdgp {

constexpr int kTileRows = 128;  // an operand consists of whole tiles
constexpr int kTileCols = 64;

enum class Layout24 { kCusparseLtSm80, kCusparseLtSm90, kCutlassSm80 };  // Note [Metadata layouts]

struct Layout24Name {
  Layout24 value;
  const char* name;
};
inline constexpr Layout24Name kLayouts24[] = {{Layout24::kCusparseLtSm80, "cusparselt_sm80"},
                                              {Layout24::kCusparseLtSm90, "cusparselt_sm90"},
                                              {Layout24::kCutlassSm80, "cutlass_sm80"}};

// Returns whether every n:m group is also 2:4 in each four consecutive elements.
constexpr bool fits_24(int n, int m) { return (n <= 2 && m % 4 == 0) || (n == 1 && m == 2); }

// The element types that _pack_24 supports.
using PackedDTypes = Values<DType::kFloat16, DType::kBFloat16>;

// The group sizes that are pruned and packed in one pass.
using PackedSizes = Values<2, 4, 8, 16, 32>;

}  // namespace sdgp
