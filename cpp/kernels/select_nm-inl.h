// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes inside a group, for a vector of groups at once: element j of every group is in vector x[j], one group per
// lane. kM is the compiled group size. A smaller group is padded with zeros at its end. This changes no result: a
// padding zero loses every tie to an element with a lower index, has no weight in a draw, and adds nothing to a sum.
#pragma once

#include "pruning.h"
#include "sorting_network.h"
#include "vec-inl.h"

namespace sdgp::SDGP_ISA {

template <class C>
using Elem = Vec<typename C::E>;
template <class C>
using Key = Vec<typename C::K>;
template <class C>
using Unsigned = Vec<typename C::U>;

// The group in each lane: its 64-bit index in two halves (both < 2^32, whatever the width of U), and the number of its
// elements that are not padding.
template <class C>
struct LaneGroups {
  Unsigned<C> lo;
  Unsigned<C> hi;
  Unsigned<C> length;
  bool padded;  // some length is less than kM
};

// Note [Magnitude order]
// |x| is compared as an integer: the bits of x without the sign. This orders finite values by magnitude; -0 equals 0,
// inf is above all finite values, and every NaN is above inf (NaNs are ordered by payload). The order is the same on
// every device.
template <class C>
SDGP_INLINE Key<C> magnitude_key(Elem<C> x) {
  using K = typename C::K;
  constexpr K kNotSign = static_cast<K>(~(static_cast<typename C::U>(1) << (sizeof(K) * 8 - 1)));
  return (Key<C>)x & kNotSign;
}

// Sets keep[j] to all ones if key j is among the n largest of its lane. Ties go to the lower index. Keys must not be
// negative.
template <class K, int kM>
SDGP_INLINE void select_by_rank(const Vec<K>* key, int n, Vec<K>* keep) {
  // Compares each pair once: 3 operations per pair, all in registers. rank[j] starts at j, as if every earlier element
  // were at least as large. It decreases by one for each earlier element that is smaller.
  Vec<K> rank[kM];
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) rank[j] = splat<K>(static_cast<K>(j));
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
    for (int j = i + 1; j < kM; ++j) {
      const Vec<K> larger = key[j] > key[i];
      rank[i] -= larger;
      rank[j] += larger;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) keep[j] = rank[j] < static_cast<K>(n);
}

// The same for large groups, where O(m log^2 m) comparators are faster than O(m^2) pairs. Sorts the keys, reads the
// n-th largest, and keeps all keys above it and the first of the keys equal to it.
template <class K, int kM>
__attribute__((noinline)) void select_by_threshold(const Vec<K>* key, int n, Vec<K>* keep) {
  constexpr auto kNetwork = SortingNetwork<kM>::list();
  Vec<K> sorted[kM];
  for (int j = 0; j < kM; ++j) sorted[j] = key[j];
  [&]<int... kI>(std::integer_sequence<int, kI...>) {
    const auto compare_exchange = [&](Vec<K>& low, Vec<K>& high) __attribute__((always_inline)) {
      const Vec<K> smaller = vmin(low, high);
      high = vmax(low, high);
      low = smaller;
    };
    (compare_exchange(sorted[kNetwork.at[kI].low], sorted[kNetwork.at[kI].high]), ...);
  }(std::make_integer_sequence<int, SortingNetwork<kM>::count()>{});
  const Vec<K> threshold = sorted[kM - n];
  Vec<K> left = splat<K>(static_cast<K>(n));
  for (int j = 0; j < kM; ++j) left = decrement_if(key[j] > threshold, left);
  for (int j = 0; j < kM; ++j) {
    const Vec<K> tie = (key[j] == threshold) & (left > 0);
    left = decrement_if(tie, left);
    keep[j] = (key[j] > threshold) | tie;
  }
}

template <class K, int kM>
SDGP_INLINE void select_largest(const Vec<K>* key, int n, Vec<K>* keep) {
  if constexpr (kM <= 8) {
    select_by_rank<K, kM>(key, n, keep);
  } else {
    select_by_threshold<K, kM>(key, n, keep);
  }
}

