// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm over whole tensors: brings groups into lanes, prunes a tile, writes it back. Compiled once per instruction
// set; not in here: what happens inside a group (select_nm-inl.h) and the sums of rescale (rescale-inl.h).
//
// A tile is kLanes groups of one size. Three ways to fill it, by where memory is consecutive:
//   rows    consecutive rows, the same group of each (NCHW pruned along C): vector j is one load.
//   groups  consecutive groups of one row (channels_last, or the last dimension): kM loads, then a transpose.
//   gather  any lanes: tails, short rows, other strides. Scalar loads; every shape works, none is fast.
#pragma once

#include "kernels.h"
#include "select_nm-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kUnitElements = 32768;  // about 1/10 ms of work: ample for a thread, small beside a layer's gradient

SDGP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Layout { kRows, kGroups, kGather };

// How the work of one call is cut. Groups of a row are `full` ones and perhaps a shorter last.
struct Plan {
  Layout layout;
  int64_t rows;    // all positions of the other dimensions
  int64_t groups;  // per row
  int64_t full;
  int64_t inner;   // kRows: positions along the innermost dimension
  int64_t chunks;  // kRows: pieces of `inner`; kGroups: pieces of a row; kGather: pieces of rows x groups
  int64_t units;
};

inline Plan make_plan(const PruneArgs& args, int64_t lanes) {
  Plan plan{};
  plan.rows = 1;
  for (int d = 0; d < args.ndim; ++d) plan.rows *= args.dims[d].size;
  plan.groups = ceil_div(args.size, args.m);
  plan.full = args.size / args.m;
  const Dim* last = args.ndim ? &args.dims[args.ndim - 1] : nullptr;
  const bool power_of_two = (args.m & (args.m - 1)) == 0;
  if (last && last->in_stride == 1 && last->out_stride == 1 && last->size >= lanes) {
    plan.layout = Layout::kRows;
    plan.inner = last->size;
    plan.chunks = 1 + plan.inner * args.m / kUnitElements;
    if (plan.inner / plan.chunks < lanes) plan.chunks = 1;
    plan.units = plan.rows / plan.inner * plan.groups * plan.chunks;
  } else if (args.in_stride == 1 && args.out_stride == 1 && power_of_two && plan.full >= lanes) {
    plan.layout = Layout::kGroups;
    plan.chunks = 1 + plan.full * args.m / kUnitElements;
    if (plan.full / plan.chunks < lanes) plan.chunks = 1;
    plan.units = plan.rows * plan.chunks;
  } else {
    plan.layout = Layout::kGather;
    plan.chunks = ceil_div(plan.rows * plan.groups * args.m, kUnitElements);
    plan.units = plan.chunks;
  }
  return plan;
}

// Rows that follow each other in memory, each a whole number of groups, are one long row: the group index, row-major
// over (row, group), stays the same.
inline void flatten_rows(PruneArgs& args) {
  while (args.ndim > 0) {
    const Dim& last = args.dims[args.ndim - 1];
    const bool consecutive = last.in_stride == args.size && last.out_stride == args.size && last.row_step == 1;
    if (args.in_stride != 1 || args.out_stride != 1 || !consecutive || args.size % args.m != 0) return;
    for (int d = 0; d + 1 < args.ndim; ++d) args.dims[d].row_step /= last.size;
    args.size *= last.size;
    --args.ndim;
  }
}

struct Row {
  int64_t in = 0;  // element offset of its first element
  int64_t out = 0;
  uint64_t index = 0;  // logical
};

// The `position`-th row in memory order, over the first `ndim` dimensions.
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

template <class C>
struct LaneOffsets {
  Unsigned<C> lo;
  Unsigned<C> hi;

  template <class Offset>
  explicit LaneOffsets(Offset offset) {
    typename C::U low[kLanes<typename C::E>];
    typename C::U high[kLanes<typename C::E>];
    for (int lane = 0; lane < kLanes<typename C::E>; ++lane) {
      const uint64_t at = offset(lane);
      low[lane] = static_cast<typename C::U>(at & 0xffffffffu);
      high[lane] = static_cast<typename C::U>(at >> 32);
    }
    lo = load_bits<Unsigned<C>>(low);
    hi = load_bits<Unsigned<C>>(high);
  }

  SDGP_INLINE LaneGroups<C> from(uint64_t first, int64_t length, bool padded) const {
    using U = typename C::U;
    LaneGroups<C> group;
    const U base = static_cast<U>(first & 0xffffffffu);
    group.lo = word<C>(lo + base);
    group.hi = hi + static_cast<U>(first >> 32) - (Unsigned<C>)(group.lo < base);  // a true lane is -1: the carry
    group.length = splat(static_cast<U>(length));
    group.padded = padded;
    return group;
  }
};

// One compiled kernel: element type, method, group size.
template <class C, Method kMethod, int kM>
struct PruneKernel {
  using T = typename C::T;
  static constexpr int kL = kLanes<typename C::E>;

