// SPDX-License-Identifier: BSD-3-Clause
//
// rescale: prunes by magnitude, then multiplies each kept value by sum |x| / sum |kept|. The sums run over all
// dimensions that share a factor. The tensor is divided into blocks that hold whole sums and, if the shape allows, fit
// the L2 cache. Then pruning, summing and scaling cost one pass over memory, and no sum needs a second thread.
#pragma once

#include "prune_nm-inl.h"
#include "sums-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kBlockElements = 131072;  // 1 MiB of float32, input and output together
constexpr int64_t kNarrowest = 64;          // minimum number of columns of a block, if there are as many

// A block is some indices of the outermost dimension that has its own factors (the "samples") times some groups of the
// pruned dimension. Besides the pruned dimension, at most one dimension has its own factors.
struct BlockPlan {
  int sample_dim;  // -1 if there is none
  int64_t samples;
  int64_t sample_step;
  int64_t groups;
  int64_t group_step;
  int64_t blocks;
};

inline BlockPlan make_block_plan(const PruneArgs& args) {
  BlockPlan plan{};
  plan.sample_dim = -1;
  plan.samples = 1;
  int64_t per_sample = args.size;
  for (int d = 0; d < args.ndim; ++d) {
    if (args.dims[d].per_factor) {
      plan.sample_dim = d;
      plan.samples = args.dims[d].size;
    } else {
      per_sample *= args.dims[d].size;
    }
  }
  plan.groups = ceil_div(args.size, args.pruning.m);
  plan.group_step = plan.groups;
  const int64_t tile = range_of(args.dtype, Method::kMagnitude).lanes;
  // Small samples share a block. If samples are neighbors in memory, a narrow block would read only parts of cache
  // lines.
  const bool neighbors = plan.sample_dim >= 0 && args.dims[plan.sample_dim].out_stride == 1;
  plan.sample_step = at_least(kUnitElements / at_least(per_sample, 1), neighbors ? kNarrowest : 1);
  if (args.dim_per_factor && per_sample > kBlockElements) {
    // Narrow blocks, but wide enough that the groups of a row still fill a tile.
    const int64_t wanted = 1 + kBlockElements / (per_sample / plan.groups + 1);
    const int64_t pieces = plan.groups / at_least(wanted, args.in_stride == 1 ? tile : 1);
    plan.group_step = pieces > 1 ? ceil_div(plan.groups, pieces) : plan.groups;
  }
  plan.blocks = ceil_div(plan.samples, plan.sample_step) * ceil_div(plan.groups, plan.group_step);
  return plan;
}

struct Block {
  int ndim;
  Axis axes[kMaxDims + 2];

  void add(const Axis& axis) {
    // Axes are sorted by output stride, the smallest last. Axes of one element go to the front, where they do not
    // matter.
    int at = ndim++;
    for (; at > 0 && (axes[at - 1].out_stride < axis.out_stride || axis.size == 1); --at) axes[at] = axes[at - 1];
    axes[at] = axis;
  }

  // Calls slab(in offset, out offset, factor offset) for every position of the axes outside the three innermost ones.
  template <class Slab>
  SDGP_INLINE void for_each_slab(Slab slab) const {
    int64_t at[kMaxDims + 1] = {};
    int64_t in = 0;
    int64_t out = 0;
    int64_t factor = 0;
    for (;;) {
      slab(in, out, factor);
      int d = ndim - 4;
      for (; d >= 0; --d) {
        const Axis& axis = axes[d];
        in += axis.in_stride;
        out += axis.out_stride;
        factor += axis.factor_stride;
        if (++at[d] < axis.size) break;
        at[d] = 0;
        in -= axis.size * axis.in_stride;
        out -= axis.size * axis.out_stride;
        factor -= axis.size * axis.factor_stride;
      }
      if (d < 0) return;
    }
  }
};

template <class C>
struct Rescale {
  using T = typename C::T;
  using E = typename C::E;
  using Sums = FactorSums<C>;
  static constexpr int kL = Sums::kL;

  static void run(const PruneArgs& args, int64_t begin, int64_t end) {
    const BlockPlan plan = make_block_plan(args);
    const int64_t group_blocks = ceil_div(plan.groups, plan.group_step);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t sample = b / group_blocks * plan.sample_step;
      const int64_t group = b % group_blocks * plan.group_step;
      PruneArgs part = args;
      part.pruning.method = Method::kMagnitude;
      const int64_t first = group * args.pruning.m;
      part.size =
          args.size - first < plan.group_step * args.pruning.m ? args.size - first : plan.group_step * args.pruning.m;
      int64_t in = first * args.in_stride;
      int64_t out = first * args.out_stride;
      if (plan.sample_dim >= 0) {
        Dim& dim = part.dims[plan.sample_dim];
        in += sample * dim.in_stride;
        out += sample * dim.out_stride;
        dim.size = plan.samples - sample < plan.sample_step ? plan.samples - sample : plan.sample_step;
      }
      part.in = static_cast<const T*>(args.in) + in;
      part.out = static_cast<T*>(args.out) + out;
      run_block(part);
    }
  }

  static void run_block(PruneArgs& part) {
    Block block{};
    int64_t factors = 1;
    if (part.dim_per_factor) {
      block.add({part.size, part.in_stride, part.out_stride, 1});
      factors = part.size;
    } else {
      block.add({part.size, part.in_stride, part.out_stride, 0});
    }
    for (int d = 0; d < part.ndim; ++d) {
      const Dim& dim = part.dims[d];
      block.add({dim.size, dim.in_stride, dim.out_stride, dim.per_factor ? factors : 0});
    }
    for (int d = 0; d < part.ndim; ++d) {
      if (part.dims[d].per_factor) factors *= part.dims[d].size;
    }
    while (block.ndim < 3) block.add({1, 0, 0, 0});
    flatten_rows(part);

    const bool scale = part.pruning.scale;
    part.pruning.scale = false;
    E* all = new E[2 * static_cast<size_t>(factors + kL)]();
    E* kept = all + factors + kL;
    const Range magnitude = range_of(part.dtype, Method::kMagnitude);
    magnitude.run(part, 0, make_plan(part, magnitude.lanes).units);
    const Axis* const axes = block.axes + block.ndim - 3;
    const int64_t in_stride[3] = {axes[0].in_stride, axes[1].in_stride, axes[2].in_stride};
    const int64_t out_stride[3] = {axes[0].out_stride, axes[1].out_stride, axes[2].out_stride};
    block.for_each_slab([&](int64_t in_at, int64_t out_at, int64_t factor) {
      Sums::sum(static_cast<const T*>(part.in) + in_at, in_stride, axes, all + factor);
      Sums::sum(static_cast<const T*>(part.out) + out_at, out_stride, axes, kept + factor);
    });
    for (int64_t i = 0; i < factors; i += kL) {
      store_bits(all + i, Sums::ratio(load_bits<Elem<C>>(all + i), load_bits<Elem<C>>(kept + i)));
    }
    if (scale) {
      part.pruning.scale = true;
      magnitude.run(part, 0, make_plan(part, magnitude.lanes).units);
    }
    block.for_each_slab([&](int64_t, int64_t out_at, int64_t factor) {
      Sums::multiply(static_cast<T*>(part.out) + out_at, out_stride, axes, all + factor);
    });
    delete[] all;
  }
};

inline void rescale_range(const PruneArgs& args, int64_t begin, int64_t end) {
  visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) { Rescale<LanesOf<kDType>>::run(args, begin, end); });
}

}  // namespace sdgp::SDGP_ISA
