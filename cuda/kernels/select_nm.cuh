// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes one group in one thread. It selects exactly the same positions as cpp/kernels/select_nm-inl.h, and the notes
// in the files that it includes hold here too. kM is the compiled group size. A smaller group is padded with zeros at
// its end. The code is compiled without contraction of multiply and add (-fmad=false).
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "../../cpp/kernels/pruning.h"
#include "../../cpp/kernels/sorting_network.h"
#include "element.cuh"

namespace sdgp::cuda {

template <int kM>
using Mask = std::conditional_t<(kM <= 32), uint32_t, uint64_t>;

// A mask has one bit per element.
template <int kM>
SDGP_HOST_DEVICE bool has(Mask<kM> mask, int j) {
  return mask >> j & 1;
}

template <class K>
SDGP_HOST_DEVICE void compare_exchange(K& low, K& high) {
  const K smaller = low < high ? low : high;
  high = low < high ? high : low;
  low = smaller;
}

template <class K, int kM, int... kI>
SDGP_HOST_DEVICE void sort(K* key, std::integer_sequence<int, kI...>) {
  constexpr auto kNetwork = SortingNetwork<kM>::list();
  (compare_exchange(key[kNetwork.at[kI].low], key[kNetwork.at[kI].high]), ...);
}

// Selects the n largest keys. Ties go to the lower index. For up to 8 keys, and for sizes where a sorting network does
// not pay, it computes the rank of each key. Otherwise it sorts the keys, reads the n-th largest, and keeps the keys
// above it and the first keys that equal it.
template <class K, int kM>
SDGP_HOST_DEVICE Mask<kM> select_largest(const K* key, int n) {
  Mask<kM> keep = 0;
  if constexpr (kM <= 8) {
    int rank[kM];
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) rank[j] = 0;
    SDGP_UNROLL
    for (int i = 0; i < kM; ++i) {
      SDGP_UNROLL
      for (int j = i + 1; j < kM; ++j) {
        const bool larger = key[j] > key[i];
        rank[i] += larger;
        rank[j] += !larger;
      }
    }
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) keep |= static_cast<Mask<kM>>(rank[j] < n) << j;
  } else if constexpr (kM <= 32 && sizeof(K) <= 4) {
    K sorted[kM];
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) sorted[j] = key[j];
    sort<K, kM>(sorted, std::make_integer_sequence<int, SortingNetwork<kM>::count()>{});
    K threshold = 0;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      const K all = j == kM - n ? ~K{0} : K{0};  // a choice between elements would put the array into memory
      threshold |= sorted[j] & all;
    }
    int left = n;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) left -= key[j] > threshold;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      const bool tie = key[j] == threshold && left > 0;
      left -= tie;
      keep |= static_cast<Mask<kM>>(key[j] > threshold || tie) << j;
    }
  } else {
    for (int j = 0; j < kM; ++j) {
      int rank = 0;
      for (int i = 0; i < kM; ++i) rank += i < j ? key[i] >= key[j] : key[i] > key[j];
      keep |= static_cast<Mask<kM>>(rank < n) << j;
    }
  }
  return keep;
}

template <class C, int kM>
SDGP_HOST_DEVICE Mask<kM> select_magnitude(const typename C::Bits* x, int n) {
  typename C::K key[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) key[j] = without_sign<C>(x[j]);
  return select_largest<typename C::K, kM>(key, n);
}

// Sets x[j] to keep[j] ? x[j] : 0 or, with `scale`, to the multiplier that does the same.
template <class C, int kM>
SDGP_HOST_DEVICE void apply_mask(typename C::Bits* x, Mask<kM> keep, bool scale) {
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) x[j] = !has<kM>(keep, j) ? typename C::Bits{0} : scale ? C::kOne : x[j];
}

// Clears all flags but the first n.
template <int kM>
SDGP_HOST_DEVICE void keep_first(bool* flag, int n) {
  if (kM == 4 && n == 2) {  // without a count
    const bool both = flag[0] & flag[1], either = flag[0] | flag[1];
    flag[3] = flag[3] & !(both | (either & flag[2]));
    flag[2] = flag[2] & !both;
    return;
  }
  int left = n;
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    flag[j] = flag[j] && left > 0;
    left -= flag[j];
  }
}

SDGP_HOST_DEVICE uint32_t mix_start(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  return x ^ (x >> 15);
}