  static void run(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    switch (plan.layout) {
      case Layout::kRows: return run_rows(args, plan, begin, end);
      case Layout::kGroups: return run_groups(args, plan, begin, end);
      case Layout::kGather: {
        const int64_t total = plan.rows * plan.groups;
        return run_gather(args, plan, total * begin / plan.units, total * end / plan.units,
                          [&](int64_t i) { return Pair{i / plan.groups, i % plan.groups}; });
      }
    }
  }

 private:
  struct Pair {
    int64_t row;
    int64_t group;
  };

  // The paths that are not worth their own copy of the tile's code.
  __attribute__((noinline)) static void prune_slow(Elem<C>* x, const PruneArgs& args, const LaneGroups<C>& group) {
    prune_tile<C, kMethod, kM>(x, args, group);
  }

  static void run_rows(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    const Dim& inner = args.dims[args.ndim - 1];
    const LaneOffsets<C> offsets([&](int lane) { return static_cast<uint64_t>(lane * inner.row_step * plan.groups); });
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % plan.chunks;
      const int64_t group = unit / plan.chunks % plan.groups;
      const Row row = find_row(args, args.ndim - 1, unit / plan.chunks / plan.groups);
      const int64_t first = group * args.m;
      const int64_t length = args.size - first < args.m ? args.size - first : args.m;
      const T* in = static_cast<const T*>(args.in) + row.in + first * args.in_stride;
      T* out = static_cast<T*>(args.out) + row.out + first * args.out_stride;
      const int64_t stop = plan.inner * (chunk + 1) / plan.chunks;
      // The last tile of a chunk steps back to stay inside it; what it prunes twice comes out the same.
      for (int64_t at = plan.inner * chunk / plan.chunks; at < stop; at += kL) {
        const int64_t p = at + kL <= stop ? at : stop - kL;
        const uint64_t index =
            args.first_group +
            (row.index + static_cast<uint64_t>(p * inner.row_step)) * static_cast<uint64_t>(plan.groups) +
            static_cast<uint64_t>(group);
        Elem<C> x[kM];
        if (length == kM) {
#pragma GCC unroll 64
          for (int j = 0; j < kM; ++j) x[j] = C::load(in + p + j * args.in_stride);
          prune_tile<C, kMethod, kM>(x, args, offsets.from(index, kM, false));
#pragma GCC unroll 64
          for (int j = 0; j < kM; ++j) C::store(out + p + j * args.out_stride, x[j]);
        } else {
          for (int j = 0; j < kM; ++j) x[j] = j < length ? C::load(in + p + j * args.in_stride) : Elem<C>{};
          prune_slow(x, args, offsets.from(index, length, true));
          for (int j = 0; j < length; ++j) C::store(out + p + j * args.out_stride, x[j]);
        }
      }
    }
  }

  // Lane that the group at position `group` of a tile lands in, as its inverse: the group of each lane.
  static constexpr int group_of_lane(int lane) { return kM <= kL ? (lane % kM) * (kL / kM) + lane / kM : lane; }

  static SDGP_INLINE void load_groups(const T* in, Elem<C>* x) {
    using E = typename C::E;
    if constexpr (kM <= kL) {
#pragma GCC unroll 64
      for (int j = 0; j < kM; ++j) x[j] = C::load(in + j * kL);
      transpose<E, kM>(x);
    } else {
      for (int block = 0; block < kM; block += kL) {
#pragma GCC unroll 64
        for (int lane = 0; lane < kL; ++lane) x[block + lane] = C::load(in + lane * kM + block);
        transpose<E, kL>(x + block);
      }
    }
  }

  static SDGP_INLINE void store_groups(T* out, Elem<C>* x) {
    using E = typename C::E;
    if constexpr (kM <= kL) {
      transpose<E, kM>(x);
#pragma GCC unroll 64
      for (int j = 0; j < kM; ++j) C::store(out + j * kL, x[j]);
    } else {
      for (int block = 0; block < kM; block += kL) {
        transpose<E, kL>(x + block);
#pragma GCC unroll 64
        for (int lane = 0; lane < kL; ++lane) C::store(out + lane * kM + block, x[block + lane]);
      }
    }
  }

  static void run_groups(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    const LaneOffsets<C> offsets([](int lane) { return static_cast<uint64_t>(group_of_lane(lane)); });
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % plan.chunks;
      const int64_t position = unit / plan.chunks;
      const Row row = find_row(args, args.ndim, position);
      const T* in = static_cast<const T*>(args.in) + row.in;
      T* out = static_cast<T*>(args.out) + row.out;
      const int64_t stop = plan.full * (chunk + 1) / plan.chunks;
      for (int64_t at = plan.full * chunk / plan.chunks; at < stop; at += kL) {
        const int64_t g = at + kL <= stop ? at : stop - kL;  // steps back as in run_rows
        Elem<C> x[kM];
        load_groups(in + g * kM, x);
        const uint64_t index =
            args.first_group + row.index * static_cast<uint64_t>(plan.groups) + static_cast<uint64_t>(g);
        prune_tile<C, kMethod, kM>(x, args, offsets.from(index, kM, false));
        store_groups(out + g * kM, x);
      }
      if (chunk + 1 == plan.chunks && plan.full < plan.groups) {
        run_gather(args, plan, 0, 1, [&](int64_t) { return Pair{position, plan.full}; });
      }
    }
  }

  template <class At>
  static void run_gather(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end, At at) {
    for (int64_t i = begin; i < end; i += kL) {
      const int count = end - i < kL ? static_cast<int>(end - i) : kL;
      const T* in[kL];
      T* out[kL];
      int64_t length[kL] = {};
      uint64_t index[kL] = {};
      for (int lane = 0; lane < count; ++lane) {
        const Pair pair = at(i + lane);
        const Row row = find_row(args, args.ndim, pair.row);
        const int64_t first = pair.group * args.m;
        length[lane] = args.size - first < args.m ? args.size - first : args.m;
        in[lane] = static_cast<const T*>(args.in) + row.in + first * args.in_stride;
        out[lane] = static_cast<T*>(args.out) + row.out + first * args.out_stride;
        index[lane] =
            args.first_group + row.index * static_cast<uint64_t>(plan.groups) + static_cast<uint64_t>(pair.group);
      }
      Elem<C> x[kM];
      for (int j = 0; j < kM; ++j) {
        T lanes[kL] = {};
        for (int lane = 0; lane < count; ++lane) {
          if (j < length[lane]) lanes[lane] = in[lane][j * args.in_stride];
        }
        x[j] = C::load(lanes);
      }
      LaneGroups<C> group = LaneOffsets<C>([&](int lane) { return index[lane]; }).from(0, 0, true);
      typename C::U lengths[kL];
      for (int lane = 0; lane < kL; ++lane) lengths[lane] = static_cast<typename C::U>(length[lane]);
      group.length = load_bits<Unsigned<C>>(lengths);
      prune_slow(x, args, group);
      for (int j = 0; j < kM; ++j) {
        T lanes[kL];
        C::store(lanes, x[j]);
        for (int lane = 0; lane < count; ++lane) {
          if (j < length[lane]) out[lane][j * args.out_stride] = lanes[lane];
        }
      }
    }
  }
};

