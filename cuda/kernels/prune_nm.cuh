// SPDX-License-Identifier: BSD-3-Clause
//
// One thread's work in prune_nm: load its groups, prune them, store them.
//
// Note [Thread layout]
// A thread owns whole groups, so no thread waits for another. If groups are neighbors in memory (the last dimension,
// channels_last), a thread reads its group in vectors of up to 16 bytes, and a warp's accesses are consecutive. If rows
// are neighbors in memory (NCHW along C), one access of a warp takes element j of 32 neighboring rows. For 16-bit
// types, instructions and not memory limit the speed. There a thread takes two rows, or several neighboring groups
// that fill two vectors: it finds its place once for all of them, and selects in two groups at a time. One access of a
// warp then takes every other 16 bytes.
#pragma once

#include "pairs.cuh"
#include "plan.cuh"
#include "select_nm.cuh"

namespace sdgp::cuda {

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// Loads kM elements from an aligned address.
template <class Bits, int kM>
SDGP_HOST_DEVICE void load_vectors(const Bits* from, Bits* x) {
  constexpr int kBytes = kM * sizeof(Bits) < 16 ? kM * sizeof(Bits) : 16;
  using Vector = std::conditional_t<kBytes == 16, Vector16, uint64_t>;
  constexpr int kPer = kBytes / sizeof(Bits);
  SDGP_UNROLL
  for (int i = 0; i < kM / kPer; ++i) {
    const Vector vector = reinterpret_cast<const Vector*>(from)[i];
    memcpy(x + i * kPer, &vector, kBytes);
  }
}

template <class Bits, int kM>
SDGP_HOST_DEVICE void store_vectors(const Bits* x, Bits* to) {
  constexpr int kBytes = kM * sizeof(Bits) < 16 ? kM * sizeof(Bits) : 16;
  using Vector = std::conditional_t<kBytes == 16, Vector16, uint64_t>;
  constexpr int kPer = kBytes / sizeof(Bits);
  SDGP_UNROLL
  for (int i = 0; i < kM / kPer; ++i) {
    Vector vector;
    memcpy(&vector, x + i * kPer, kBytes);
    reinterpret_cast<Vector*>(to)[i] = vector;
  }
}

template <class Bits, int kM>
SDGP_HOST_DEVICE void load_group(const Bits* from, int64_t stride, int length, bool vectors, Bits* x) {
  if (vectors) return load_vectors<Bits, kM>(from, x);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) x[j] = j < length ? from[j * stride] : Bits{0};
}

template <class Bits, int kM>
SDGP_HOST_DEVICE void store_group(const Bits* x, Bits* to, int64_t stride, int length, bool vectors) {
  if (vectors) return store_vectors<Bits, kM>(x, to);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    if (j < length) to[j * stride] = x[j];
  }
}

SDGP_HOST_DEVICE int group_length(int m, int64_t size, int64_t group_in_row) {
  const int64_t left = size - group_in_row * m;
  return left < m ? static_cast<int>(left) : m;
}

// Prunes group number `index` of the thread.
template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void prune_one(typename C::Bits* x, const PruneParams& params, const Pruning& mixed,
                                const Place& place, int length, int index) {
  if constexpr (kMethod == Method::kRescale) {
    const auto* factor =
        static_cast<const typename C::E*>(params.factors) + place.factor + index * params.next_factor_step;
    prune_rescale<C, kM>(x, mixed, length, factor, params.factor_step);
  } else {
    const uint64_t group = place.group + static_cast<uint64_t>(index * params.next_group_step);
    prune_group<C, kMethod, kM>(x, mixed, length, group);
  }
}

// Whether groups are pruned in pairs.
template <Method kMethod, int kM>
constexpr bool in_pairs = kMethod == Method::kMagnitude && (kM == 4 || kM == 8);

template <class C, int kM>
SDGP_HOST_DEVICE void prune_pair(uint32_t* pair, const Pruning& pruning) {
  uint32_t kept[kM];
  flag_largest<kM>(pair, pruning.n, kept);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) pair[j] = spread(kept[j]) & (pruning.scale ? C::kOne * 0x10001u : pair[j]);
}

// Prunes one group by mvue, in words of two elements.
template <class C, int kM>
SDGP_HOST_DEVICE void prune_mvue_words(uint32_t* word, const Pruning& mixed, uint64_t group) {
  using Bits = typename C::Bits;
  Bits x[kM];
  typename C::E magnitude[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; j += 2) {
    x[j] = static_cast<Bits>(word[j / 2]);
    x[j + 1] = static_cast<Bits>(word[j / 2] >> 16);
    magnitudes_of<C>(word[j / 2], magnitude[j], magnitude[j + 1]);
  }
  if (mixed.scale) {
    prune_mvue<C, kM>(x, mixed, group);
    SDGP_UNROLL
    for (int j = 0; j < kM; j += 2) word[j / 2] = x[j] | static_cast<uint32_t>(x[j + 1]) << 16;
    return;
  }
  const MvueChoice<C, kM> choice(x, magnitude, mixed.n, mixed.seed, group);
  SDGP_UNROLL
  for (int j = 0; j < kM; j += 2) {
    uint32_t& both = word[j / 2];
    both = raised(both, choice.least * 0x10001u);
    both &= choice.keep[j] ? ~0u : 0xffff0000u;
    both &= choice.keep[j + 1] ? ~0u : 0xffffu;
  }
}