SDGP_HOST_DEVICE uint32_t mix_finish(uint32_t x) {
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

SDGP_HOST_DEVICE uint64_t mix_seed(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Calls `call` with `pruning`. If groups keep two of four values, the compiler knows that in this call.
template <int kM, class Call>
SDGP_HOST_DEVICE void with_constants(Pruning pruning, const Call& call) {
  if (kM == 4 && pruning.n == 2 && !pruning.scale) {
    pruning.n = 2;
    pruning.scale = false;
    call(pruning);
  } else {
    call(pruning);
  }
}

// Returns a Pruning with a mixed seed, as the functions below expect. Reads `seed` only if the method draws.
template <Method kMethod>
SDGP_HOST_DEVICE Pruning with_mixed_seed(Pruning pruning, const int64_t* seed) {
  if constexpr (traits(kMethod).draws) pruning.seed = mix_seed(static_cast<uint64_t>(*seed));
  return pruning;
}

// See Note [Random numbers].
struct RandomState {
  uint32_t a;
  uint32_t b;

  SDGP_HOST_DEVICE RandomState(uint64_t mixed_seed, uint64_t group) {
    a = mix_finish(mix_start(static_cast<uint32_t>(group) ^ static_cast<uint32_t>(mixed_seed)));
    b = mix_finish(mix_start(a + (static_cast<uint32_t>(group >> 32) ^ static_cast<uint32_t>(mixed_seed >> 32))));
  }

  SDGP_HOST_DEVICE uint32_t key(int j) const {
    return mix_finish(mix_start(b + static_cast<uint32_t>(j) * 0x9e3779b9u) ^ a) >> 1;
  }

  template <class E>
  SDGP_HOST_DEVICE E uniform() const {
    return static_cast<E>(((b >> 9) << 1) | 1) * static_cast<E>(5.9604644775390625e-8);  // 2^-24
  }
};

template <int kM>
SDGP_HOST_DEVICE Mask<kM> select_random(int n, int length, const RandomState& state) {
  uint32_t key[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) key[j] = j < length ? state.key(j) : 0;
  return select_largest<uint32_t, kM>(key, n);
}

template <class C, int kM>
SDGP_HOST_DEVICE void prune_rescale_group(typename C::Bits* x, const Pruning& mixed) {
  using E = typename C::E;
  const Mask<kM> keep = select_magnitude<C, kM>(x, mixed.n);
  E all = 0;
  E kept = 0;
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    const E magnitude = magnitude_of<C>(x[j]);
    all += magnitude;
    if (has<kM>(keep, j)) kept += magnitude;
  }
  const E factor = kept == 0 ? E{1} : all / kept;
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    x[j] = has<kM>(keep, j) ? C::narrow(mixed.scale ? factor : C::widen(x[j]) * factor) : typename C::Bits{0};
  }
}

// Prunes by rescale with known factors. factor[j * step] belongs to element j.
template <class C, int kM>
SDGP_HOST_DEVICE void prune_rescale(typename C::Bits* x, const Pruning& pruning, int length,
                                    const typename C::E* factor, int64_t step) {
  apply_mask<C, kM>(x, select_magnitude<C, kM>(x, pruning.n), pruning.scale);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    const typename C::E value = C::widen(x[j]);
    if (value == 0 || j >= length) {  // a pruned place stays 0 even if its factor is inf or NaN
      x[j] = 0;
    } else {
      x[j] = C::narrow(value * factor[j * step]);
    }
  }
}

// What mvue does with a group: the elements that stay, and the least magnitude of them.
template <class C, int kM>
struct MvueChoice {
  using E = typename C::E;
  using K = typename C::K;
  bool keep[kM];
  bool above[kM];  // stays unchanged
  const E* magnitude;
  E step = std::numeric_limits<E>::infinity();
  K least = 0;  // the step, as a magnitude

  SDGP_HOST_DEVICE static E positive(E mean) {  // a mean may have underflowed
    constexpr E kSmallest = sizeof(E) == 4 ? static_cast<E>(0x1p-149) : static_cast<E>(0x1p-1074);
    return mean > kSmallest ? mean : kSmallest;
  }

  // Returns whether the step fell to this mean.
  SDGP_HOST_DEVICE bool lower(E mean, bool may) {
    mean = positive(mean);
    may = may & (mean < step);
    step = may ? mean : step;
    return may;
  }

