// SPDX-License-Identifier: BSD-3-Clause
//
// Selects the n largest elements of a group: the method magnitude, and a part of other methods. Compiled once per
// instruction set.
#pragma once

#include "pruning.h"
#include "sorting_network.h"
#include "vec-inl.h"

namespace sdgp::SDGP_ISA {

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

}  // namespace sdgp::SDGP_ISA
