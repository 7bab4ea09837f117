// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm over whole tensors: loads groups into lanes, prunes a tile and stores it. Compiled once per instruction set.
// select_nm-inl.h prunes inside a group; rescale-inl.h computes the sums of rescale.
//
// A tile is kLanes groups, one per lane. Layout (plan-inl.h) says how it is filled. Some methods prune several tiles
// together (kTiles); if fewer are left, the last one is pruned again.
#pragma once

#include "prune_staged-inl.h"
#include "select_nm-inl.h"

namespace sdgp::SDGP_ISA {

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
    // A true lane is -1, so the comparison adds the carry.
    group.hi = hi + static_cast<U>(first >> 32) - (Unsigned<C>)(group.lo < base);
    group.length = splat(static_cast<U>(length));
    group.padded = padded;
    return group;
  }
};

// One compiled kernel: element type, method and group size.
template <class C, Method kMethod, int kM>
struct PruneKernel {
  using T = typename C::T;
  static constexpr int kL = kLanes<typename C::E>;
  static constexpr int kT = kTiles<kMethod>;

  static void run(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    switch (plan.layout) {
      case Layout::kRows: return run_rows(args, plan, begin, end);
      case Layout::kGroups: return run_groups(args, plan, begin, end);
      case Layout::kStaged: {
        const int64_t pairs = plan.rows * plan.groups;
        return stage(args, plan, Pieces(args, plan, 0, pairs * begin / plan.units, pairs * end / plan.units));
      }
    }
  }

 private:
  // Large tiles and rare paths share this copy of prune_tiles. The call costs 3 to 5 % of the time at m = 32 and 64,
  // and up to 13 % at m = 16. Inlining it everywhere would make the library a sixth larger, and its build a third
  // longer.
  __attribute__((noinline)) static void prune_shared(Elem<C> (*x)[kM], const Pruning& mixed,
                                                     const LaneGroups<C>* groups) {
    prune_tiles<C, kMethod, kM>(x, mixed, groups);
  }

  static SDGP_INLINE void prune(Elem<C> (*x)[kM], const Pruning& mixed, const LaneGroups<C>* groups) {
    if constexpr (kM < (kVectorBytes == 64 ? 64 : 32)) {
      prune_tiles<C, kMethod, kM>(x, mixed, groups);
    } else {
      prune_shared(x, mixed, groups);
    }
  }

