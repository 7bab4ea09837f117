// SPDX-License-Identifier: BSD-3-Clause
//
// The unbiased methods mvue and unstructured. Compiled once per instruction set.
#pragma once

#include "random_numbers-inl.h"
#include "select_largest-inl.h"

namespace sdgp::SDGP_ISA {

// Note [mvue]
// Element i is kept with probability min(1, |x_i| / step); step makes these probabilities add up to n. An element with
// |x_i| >= step is kept unchanged. A systematic sample keeps some of the other elements and gives each the value
// sign(x_i) * step, which is x_i divided by its probability. To find step, take the mean over the n places. Elements of
// at least this mean take one place each and leave the sum. This repeats while the mean falls, at most n rounds. The
// sample: lay the elements below step end to end, each |x_i| long, and keep those that contain one of the points (u +
// k) * step. `left` enforces "at most n" if rounding would place one point too many.
//
// Both loops over a group are chains of dependent operations, whose latency is longer than the work. So two tiles are
// pruned together, and each uses the time in which the other waits.
template <class C>
struct MvueStep {
  using E = typename C::E;
  using K = typename C::K;

  Elem<C> step = splat(static_cast<E>(__builtin_inf()));
  Elem<C> rest{};  // the sum of the elements below step
  Key<C> places;   // the places that are left for them

  SDGP_INLINE explicit MvueStep(int n) : places(splat(static_cast<K>(n))) {}

  // Lowers step to the mean over the places. Returns the lanes in which it was higher.
  SDGP_INLINE Key<C> lower() {
    // If the mean underflows, kSmallest replaces it. `rest > 0` excludes the lanes where it is really 0.
    constexpr E kSmallest = sizeof(E) == 4 ? static_cast<E>(0x1p-149) : static_cast<E>(0x1p-1074);
    const Elem<C> mean = vmax(rest / __builtin_convertvector(places, Elem<C>), splat(kSmallest));
    const Key<C> higher = (places > 0) & (rest > 0) & (mean < step);
    step = higher ? mean : step;
    return higher;
  }

  SDGP_INLINE void restart(int n) {
    rest = Elem<C>{};
    places = splat(static_cast<K>(n));
  }

  SDGP_INLINE void add(Elem<C> magnitude) {
    const Key<C> above = magnitude >= step;
    rest = add_unless(above, rest, magnitude);
    places = decrement_if(above, places);
  }
};

template <class C>
struct MvueSample {
  using K = typename C::K;

  Elem<C> step;
  Elem<C> value;
  Elem<C> point;
  Elem<C> reached{};
  Key<C> left;

  SDGP_INLINE MvueSample(Elem<C> step, Elem<C> uniform, int n)
      : step(step), value(C::round(step)), point(uniform * step), left(splat(static_cast<K>(n))) {}

  // Returns what is kept of the next element.
  SDGP_INLINE Elem<C> take(Elem<C> x, Elem<C> magnitude) {
    const Key<C> above = magnitude >= step;
    reached = add_unless(above, reached, magnitude);
    const Key<C> hit = reached > point;
    point = add_if(hit, point, step);
    const Key<C> keep = (above | hit) & (left > 0);
    left = decrement_if(keep, left);
    const Key<C> sign = (Key<C>)x ^ (Key<C>)magnitude;
    return keep_if(keep, (Elem<C>)((Key<C>)vmax(magnitude, value) | sign));
  }
};

// The rare cases of one tile: multipliers instead of values, and lanes that are not finite.
template <class C, int kM>
SDGP_INLINE void finish_mvue(const Elem<C>* x, const Elem<C>* magnitude, Elem<C> step, Key<C> not_finite,
                             const Pruning& mixed, Elem<C>* out) {
  if (mixed.scale) [[unlikely]] {
    for (int j = 0; j < kM; ++j) {
      const Key<C> keep = out[j] != 0;
      const Elem<C> factor = magnitude[j] >= step ? splat<typename C::E>(1) : C::round(step / magnitude[j]);
      out[j] = keep_if(keep, factor);
    }
  }
  if (any(not_finite)) [[unlikely]] {
    Elem<C> fallback[kM];
    for (int j = 0; j < kM; ++j) fallback[j] = x[j];
    prune_magnitude<C, kM>(fallback, mixed);
    for (int j = 0; j < kM; ++j) out[j] = not_finite ? fallback[j] : out[j];
  }
}

template <class C, int kM>
SDGP_INLINE void prune_mvue(Elem<C> (*x)[kM], const Pruning& mixed, const LaneGroups<C>* groups) {
  const int n = mixed.n;
  Elem<C> magnitude[2][kM];
  MvueStep<C> a(n), b(n);
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
    magnitude[0][j] = (Elem<C>)magnitude_key<C>(x[0][j]);
    magnitude[1][j] = (Elem<C>)magnitude_key<C>(x[1][j]);
    a.rest += magnitude[0][j];
    b.rest += magnitude[1][j];
  }
  const Key<C> not_finite[2] = {a.rest - a.rest != 0, b.rest - b.rest != 0};
  for (int round = 1;; ++round) {
    const Key<C> lowered = a.lower() | b.lower();
    if (round == n || !any(lowered)) break;
    a.restart(n);
    b.restart(n);
#pragma GCC unroll 8
    for (int j = 0; j < kM; ++j) {
      a.add(magnitude[0][j]);
      b.add(magnitude[1][j]);
    }
  }
  MvueSample<C> of_a(a.step, RandomState<C>(mixed.seed, groups[0]).uniform(), n);
  MvueSample<C> of_b(b.step, RandomState<C>(mixed.seed, groups[1]).uniform(), n);
  Elem<C> out[2][kM];
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
    out[0][j] = of_a.take(x[0][j], magnitude[0][j]);
    out[1][j] = of_b.take(x[1][j], magnitude[1][j]);
  }
  const Elem<C> step[2] = {a.step, b.step};
  for (int t = 0; t < 2; ++t) {
    finish_mvue<C, kM>(x[t], magnitude[t], step[t], not_finite[t], mixed, out[t]);
    for (int j = 0; j < kM; ++j) x[t][j] = out[t][j];
  }
}