template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void prune_two_rows(const PruneParams& params, const Pruning& mixed, const Place& place, int length) {
  using Bits = typename C::Bits;
  const Bits* from = static_cast<const Bits*>(params.in) + place.in;
  uint32_t pair[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    pair[j] = j < length ? *reinterpret_cast<const uint32_t*>(from + j * params.in_stride) : 0;
  }
  if constexpr (in_pairs<kMethod, kM>) {
    prune_pair<C, kM>(pair, mixed);
  } else {
    Bits x[2][kM];
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      x[0][j] = static_cast<Bits>(pair[j]);
      x[1][j] = static_cast<Bits>(pair[j] >> 16);
    }
    SDGP_UNROLL
    for (int v = 0; v < 2; ++v) prune_one<C, kMethod, kM>(x[v], params, mixed, place, length, v);
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) pair[j] = x[0][j] | static_cast<uint32_t>(x[1][j]) << 16;
  }
  Bits* to = static_cast<Bits*>(params.out) + place.out;
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    if (j < length) *reinterpret_cast<uint32_t*>(to + j * params.out_stride) = pair[j];
  }
}

template <class C, Method kMethod, int kM>
SDGP_HOST_DEVICE void prune_span(const PruneParams& params, const Pruning& mixed, const Place& place) {
  using Bits = typename C::Bits;
  const Bits* from = static_cast<const Bits*>(params.in) + place.in;
  Bits* to = static_cast<Bits*>(params.out) + place.out;
  if constexpr (in_pairs<kMethod, kM>) {
    constexpr int kWords = kM / 2;
    uint32_t word[kSpanSize / 2];
    load_vectors<uint32_t, kSpanSize / 2>(reinterpret_cast<const uint32_t*>(from), word);
    SDGP_UNROLL
    for (int at = 0; at < kSpanSize / 2; at += 2 * kWords) {
      uint32_t pair[kM];
      to_pairs<kM>(word + at, word + at + kWords, pair);
      prune_pair<C, kM>(pair, mixed);
      from_pairs<kM>(pair, word + at, word + at + kWords);
    }
    store_vectors<uint32_t, kSpanSize / 2>(word, reinterpret_cast<uint32_t*>(to));
  } else {
    static_assert(kMethod == Method::kMvue);
    uint32_t word[kSpanSize / 2];
    load_vectors<uint32_t, kSpanSize / 2>(reinterpret_cast<const uint32_t*>(from), word);
    SDGP_UNROLL
    for (int g = 0; g < kSpanSize / kM; ++g) {
      prune_mvue_words<C, kM>(word + g * kM / 2, mixed,
                              place.group + static_cast<uint64_t>(g * params.next_group_step));
    }
    store_vectors<uint32_t, kSpanSize / 2>(word, reinterpret_cast<uint32_t*>(to));
  }
}

template <class C, Method kMethod, int kM, Share kShare>
SDGP_HOST_DEVICE void prune_thread(const PruneParams& params, uint64_t thread) {
  using Bits = typename C::Bits;
  const Place place = find_place<kMethod>(params, thread);
  const int length = group_length(params.pruning.m, params.size, place.in_row);
  with_constants<kM>(with_mixed_seed<kMethod>(params.pruning, params.seed), [&](const Pruning& mixed) {
    if constexpr (kShare == Share::kTwoRows) {
      prune_two_rows<C, kMethod, kM>(params, mixed, place, length);
    } else if constexpr (kShare == Share::kSpan) {
      prune_span<C, kMethod, kM>(params, mixed, place);
    } else {
      const Bits* from = static_cast<const Bits*>(params.in) + place.in;
      Bits* to = static_cast<Bits*>(params.out) + place.out;
      Bits x[kM];
      load_group<Bits, kM>(from, params.in_stride, length, params.vector_in, x);
      prune_one<C, kMethod, kM>(x, params, mixed, place, length, 0);
      store_group<Bits, kM>(x, to, params.out_stride, length, params.vector_out);
    }
  });
}

// Calls `call` with the method, the group size and the share of a thread of the compiled kernel for this plan.
template <class C, class Call>
void visit_prune(const PrunePlan& plan, const Call& call) {
  visit(FixedMethods{}, plan.params.pruning.method, [&]<Method kMethod>(Constant<kMethod> method) {
    visit_at_least(GroupSizes{}, plan.params.pruning.m, [&]<int kM>(Constant<kM> size) {
      visit(Shares{}, plan.share, [&]<Share kShare>(Constant<kShare> share) {
        if constexpr (has_kernel(kShare, kMethod, sizeof(typename C::Bits), kM)) call(method, size, share);
      });
    });
  });
}

}  // namespace sdgp::cuda