// Note [Random numbers]
// Numbers are counter-based: each is a hash of (seed, group index). So neither the order of work nor the device changes
// them. splitmix64 turns the seed into two 32-bit words k0, k1. The state of a group is two words, a = mix(lo ^ k0) and
// b = mix(a + (hi ^ k1)). mvue takes one uniform number from b. random gives each element the key finish(start(b + j *
// golden) ^ a), where mix(x) = finish(start(x)) is C. Wellons' "lowbias32" (public domain). Lanes hold 32-bit words
// even if U has 64 bits.
inline uint64_t mix_seed(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Returns the settings that the functions below take: the seed is mixed once per call.
inline Pruning with_mixed_seed(Pruning pruning) {
  pruning.seed = mix_seed(pruning.seed);
  return pruning;
}

template <class C>
SDGP_INLINE Unsigned<C> word(Unsigned<C> x) {
  if constexpr (sizeof(typename C::U) > 4) return x & 0xffffffffu;
  return x;
}

template <class C>
SDGP_INLINE Unsigned<C> mix_start(Unsigned<C> x) {
  x ^= x >> 16;
  x = word<C>(x * 0x7feb352du);
  return x ^ (x >> 15);
}

template <class C>
SDGP_INLINE Unsigned<C> mix_finish(Unsigned<C> x) {
  x = word<C>(x * 0x846ca68bu);
  return x ^ (x >> 16);
}

template <class C>
struct RandomState {
  Unsigned<C> a;
  Unsigned<C> b;

  SDGP_INLINE RandomState(uint64_t mixed_seed, const LaneGroups<C>& group) {
    const auto k0 = static_cast<typename C::U>(mixed_seed & 0xffffffffu);
    const auto k1 = static_cast<typename C::U>(mixed_seed >> 32);
    a = mix_finish<C>(mix_start<C>(group.lo ^ k0));
    b = mix_finish<C>(mix_start<C>(word<C>(a + (group.hi ^ k1))));
  }

  // Returns 31 bits, so that the key is not negative.
  SDGP_INLINE Key<C> key(int j) const {
    const auto step = static_cast<typename C::U>(static_cast<uint32_t>(j) * 0x9e3779b9u);
    return (Key<C>)(mix_finish<C>(mix_start<C>(word<C>(b + step)) ^ a) >> 1);
  }

  // Returns a number that is uniform on the 2^23 midpoints of (0, 1). It is exact in float32, and its mean is exactly
  // 0.5.
  SDGP_INLINE Elem<C> uniform() const {
    const auto odd = (Key<C>)(((b >> 9) << 1) | 1);
    return __builtin_convertvector(odd, Elem<C>) * static_cast<typename C::E>(0x1p-24);
  }
};

// Sets x[j] to keep[j] ? x[j] : 0, or to the multiplier that has this effect.
template <class C, int kM>
SDGP_INLINE void apply_mask(Elem<C>* x, const Key<C>* keep, bool scale) {
  if (scale) [[unlikely]] {
    for (int j = 0; j < kM; ++j) x[j] = keep_if(keep[j], splat<typename C::E>(C::kOne));
  } else {
#pragma GCC unroll 64
    for (int j = 0; j < kM; ++j) x[j] = keep_if(keep[j], x[j]);
  }
}

template <class C, int kM>
SDGP_INLINE void prune_magnitude(Elem<C>* x, const Pruning& mixed) {
  Key<C> key[kM];
  Key<C> keep[kM];
#pragma GCC unroll 64
  for (int j = 0; j < kM; ++j) key[j] = magnitude_key<C>(x[j]);
  select_largest<typename C::K, kM>(key, mixed.n, keep);
  apply_mask<C, kM>(x, keep, mixed.scale);
}

template <class C, int kM>
SDGP_INLINE void prune_random(Elem<C>* x, const Pruning& mixed, const LaneGroups<C>& group) {
  const RandomState<C> state(mixed.seed, group);
  Key<C> key[kM];
  Key<C> keep[kM];
#pragma GCC unroll 64
  for (int j = 0; j < kM; ++j) key[j] = state.key(j);
  if (group.padded) {
    for (int j = 0; j < kM; ++j) key[j] &= (Key<C>)(group.length > static_cast<typename C::U>(j));
  }
  select_largest<typename C::K, kM>(key, mixed.n, keep);
  apply_mask<C, kM>(x, keep, mixed.scale);
}

template <class C, int kM>
SDGP_INLINE void prune_rescale_group(Elem<C>* x, const Pruning& mixed) {
  Key<C> key[kM];
  Key<C> keep[kM];
  for (int j = 0; j < kM; ++j) key[j] = magnitude_key<C>(x[j]);
  select_largest<typename C::K, kM>(key, mixed.n, keep);
  Elem<C> all{};
  Elem<C> kept{};
  for (int j = 0; j < kM; ++j) {
    all += (Elem<C>)key[j];
    kept = add_if(keep[j], kept, (Elem<C>)key[j]);
  }
  const Elem<C> factor = kept == 0 ? splat<typename C::E>(1) : all / kept;
  for (int j = 0; j < kM; ++j) x[j] = keep_if(keep[j], C::round(mixed.scale ? factor : x[j] * factor));
}

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

// The same for one group of consecutive elements, which are in the lanes. Returns whether all of them are finite; if
// not, the result is wrong.
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

// The number of tiles that are pruned together.
template <Method kMethod>
constexpr int kTiles = kMethod == Method::kMvue ? 2 : 1;

template <class C, Method kMethod, int kM>
SDGP_INLINE void prune_tiles(Elem<C> (*x)[kM], const Pruning& mixed, const LaneGroups<C>* groups) {
  if constexpr (kMethod == Method::kMagnitude) {
    prune_magnitude<C, kM>(*x, mixed);
  } else if constexpr (kMethod == Method::kRandom) {
    prune_random<C, kM>(*x, mixed, *groups);
  } else if constexpr (kMethod == Method::kRescaleGroup) {
    prune_rescale_group<C, kM>(*x, mixed);
  } else if constexpr (kMethod == Method::kUnstructured) {
    prune_unstructured<C, kM>(*x, mixed, *groups);
  } else {
    static_assert(kMethod == Method::kMvue);
    prune_mvue<C, kM>(x, mixed, groups);
  }
}

}  // namespace sdgp::SDGP_ISA
