// SPDX-License-Identifier: BSD-3-Clause
//
// Packs the dense operand of a sparse product into blocks that fit the L1 cache. Each block is contiguous. Compiled
// once per instruction set.
#pragma once

#include "arithmetic-inl.h"
#include "plan-inl.h"
#include "table.h"

namespace sdgp::SDGP_ISA {

constexpr int kMaxPanel = 8;

// Returns the vectors of a panel: enough sums to hide the four cycles of an addition. Narrower panels leave room in the
// L1 cache for more reduction rows.
template <class A>
int64_t widest_panel() {
  return kVectorBytes == 64 ? at_most(A::kVectors * 4 * wide_loads_per_cycle(), kMaxPanel) : kMaxPanel;
}

// The bytes of the L1 cache for the dense operand. The rest is for data that is read once.
inline int64_t block_bytes() {
  const int64_t wanted = first_level_cache_bytes() / 3 * 2;
  return wanted < 49152 ? wanted : 49152;
}

static_assert(kMaxGroupSize * kMaxPanel * kVectorBytes <= 65536, "an offset into a block has 16 bits");

// The layout of the packed operand: [group][panel][block][tap][row][column of the panel], all of type Packed. Missing
// columns of the last panel are zero.
struct DensePlan {
  int64_t taps;
  int64_t panel;  // in vectors
  int64_t panels;
  int64_t width;  // in columns
  int64_t rows;   // reduction rows of a block, a multiple of m; the last block may have fewer
  int64_t blocks;
  int64_t tap_set;  // number of taps that share the L1 cache

  int64_t row_bytes(int64_t element_size) const { return width * element_size; }
  int64_t block_rows(const SpmmArgs& args, int64_t block) const {
    const int64_t left = args.size - block * rows;
    return left < rows ? left : rows;
  }
  int64_t panel_offset(const SpmmArgs& args, int64_t group, int64_t at) const {
    return (group * panels + at) * args.size * taps * width;
  }
  int64_t block_offset(int64_t block) const { return block * rows * taps * width; }
};

template <class A>
DensePlan make_dense_plan(const SpmmArgs& args) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename A::Packed));
  constexpr int64_t kColumns = A::kVectors * kLanes<typename A::Sum>;
  DensePlan plan{};
  plan.taps = args.height.kernel * args.width.kernel;
  const int64_t steps = ceil_div(args.cols, kColumns);
  plan.panels = ceil_div(steps, widest_panel<A>() / A::kVectors);
  const int64_t panel_steps = ceil_div(steps, plan.panels);
  plan.panel = panel_steps * A::kVectors;
  plan.panels = ceil_div(steps, panel_steps);
  plan.width = panel_steps * kColumns;
  const int64_t groups = ceil_div(args.size, args.pruning.m);
  const int64_t group_bytes = args.pruning.m * plan.width * kBytes;
  const int64_t cache = block_bytes();
  const int64_t fit = group_bytes < cache ? cache / group_bytes : 1;
  plan.blocks = ceil_div(groups, fit);
  plan.rows = ceil_div(groups, plan.blocks) * args.pruning.m;
  plan.blocks = ceil_div(args.size, plan.rows);
  plan.tap_set = cache / (plan.rows * plan.width * kBytes);
  if (plan.tap_set < 1) plan.tap_set = 1;
  if (plan.tap_set > plan.taps) plan.tap_set = plan.taps;
  return plan;
}

template <class C>
void pack_range(const SpmmArgs& args, int64_t begin, int64_t end) {
  using A = ArithmeticOf<C>;
  const DensePlan plan = make_dense_plan<A>(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % plan.blocks;
    const int64_t panel = unit / plan.blocks % plan.panels;
    const int64_t group = unit / plan.blocks / plan.panels;
    const int64_t first_col = panel * plan.width;
    const int64_t cols = args.cols - first_col < plan.width ? args.cols - first_col : plan.width;
    auto* to = static_cast<typename A::Packed*>(args.packed) + plan.panel_offset(args, group, panel) +
               plan.block_offset(block);
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      const int64_t at = tap / args.width.kernel * args.dense.height_stride +
                         tap % args.width.kernel * args.dense.width_stride + first_col * args.dense.col_stride;
      for (int64_t k = 0; k < plan.block_rows(args, block); ++k, to += plan.width) {
        const auto* from = static_cast<const typename C::T*>(args.dense.data) + at +
                           (group * args.size + block * plan.rows + k) * args.dense.row_stride;
        Packing<C>::columns(from, args.dense.col_stride, cols, to, plan.width);
      }
    }
  }
}

template <bool kPairs>
int64_t packed_bytes(const SpmmArgs& args) {
  return visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    using A = ArithmeticOf<ProductLanes<kDType, kPairs>>;
    const DensePlan plan = make_dense_plan<A>(args);
    return args.groups * plan.panels * args.size * plan.taps * plan.row_bytes(sizeof(typename A::Packed));
  });
}

template <bool kPairs>
int64_t pack_units(const SpmmArgs& args) {
  return visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    const DensePlan plan = make_dense_plan<ArithmeticOf<ProductLanes<kDType, kPairs>>>(args);
    return args.groups * plan.panels * plan.blocks;
  });
}

template <bool kPairs>
void pack(const SpmmArgs& args, int64_t begin, int64_t end) {
  visit(DTypes{}, args.dtype,
        [&]<DType kDType>(Constant<kDType>) { pack_range<ProductLanes<kDType, kPairs>>(args, begin, end); });
}

}  // namespace sdgp::SDGP_ISA