  // Finds the elements above the step. Returns the sum of the others.
  SDGP_HOST_DEVICE E find_above() {
    above[0] = magnitude[0] >= step;
    E rest = above[0] ? E{0} : magnitude[0];
    SDGP_UNROLL
    for (int j = 1; j < kM; ++j) {
      above[j] = magnitude[j] >= step;
      if (!above[j]) rest += magnitude[j];
    }
    return rest;
  }

  SDGP_HOST_DEVICE int count_above() const {
    int count = 0;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) count += above[j];
    return count;
  }

  SDGP_HOST_DEVICE bool is_one_above() const {
    if constexpr (kM != 4) return count_above() == 1;
    const bool low = above[0] != above[1], high = above[2] != above[3];
    return (low & !(above[2] | above[3])) | (high & !(above[0] | above[1]));
  }

  // `magnitudes` are those of `x`. See Note [mvue].
  SDGP_HOST_DEVICE MvueChoice(const typename C::Bits* x, const E* magnitudes, int n, uint64_t mixed_seed,
                              uint64_t group)
      : magnitude(magnitudes) {
    E rest = magnitude[0];
    SDGP_UNROLL
    for (int j = 1; j < kM; ++j) rest += magnitude[j];
    if (!(rest < std::numeric_limits<E>::infinity())) {  // inf or NaN
      const Mask<kM> largest = select_magnitude<C, kM>(x, n);
      SDGP_UNROLL
      for (int j = 0; j < kM; ++j) keep[j] = above[j] = has<kM>(largest, j);
      return;
    }
    if (n <= 2) {
      // Without a division: the mean changes once more only if one of two places is taken. A mean of 0 becomes the
      // smallest number, which changes nothing: all elements below the step are 0 then.
      step = positive(n == 2 ? rest * E{0.5} : rest);
      if (n == 2) {
        rest = find_above();
        lower(rest, is_one_above());
      }
    } else {
      int places = n;
      for (int round = 1; lower(rest / static_cast<E>(places), (places > 0) & (rest > 0)) && round < n; ++round) {
        rest = find_above();
        places = n - count_above();
      }
    }
    E point = RandomState(mixed_seed, group).uniform<E>() * step;
    E reached = 0;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      above[j] = magnitude[j] >= step;
      if (j == 0) reached = above[0] ? E{0} : magnitude[0];
      if (j > 0 && !above[j]) reached += magnitude[j];
      const bool hit = reached > point;
      if (hit) point += step;
      keep[j] = above[j] | hit;
    }
    keep_first<kM>(keep, n);
    least = C::narrow(step);
  }
};

template <class C, int kM>
SDGP_HOST_DEVICE void prune_mvue(typename C::Bits* x, const Pruning& mixed, uint64_t group) {
  using Bits = typename C::Bits;
  using K = typename C::K;
  typename C::E magnitude[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) magnitude[j] = magnitude_of<C>(x[j]);
  const MvueChoice<C, kM> choice(x, magnitude, mixed.n, mixed.seed, group);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    const K key = without_sign<C>(x[j]);
    const K larger = key > choice.least ? key : choice.least;  // numbers without a sign compare as their bits do
    const auto kept = static_cast<Bits>(larger | (x[j] ^ key));
    x[j] = choice.keep[j] ? kept : Bits{0};
    if (mixed.scale && choice.keep[j]) {
      x[j] = choice.above[j]              ? C::kOne
             : without_sign<C>(kept) != 0 ? C::narrow(choice.step / choice.magnitude[j])
                                          : Bits{0};
    }
  }
}

// Prunes one group. Its elements are `x`, which are zeros from `length` on. Its logical index is `group`.
template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void prune_group(typename C::Bits* x, const Pruning& mixed, int length, uint64_t group) {
  if constexpr (kMethod == Method::kMagnitude) {
    apply_mask<C, kM>(x, select_magnitude<C, kM>(x, mixed.n), mixed.scale);
  } else if constexpr (kMethod == Method::kRandom) {
    apply_mask<C, kM>(x, select_random<kM>(mixed.n, length, RandomState(mixed.seed, group)), mixed.scale);
  } else if constexpr (kMethod == Method::kRescaleGroup) {
    prune_rescale_group<C, kM>(x, mixed);
  } else {
    static_assert(kMethod == Method::kMvue);
    prune_mvue<C, kM>(x, mixed, group);
  }
}

}  // namespace sdgp::cuda