// Note [Unstructured]
// mvue with one step for the whole tensor. An element of at least step stays unchanged. Another one takes |x| / step of
// a place, in fixed point with kFraction bits: lay these shares end to end, and keep the elements that contain the end
// of a whole place, counted from a random start. Sums of integers are exact in any order. So lanes may be groups or
// elements.
constexpr int kFraction = 24;

template <class C>
struct UnstructuredTake {
  Elem<C> step;
  Elem<C> shares;  // per unit of magnitude

  SDGP_INLINE explicit UnstructuredTake(const Pruning& mixed)
      : step(splat(static_cast<typename C::E>(mixed.step))),
        shares(splat(static_cast<typename C::E>(1 << kFraction)) / step) {}

  static SDGP_INLINE Key<C> start(uint64_t mixed_seed, const LaneGroups<C>& groups) {
    return (Key<C>)(RandomState<C>(mixed_seed, groups).b >> (32 - kFraction));
  }

  SDGP_INLINE Key<C> share(Elem<C> magnitude) const {
    const Key<C> part = __builtin_convertvector(magnitude * shares, Key<C>);
    return keep_if((Key<C>)(magnitude < step), part);
  }

  // Returns what is kept of x, if its share ends at `end`.
  SDGP_INLINE Elem<C> take(Elem<C> x, Elem<C> magnitude, Key<C> share, Key<C> end) const {
    const Key<C> crosses = ((end - share) ^ end) >> kFraction;
    const Key<C> keep = (magnitude >= step) | (crosses != 0);
    const Key<C> sign = (Key<C>)x ^ (Key<C>)magnitude;
    return keep_if(keep, (Elem<C>)((Key<C>)vmax(magnitude, step) | sign));
  }
};

template <class C, int kM>
SDGP_INLINE void prune_unstructured(Elem<C>* x, const Pruning& mixed, const LaneGroups<C>& groups) {
  const UnstructuredTake<C> of(mixed);
  Elem<C> magnitude[kM];
  Elem<C> out[kM];
  Key<C> broken{};
  Key<C> end = UnstructuredTake<C>::start(mixed.seed, groups);
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
    magnitude[j] = (Elem<C>)magnitude_key<C>(x[j]);
    broken |= magnitude[j] - magnitude[j] != 0;
    const Key<C> share = of.share(magnitude[j]);
    end += share;
    out[j] = of.take(x[j], magnitude[j], share, end);
  }
  finish_mvue<C, kM>(x, magnitude, of.step, broken, mixed, out);
  for (int j = 0; j < kM; ++j) x[j] = out[j];
}

// The same for kM vectors of memory, `in_stride` and `out_stride` elements apart. Nothing is kept in between, so this
// is faster than arrays of vectors, which would be on the stack. Returns whether all elements are finite; if not, the
// result is wrong.
template <class C, int kM>
SDGP_INLINE bool prune_unstructured_along(const UnstructuredTake<C>& of, const typename C::T* in, int64_t in_stride,
                                          typename C::T* out, int64_t out_stride, Key<C> end) {
  Key<C> broken{};
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
    const Elem<C> x = C::load(in + j * in_stride);
    __builtin_prefetch(in + (kM + j) * in_stride);  // the next group
    const auto magnitude = (Elem<C>)magnitude_key<C>(x);
    const Key<C> share = of.share(magnitude);
    end += share;
    C::store(out + j * out_stride, of.take(x, magnitude, share, end));
    broken |= magnitude - magnitude != 0;
  }
  return !any(broken);
}

// The same for one group of consecutive elements, which are in the lanes.
template <class C, int kM>
SDGP_INLINE bool prune_unstructured_across(const UnstructuredTake<C>& of, const typename C::T* in, typename C::T* out,
                                           typename C::K start) {
  constexpr int kL = kLanes<typename C::E>;
  static_assert(kM % kL == 0);
  Key<C> broken{};
  for (int j = 0; j < kM; j += kL) {
    const Elem<C> x = C::load(in + j);
    const auto magnitude = (Elem<C>)magnitude_key<C>(x);
    const Key<C> share = of.share(magnitude);
    const Key<C> end = prefix_sums<typename C::K>(share) + start;
    C::store(out + j, of.take(x, magnitude, share, end));
    start = end[kL - 1];
    broken |= magnitude - magnitude != 0;
  }
  return !any(broken);
}

}  // namespace sdgp::SDGP_ISA
