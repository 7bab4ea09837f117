// SPDX-License-Identifier: BSD-3-Clause
//
// rescale: magnitude, then each kept value times sum |x| / sum |kept|, the sums over all dimensions that share a
// factor. The tensor is cut into blocks that hold whole sums and, where the shape allows, fit the second-level cache:
// prune, sum and scale then cost one trip to memory, and a block's sums need no other thread.
#pragma once

#include "prune_nm-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kPartialSum = 1024;       // rows summed before they join the total: keeps the rounding error small
constexpr int64_t kBlockElements = 131072;  // 1 MiB of float32, input and output together

// Blocks: some indices of the outermost dimension that has factors of its own ("samples": at most one such dimension
// besides the pruned one), times some groups of the pruned one.
struct BlockPlan {
  int sample_dim;  // -1: none
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
  plan.groups = ceil_div(args.size, args.m);
  plan.group_step = plan.groups;
  plan.sample_step = 1;
  if (!args.dim_per_factor) {
    plan.sample_step = 1 + kBlockElements / (per_sample + 1);
  } else if (per_sample > kBlockElements) {
    // Narrow blocks, but not so narrow that a row's groups no longer fill a tile.
    const int64_t per_group = per_sample / plan.groups + 1;
    const int64_t least = args.in_stride == 1 ? tile_lanes(args) : 1;
    const int64_t wanted = 1 + kBlockElements / per_group;
    const int64_t pieces = plan.groups / (wanted > least ? wanted : least);
    plan.group_step = pieces > 1 ? ceil_div(plan.groups, pieces) : plan.groups;
  }
  plan.blocks = ceil_div(plan.samples, plan.sample_step) * ceil_div(plan.groups, plan.group_step);
  return plan;
}

// A block's dimensions, the pruned one among them, for the sums.
struct Axis {
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t factor_stride;  // 0: shares its factor
};

struct Block {
  int ndim;
  Axis axes[kMaxDims + 2];

  void add(const Axis& axis) {
    // Kept sorted by output stride, the smallest last.
    int at = ndim++;
    for (; at > 0 && axes[at - 1].out_stride < axis.out_stride; --at) axes[at] = axes[at - 1];
    axes[at] = axis;
  }

  // Calls sheet(in offset, out offset, factor offset) for each pair of innermost axes.
  template <class Sheet>
  SDGP_INLINE void for_each_sheet(Sheet sheet) const {
    int64_t at[kMaxDims + 1] = {};
    int64_t in = 0;
    int64_t out = 0;
    int64_t factor = 0;
    for (;;) {
      sheet(in, out, factor);
      int d = ndim - 3;
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

// The sums run in vectors of E: float, or double for double.
template <class C>
struct Rescale {
  using T = typename C::T;
  using E = typename C::E;
  static constexpr int kL = kLanes<E>;

  // Up to kL elements, the lanes beyond `count` zero.
  static Elem<C> load_some(const T* p, int64_t stride, int64_t count) {
    T lanes[kL] = {};
    for (int64_t i = 0; i < count && i < kL; ++i) lanes[i] = p[i * stride];
    return C::load(lanes);
  }

  static void store_some(T* p, int64_t stride, int64_t count, Elem<C> v) {
    T lanes[kL];
    C::store(lanes, v);
    for (int64_t i = 0; i < count && i < kL; ++i) p[i * stride] = lanes[i];
  }

  // True in the last `count` lanes.
  static SDGP_INLINE Key<C> last_lanes(int64_t count) {
    Key<C> lane{};
    for (int i = 0; i < kL; ++i) lane[i] = static_cast<typename C::K>(i);
    return lane >= static_cast<typename C::K>(kL - count);
  }

  static SDGP_INLINE Elem<C> absolute(Elem<C> x) { return (Elem<C>)magnitude_key<C>(x); }

  static SDGP_INLINE Elem<C> ratio(Elem<C> all, Elem<C> kept) { return kept == 0 ? splat<E>(1) : all / kept; }

  // A pruned place stays 0 where its factor is inf or NaN.
  static SDGP_INLINE Elem<C> times(Elem<C> x, Elem<C> factor) { return keep_if(x != 0, x * factor); }

  static E sum_line(const T* p, const int64_t stride, int64_t size) {
    Elem<C> sum[2] = {};  // two chains hide the latency of the additions
    int64_t i = 0;
    if (stride == 1) {
      for (; i + 2 * kL <= size; i += 2 * kL) {
        sum[0] += absolute(C::load(p + i));
        sum[1] += absolute(C::load(p + i + kL));
      }
      if (i + kL <= size) {
        sum[0] += absolute(C::load(p + i));
        i += kL;
      }
      if (i < size && size >= kL) {
        sum[1] += absolute(keep_if(last_lanes(size - i), C::load(p + size - kL)));
        i = size;
      }
    }
    for (; i < size; i += kL) sum[0] += absolute(load_some(p + i * stride, stride, size - i));
    return sum_lanes(sum[0] + sum[1]);
  }

  static void multiply_line(T* p, const int64_t stride, int64_t size, E factor) {
    const Elem<C> f = splat(factor);
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kL <= size; i += kL) C::store(p + i, times(C::load(p + i), f));
      if (i < size && size >= kL) {
        const Elem<C> x = C::load(p + size - kL);
        C::store(p + size - kL, last_lanes(size - i) ? times(x, f) : x);
        return;
      }
    }
    for (; i < size; i += kL)
      store_some(p + i * stride, stride, size - i, times(load_some(p + i * stride, stride, size - i), f));
  }

  // Adds up kChains vectors of columns, one factor a column: `rows` rows, `row_stride` apart.
  template <int kChains>
  static SDGP_INLINE void sum_columns(const T* p, int64_t rows, int64_t row_stride, E* sums) {
    Elem<C> sum[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = load_bits<Elem<C>>(sums + c * kL);
    for (int64_t first = 0; first < rows; first += kPartialSum) {
      const int64_t last = first + kPartialSum < rows ? first + kPartialSum : rows;
      Elem<C> part[kChains] = {};
      for (int64_t r = first; r < last; ++r) {
        for (int c = 0; c < kChains; ++c) part[c] += absolute(C::load(p + r * row_stride + c * kL));
      }
      for (int c = 0; c < kChains; ++c) sum[c] += part[c];
    }
    for (int c = 0; c < kChains; ++c) store_bits(sums + c * kL, sum[c]);
  }

  // sums[f] += sum of |x| over what shares factor f, for one sheet.
  static void sum_sheet(const T* p, int64_t rows, int64_t row_stride, int64_t row_factor, int64_t size, int64_t stride,
                        int64_t factor_stride, E* sums) {
    if (factor_stride == 0) {
      for (int64_t r = 0; r < rows; ++r) sums[r * row_factor] += sum_line(p + r * row_stride, stride, size);
      return;
    }
    int64_t i = 0;
    if (stride == 1 && factor_stride == 1 && row_factor == 0) {
      for (; i + 4 * kL <= size; i += 4 * kL) sum_columns<4>(p + i, rows, row_stride, sums + i);
      for (; i + kL <= size; i += kL) sum_columns<1>(p + i, rows, row_stride, sums + i);
    }
    for (int64_t j = i; j < size; ++j) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const E x = absolute(load_some(p + r * row_stride + j * stride, 1, 1))[0];
        if (row_factor != 0) {
          sums[r * row_factor + j * factor_stride] += x;
        } else {
          total += x;
        }
      }
      if (row_factor == 0) sums[j * factor_stride] += static_cast<E>(total);
    }
  }