template <class C, Method kMethod>
void prune_compiled(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
  if (args.m <= 2) return PruneKernel<C, kMethod, 2>::run(args, plan, begin, end);
  if (args.m <= 4) return PruneKernel<C, kMethod, 4>::run(args, plan, begin, end);
  if (args.m <= 8) return PruneKernel<C, kMethod, 8>::run(args, plan, begin, end);
  if (args.m <= 16) return PruneKernel<C, kMethod, 16>::run(args, plan, begin, end);
  if (args.m <= 32) return PruneKernel<C, kMethod, 32>::run(args, plan, begin, end);
  return PruneKernel<C, kMethod, 64>::run(args, plan, begin, end);
}

template <class C, Method kMethod>
void prune_range(const PruneArgs& args, int64_t begin, int64_t end) {
  prune_compiled<C, kMethod>(args, make_plan(args, kLanes<typename C::E>), begin, end);
}

using RangeFunction = void (*)(const PruneArgs&, int64_t, int64_t);

template <class C, class Magnitude = C>
RangeFunction range_function(Method method) {
  switch (method) {
    case Method::kMagnitude:
    case Method::kRescale: return &prune_range<Magnitude, Method::kMagnitude>;
    case Method::kRandom: return &prune_range<C, Method::kRandom>;
    case Method::kRescaleGroup: return &prune_range<C, Method::kRescaleGroup>;
    case Method::kMvue: return &prune_range<C, Method::kMvue>;
  }
  __builtin_unreachable();
}

inline RangeFunction range_function(const PruneArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32: return range_function<Float32>(args.method);
    case DType::kFloat64: return range_function<Float64>(args.method);
    case DType::kFloat16: return range_function<Float16, Bits16<0x3c00>>(args.method);
    case DType::kBFloat16: return range_function<BFloat16, Bits16<0x3f80>>(args.method);
  }
  __builtin_unreachable();
}

// Lanes of the tile that this call will use: 16-bit types have twice as many where no arithmetic is done on them.
inline int64_t tile_lanes(const PruneArgs& args) {
  const bool magnitude = args.method == Method::kMagnitude || args.method == Method::kRescale;
  switch (args.dtype) {
    case DType::kFloat32: return kLanes<float>;
    case DType::kFloat64: return kLanes<double>;
    case DType::kFloat16:
    case DType::kBFloat16: return magnitude ? kLanes<int16_t> : kLanes<float>;
  }
  __builtin_unreachable();
}

}  // namespace sdgp::SDGP_ISA