  static void run_rows(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    const Dim& inner = args.dims[args.ndim - 1];
    const int64_t m = args.pruning.m;
    const LaneOffsets<C> offsets(
        [&](int lane) { return static_cast<uint64_t>(lane * inner.row_step * plan.row_groups); });
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % plan.chunks;
      const int64_t group = unit / plan.chunks % plan.groups;
      const Row row = find_row(args, args.ndim - 1, unit / plan.chunks / plan.groups);
      const int64_t first = group * m;
      const int64_t length = args.size - first < m ? args.size - first : m;
      const T* in = static_cast<const T*>(args.in) + row.in + first * args.in_stride;
      T* out = static_cast<T*>(args.out) + row.out + first * args.out_stride;
      const int64_t stop = plan.inner * (chunk + 1) / plan.chunks;
      // The last tiles of a chunk move back to stay inside the chunk. What they prune twice gets the same result.
      for (int64_t at = plan.inner * chunk / plan.chunks; at < stop; at += kT * kL) {
        Elem<C> x[kT][kM];
        LaneGroups<C> groups[kT];
        int64_t p[kT];
        for (int t = 0; t < kT; ++t) {
          p[t] = at_most(at + t * kL, stop - kL);
          const uint64_t index =
              args.first_group +
              (row.index + static_cast<uint64_t>(p[t] * inner.row_step)) * static_cast<uint64_t>(plan.row_groups) +
              static_cast<uint64_t>(group);
          groups[t] = offsets.from(index, length, length < kM);
        }
        if constexpr (kMethod == Method::kUnstructured) {
          if (length == kM &&
              prune_along(in + p[0], args.in_stride, out + p[0], args.out_stride, plan.mixed, groups[0])) {
            continue;
          }
        }
        if (length == kM) {
          for (int t = 0; t < kT; ++t) {
            const T* from = in + p[t];
#pragma GCC unroll 64
            for (int j = 0; j < kM; ++j) x[t][j] = C::load(from + j * args.in_stride);
            // Prefetches the next group of these rows. Few rows give runs that are too short for the hardware
            // prefetcher.
#pragma GCC unroll 64
            for (int j = 0; j < kM; ++j) __builtin_prefetch(from + (kM + j) * args.in_stride);
          }
          prune(x, plan.mixed, groups);
          for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 64
            for (int j = 0; j < kM; ++j) C::store(out + p[t] + j * args.out_stride, x[t][j]);
          }
          continue;
        }
        for (int t = 0; t < kT; ++t) {
          for (int j = 0; j < kM; ++j) x[t][j] = j < length ? C::load(in + p[t] + j * args.in_stride) : Elem<C>{};
        }
        prune_shared(x, plan.mixed, groups);
        for (int t = 0; t < kT; ++t) {
          for (int j = 0; j < length; ++j) C::store(out + p[t] + j * args.out_stride, x[t][j]);
        }
      }
    }
  }

  // Returns the position in the tile of the group that load_groups puts into lane `lane`.
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

  // Prunes kL groups, one per lane, from memory to memory. Returns false if that is not possible.
  static SDGP_INLINE bool prune_along(const T* in, int64_t in_stride, T* out, int64_t out_stride, const Pruning& mixed,
                                      const LaneGroups<C>& groups) {
    if (mixed.scale) return false;
    const Key<C> start = UnstructuredTake<C>::start(mixed.seed, groups);
    return prune_unstructured_along<C, kM>(UnstructuredTake<C>(mixed), in, in_stride, out, out_stride, start);
  }

  // Prunes kL consecutive groups with elements in the lanes. Returns false if that is not possible.
  static SDGP_INLINE bool prune_across(const T* in, T* out, const Pruning& mixed, const LaneGroups<C>& groups) {
    if (mixed.scale) return false;
    const UnstructuredTake<C> of(mixed);
    const Key<C> starts = UnstructuredTake<C>::start(mixed.seed, groups);
    bool finite = true;
    for (int g = 0; g < kL; ++g) {
      finite &= prune_unstructured_across<C, kM>(of, in + g * kM, out + g * kM, starts[g]);
    }
    return finite;
  }

  static void run_groups(const PruneArgs& args, const Plan& plan, int64_t begin, int64_t end) {
    const LaneOffsets<C> offsets([](int lane) { return static_cast<uint64_t>(group_of_lane(lane)); });
    const bool tails = plan.full < plan.groups;
    int64_t tail_row = begin / plan.chunks;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % plan.chunks;
      const int64_t position = unit / plan.chunks;
      const Row row = find_row(args, args.ndim, position);
      const T* in = static_cast<const T*>(args.in) + row.in;
      T* out = static_cast<T*>(args.out) + row.out;
      const uint64_t first_group = args.first_group + row.index * static_cast<uint64_t>(plan.row_groups);
      const auto groups_from = [&](int64_t group) __attribute__((always_inline)) {
        return offsets.from(first_group + static_cast<uint64_t>(group), kM, false);
      };
      const int64_t stop = plan.full * (chunk + 1) / plan.chunks;
      for (int64_t at = plan.full * chunk / plan.chunks; at < stop; at += kT * kL) {
        if constexpr (kMethod == Method::kUnstructured && kM % kL == 0) {
          const int64_t first = at_most(at, stop - kL);
          if (prune_across(in + first * kM, out + first * kM, plan.mixed, groups_from(first))) continue;
        }
        Elem<C> x[kT][kM];
        LaneGroups<C> groups[kT];
        int64_t g[kT];
#pragma GCC unroll 2
        for (int t = 0; t < kT; ++t) {
          g[t] = at_most(at + t * kL, stop - kL);  // moves back as in run_rows
          load_groups(in + g[t] * kM, x[t]);
          groups[t] = groups_from(g[t]);
        }
        prune(x, plan.mixed, groups);
#pragma GCC unroll 2
        for (int t = 0; t < kT; ++t) store_groups(out + g[t] * kM, x[t]);
      }
      // The last unit of a row also prunes the row's tail. The tails of several rows fill a tile while they are in the
      // cache.
      const int64_t done = (unit + 1) / plan.chunks;
      if (tails && done > tail_row && (done - tail_row == kL || unit + 1 == end)) {
        stage(args, plan, Pieces(args, plan, plan.full, tail_row, done));
        tail_row = done;
      }
    }
  }

  static constexpr int kStaged = (kM <= 16 ? 8 : 4) * kL;  // lanes staged at a time, whole pairs of tiles

  // The inverse of group_of_lane.
  struct LaneOfGroup {
    uint8_t lane[kL];

    constexpr LaneOfGroup() : lane{} {
      for (int i = 0; i < kL; ++i) lane[group_of_lane(i)] = static_cast<uint8_t>(i);
    }
  };
  static constexpr LaneOfGroup kLaneOfGroup{};

  static void prune_staged(const Plan& plan, const T* in, T* out, int64_t count, const StagedGroups<C>& groups) {
    for (int64_t lane = 0; lane < count; lane += kT * kL) {
      Elem<C> x[kT][kM];
      LaneGroups<C> tiles[kT];
      for (int t = 0; t < kT; ++t) {
        const int64_t first = lane + t * kL;
        tiles[t] = groups.at(first);
        if (plan.rows_inside) {
          for (int j = 0; j < kM; ++j) x[t][j] = C::load(in + j * kStaged + first);
        } else {
          load_groups(in + first * kM, x[t]);
        }
      }
      prune_shared(x, plan.mixed, tiles);
      for (int t = 0; t < kT; ++t) {
        const int64_t first = lane + t * kL;
        if (plan.rows_inside) {
          for (int j = 0; j < kM; ++j) C::store(out + j * kStaged + first, x[t][j]);
        } else {
          store_groups(out + first * kM, x[t]);
        }
      }
    }
  }

  static void stage(const PruneArgs& args, const Plan& plan, const Pieces& pieces) {
    static_assert(kStaged <= StagedGroups<C>::kMost);
    run_staged<C>(args, plan, pieces, {kM, kStaged, traits(kMethod).draws, kLaneOfGroup.lane, &prune_staged});
  }
};

// The group sizes that kernels are compiled for. Groups of any other size are padded.
using GroupSizes = Values<2, 4, 8, 16, 32, 64>;
static_assert(contains(GroupSizes{}, kMaxGroupSize));

template <class C, Method kMethod>
void prune_range(const PruneArgs& args, int64_t begin, int64_t end) {
  const Plan plan = make_plan(args, kLanes<typename C::E>);
  visit_at_least(GroupSizes{}, args.pruning.m,
                 [&]<int kM>(Constant<kM>) { PruneKernel<C, kMethod, kM>::run(args, plan, begin, end); });
}

// The kernel of one call, for a method that prunes group by group.
struct Range {
  void (*run)(const PruneArgs&, int64_t begin, int64_t end);
  int64_t lanes;  // groups per tile
};

inline Range range_of(DType dtype, Method method) {
  return visit(DTypes{}, dtype, [&]<DType kDType>(Constant<kDType>) {
    return visit(GroupMethods{}, method, []<Method kMethod>(Constant<kMethod>) {
      using C = LanesFor<kDType, kMethod>;
      return Range{&prune_range<C, kMethod>, kLanes<typename C::E>};
    });
  });
}

}  // namespace sdgp::SDGP_ISA
