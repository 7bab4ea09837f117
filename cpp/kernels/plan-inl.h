// SPDX-License-Identifier: BSD-3-Clause
//
// Divides one call of prune_nm into units and chooses how groups reach the lanes. The plan depends only on the
// arguments. No data is moved here.
#pragma once

#include "args.h"
#include "lanes-inl.h"
#include "select_nm-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kUnitElements = 32768;  // about 0.1 ms: long enough for a thread, short compared with a gradient

SDGP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SDGP_INLINE int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }
SDGP_INLINE int64_t at_least(int64_t a, int64_t limit) { return a > limit ? a : limit; }

// Three ways to fill a tile. The choice depends on what is contiguous in memory:
//   rows    consecutive rows, the same group of each (NCHW pruned along C): vector j is one load.
//   groups  consecutive groups of one row (channels_last, or the last dimension): kM loads, then a transpose.
//   staged  neither fills a vector: pieces of either kind are copied side by side into a buffer, which tiles read.
enum class Layout { kRows, kGroups, kStaged };

// A row has `full` full groups and possibly a shorter last group.
struct Plan {
  Layout layout;
  int64_t rows;        // all positions of the other dimensions
  int64_t groups;      // per row
  int64_t row_groups;  // per row of the larger tensor that these rows belong to
  int64_t full;
  int64_t inner;     // positions along the innermost of the other dimensions
  int64_t chunks;    // per `inner` (kRows) or per row (kGroups)
  bool rows_inside;  // in the output, rows are closer together than the elements of a group
  int64_t units;
  Pruning mixed;  // the settings with a mixed seed (Note [Random numbers])
};

inline Plan make_plan(const PruneArgs& args, int64_t lanes) {
  Plan plan{};
  plan.mixed = with_mixed_seed(args.pruning);
  plan.rows = 1;
  for (int d = 0; d < args.ndim; ++d) plan.rows *= args.dims[d].size;
  plan.groups = ceil_div(args.size, args.pruning.m);
  plan.row_groups = args.row_groups ? args.row_groups : plan.groups;
  plan.full = args.size / args.pruning.m;
  const Dim* last = args.ndim ? &args.dims[args.ndim - 1] : nullptr;
  plan.inner = last ? last->size : 1;
  plan.rows_inside = last && last->out_stride < args.out_stride;
  const bool power_of_two = (args.pruning.m & (args.pruning.m - 1)) == 0;
  if (last && last->in_stride == 1 && last->out_stride == 1 && last->size >= lanes) {
    plan.layout = Layout::kRows;
    plan.chunks = 1 + plan.inner * args.pruning.m / kUnitElements;
    if (plan.inner / plan.chunks < lanes) plan.chunks = 1;
    plan.units = plan.rows / plan.inner * plan.groups * plan.chunks;
  } else if (args.in_stride == 1 && args.out_stride == 1 && power_of_two && plan.full >= lanes) {
    plan.layout = Layout::kGroups;
    plan.chunks = 1 + plan.full * args.pruning.m / kUnitElements;
    if (plan.full / plan.chunks < lanes) plan.chunks = 1;
    plan.units = plan.rows * plan.chunks;
  } else {
    plan.layout = Layout::kStaged;
    plan.units = ceil_div(plan.rows * plan.groups * args.pruning.m, kUnitElements);
  }
  return plan;
}

// Merges dimensions that step through memory together, whatever the factors of rescale are. Drops dimensions of size 1.
inline void merge_dims(PruneArgs& args) {
  int kept = 0;
  for (int d = 0; d < args.ndim; ++d) {
    const Dim inner = args.dims[d];
    Dim* const outer = kept ? &args.dims[kept - 1] : nullptr;
    if (inner.size == 1) continue;
    if (outer && outer->in_stride == inner.size * inner.in_stride &&
        outer->out_stride == inner.size * inner.out_stride && outer->row_step == inner.size * inner.row_step) {
      *outer = {outer->size * inner.size, inner.in_stride, inner.out_stride, inner.row_step, false};
    } else {
      args.dims[kept++] = inner;
    }
  }
  args.ndim = kept;
}

// Merges rows that are contiguous and consist of whole groups into one long row. The group index is row-major over
// (row, group), so it does not change.
inline void flatten_rows(PruneArgs& args) {
  merge_dims(args);
  while (args.ndim > 0) {
    const Dim& last = args.dims[args.ndim - 1];
    const bool consecutive = last.in_stride == args.size && last.out_stride == args.size && last.row_step == 1;
    if (args.in_stride != 1 || args.out_stride != 1 || !consecutive || args.size % args.pruning.m != 0) return;
    if (args.row_groups != 0 && args.row_groups != args.size / args.pruning.m) return;
    args.row_groups *= last.size;
    for (int d = 0; d + 1 < args.ndim; ++d) args.dims[d].row_step /= last.size;
    args.size *= last.size;
    --args.ndim;
  }
}

struct Row {
  int64_t in = 0;  // element offset of the row's first element
  int64_t out = 0;
  uint64_t index = 0;  // logical row index
};

// Returns the `position`-th row in memory order, over the first `ndim` dimensions.
inline Row find_row(const PruneArgs& args, int ndim, int64_t position) {
  Row row;
  for (int d = ndim - 1; d >= 0; --d) {
    const Dim& dim = args.dims[d];
    const int64_t at = position % dim.size;
    position /= dim.size;
    row.in += at * dim.in_stride;
    row.out += at * dim.out_stride;
    row.index += static_cast<uint64_t>(at * dim.row_step);
  }
  return row;
}

}  // namespace sdgp::SDGP_ISA
