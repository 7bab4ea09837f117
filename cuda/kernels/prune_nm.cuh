// SPDX-License-Identifier: BSD-3-Clause
//
// One thread's work in prune_nm: load a group, prune it, store it.
//
// Note [Thread layout]
// A thread owns one group, so no thread waits for another. If groups are neighbours in memory (the last dimension,
// channels_last), a thread reads its group in vectors of up to 16 bytes, and a warp's accesses are consecutive. If rows
// are neighbours in memory (NCHW along C), one access of a warp takes element j of 32 neighbouring rows. For 16-bit
// types, each thread takes two rows.
#pragma once

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

// x[v][j] is element j of row v.
template <class Bits, int kM, int kV>
SDGP_HOST_DEVICE void load_group(const Bits* from, int64_t stride, int length, bool vectors, Bits (*x)[kM]) {
  if (kV == 1 && vectors) return load_vectors<Bits, kM>(from, x[0]);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    Bits row[kV] = {};
    if (j < length) {
      if constexpr (kV == 2) {
        const auto pair = *reinterpret_cast<const uint32_t*>(from + j * stride);
        memcpy(row, &pair, sizeof pair);
      } else {
        row[0] = from[j * stride];
      }
    }
    SDGP_UNROLL
    for (int v = 0; v < kV; ++v) x[v][j] = row[v];
  }
}

template <class Bits, int kM, int kV>
SDGP_HOST_DEVICE void store_group(const Bits (*x)[kM], Bits* to, int64_t stride, int length, bool vectors) {
  if (kV == 1 && vectors) return store_vectors<Bits, kM>(x[0], to);
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    if (j >= length) continue;
    if constexpr (kV == 2) {
      const Bits row[2] = {x[0][j], x[1][j]};
      uint32_t pair;
      memcpy(&pair, row, sizeof pair);
      *reinterpret_cast<uint32_t*>(to + j * stride) = pair;
    } else {
      to[j * stride] = x[0][j];
    }
  }
}

SDGP_HOST_DEVICE int group_length(int m, int64_t size, int64_t group_in_row) {
  const int64_t left = size - group_in_row * m;
  return left < m ? static_cast<int>(left) : m;
}

template <class C, Method kMethod, int kM, int kV>
SDGP_HOST_DEVICE void prune_thread(const PruneParams& params, uint64_t thread) {
  using Bits = typename C::Bits;
  const Place place = find_place(params, thread);
  const int length = group_length(params.pruning.m, params.size, place.in_row);
  Bits x[kV][kM];
  load_group<Bits, kM, kV>(static_cast<const Bits*>(params.in) + place.in, params.in_stride, length, params.vector_in,
                           x);
  const Pruning mixed = with_mixed_seed<kMethod>(params.pruning, params.seed);
  SDGP_UNROLL
  for (int v = 0; v < kV; ++v) {
    if constexpr (kMethod == Method::kRescale) {
      const auto* factor =
          static_cast<const typename C::E*>(params.factors) + place.factor + v * params.row_factor_step;
      prune_rescale<C, kM>(x[v], mixed, length, factor, params.factor_step);
    } else {
      const uint64_t group = place.group + static_cast<uint64_t>(v * params.row_group_step);
      prune_group<C, kMethod, kM>(x[v], mixed, length, group);
    }
  }
  store_group<Bits, kM, kV>(x, static_cast<Bits*>(params.out) + place.out, params.out_stride, length,
                            params.vector_out);
}

// Calls `call` with the method, the group size and the rows per thread of the compiled kernel for this plan.
template <class C, class Call>
void visit_prune(const PrunePlan& plan, const Call& call) {
  visit(Methods{}, plan.params.pruning.method, [&]<Method kMethod>(Constant<kMethod> method) {
    visit_at_least(GroupSizes{}, plan.params.pruning.m, [&]<int kM>(Constant<kM> size) {
      constexpr int kRows = rows_per_thread(sizeof(typename C::Bits), kM);
      if constexpr (kRows > 1) {
        if (plan.rows_per_thread == kRows) return call(method, size, Constant<kRows>{});
      }
      call(method, size, Constant<1>{});
    });
  });
}

}  // namespace sdgp::cuda
