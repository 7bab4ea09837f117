// SPDX-License-Identifier: BSD-3-Clause
//
// The random numbers of the methods that draw. Compiled once per instruction set.
#pragma once

#include "pruning.h"
#include "vec-inl.h"

namespace sdgp::SDGP_ISA {

// The group in each lane: its 64-bit index in two halves (both < 2^32, whatever the width of U), and the number of its
// elements that are not padding.
template <class C>
struct LaneGroups {
  Unsigned<C> lo;
  Unsigned<C> hi;
  Unsigned<C> length;
  bool padded;  // some length is less than kM
};

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

}  // namespace sdgp::SDGP_ISA