  static void multiply_sheet(T* p, int64_t rows, int64_t row_stride, int64_t row_factor, int64_t size, int64_t stride,
                             int64_t factor_stride, const E* factors) {
    for (int64_t r = 0; r < rows; ++r) {
      T* const y = p + r * row_stride;
      const E* const f = factors + r * row_factor;
      if (factor_stride == 0) {
        multiply_line(y, stride, size, *f);
        continue;
      }
      int64_t i = 0;
      if (stride == 1 && factor_stride == 1) {
        for (; i + kL <= size; i += kL) C::store(y + i, times(C::load(y + i), load_bits<Elem<C>>(f + i)));
      }
      for (; i < size; ++i) {
        store_some(y + i * stride, 1, 1, times(load_some(y + i * stride, 1, 1), splat(f[i * factor_stride])));
      }
    }
  }

  static void run(const PruneArgs& args, int64_t begin, int64_t end) {
    const BlockPlan plan = make_block_plan(args);
    const int64_t group_blocks = ceil_div(plan.groups, plan.group_step);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t sample = b / group_blocks * plan.sample_step;
      const int64_t group = b % group_blocks * plan.group_step;
      PruneArgs part = args;
      part.method = Method::kMagnitude;
      const int64_t first = group * args.m;
      part.size = args.size - first < plan.group_step * args.m ? args.size - first : plan.group_step * args.m;
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
    if (block.ndim < 2) block.add({1, INT64_MAX, INT64_MAX, 0});
    drop_single_dims(part);
    flatten_rows(part);

    const bool scale = part.scale;
    part.scale = false;
    E* all = new E[2 * static_cast<size_t>(factors + kL)]();
    E* kept = all + factors + kL;
    const RangeFunction prune = range_function(part);
    prune(part, 0, make_plan(part, tile_lanes(part)).units);
    const Axis& inner = block.axes[block.ndim - 1];
    const Axis& outer = block.axes[block.ndim - 2];
    block.for_each_sheet([&](int64_t in_at, int64_t out_at, int64_t factor) {
      sum_sheet(static_cast<const T*>(part.in) + in_at, outer.size, outer.in_stride, outer.factor_stride, inner.size,
                inner.in_stride, inner.factor_stride, all + factor);
      sum_sheet(static_cast<const T*>(part.out) + out_at, outer.size, outer.out_stride, outer.factor_stride, inner.size,
                inner.out_stride, inner.factor_stride, kept + factor);
    });
    for (int64_t i = 0; i < factors; i += kL) {
      store_bits(all + i, ratio(load_bits<Elem<C>>(all + i), load_bits<Elem<C>>(kept + i)));
    }
    if (scale) {
      part.scale = true;
      prune(part, 0, make_plan(part, tile_lanes(part)).units);
    }
    block.for_each_sheet([&](int64_t, int64_t out_at, int64_t factor) {
      multiply_sheet(static_cast<T*>(part.out) + out_at, outer.size, outer.out_stride, outer.factor_stride, inner.size,
                     inner.out_stride, inner.factor_stride, all + factor);
    });
    delete[] all;
  }

  static void drop_single_dims(PruneArgs& args) {
    int kept = 0;
    for (int d = 0; d < args.ndim; ++d) {
      if (args.dims[d].size != 1) args.dims[kept++] = args.dims[d];
    }
    args.ndim = kept;
  }
};

inline void rescale_range(const PruneArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return Rescale<Float32>::run(args, begin, end);
    case DType::kFloat64: return Rescale<Float64>::run(args, begin, end);
    case DType::kFloat16: return Rescale<Float16>::run(args, begin, end);
    case DType::kBFloat16: return Rescale<BFloat16>::run(args, begin, end);
  }
}

}  // namespace sdgp::SDGP_ISA
