// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes inside a group, for a vector of groups at once: element j of every group is in vector x[j], one group per
// lane. kM is the compiled group size. A smaller group is padded with zeros at its end. This changes no result: a
// padding zero loses every tie to an element with a lower index, has no weight in a draw, and adds nothing to a sum.
#pragma once

#include "mvue-inl.h"

namespace sdgp::SDGP_ISA {

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
