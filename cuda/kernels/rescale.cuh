// SPDX-License-Identifier: BSD-3-Clause
//
// The factors of rescale: sum |x| / sum |kept|. The sums run over all elements that share a factor. There are three
// kernels: the first computes partial sums, the second computes the factors from them, and the kernel of prune_nm
// applies the factors. Without atomics, the order of additions depends only on the shape and the strides. A result does
// therefore not depend on the GPU.
//
// Note [Partial sums]
// A warp takes one sample and a stretch of the positions or groups that its sums run over. With one factor per channel,
// the 32 lanes are neighboring groups, and each lane runs through the positions of the stretch. If rows are neighbors
// in memory, the lanes are instead neighboring positions of one group, and their sums are added at the end. With one
// factor per row, the lanes are neighboring groups of the row, and their sums are added at the end.
#pragma once

#include <limits>

#include "prune_nm.cuh"

namespace sdgp::cuda {

constexpr int kWarp = 32;
constexpr int64_t kStretch = 512;  // positions or groups that a warp sums; few enough to fill a GPU with warps

enum class Lanes { kGroupsOfPosition, kPositionsOfGroup, kGroupsOfRow };

struct SumParams {
  const void* in;
  void* partial;  // (2, stretches, factors): sums of all, then of the kept elements
  void* factor;   // (factors)
  Lanes lanes;
  Pruning pruning;
  int64_t size;
  int64_t in_stride;
  bool vector_in;
  int64_t groups;
  int64_t positions;  // rows of a sample
  int64_t samples;
  int64_t sample_stride;
  int64_t stretches;
  int64_t tiles;    // warps that share one stretch
  int64_t factors;  // in total
  int64_t factors_per_sample;
  int axes;
  ThreadAxis axis[kMaxAxes];  // of a sample's rows
};

inline SumParams plan_sums(const PruneArgs& args) {
  SumParams params{};
  params.in = args.in;
  params.pruning = args.pruning;
  params.size = args.size;
  params.in_stride = args.in_stride;
  params.groups = ceil_div<int64_t>(args.size, args.pruning.m);
  params.positions = 1;
  params.samples = 1;
  params.factors_per_sample = args.dim_per_factor ? args.size : 1;
  int64_t row_stride = INT64_MAX;  // of neighboring rows
  for (int d = 0; d < args.ndim; ++d) {
    const Dim& dim = args.dims[d];
    if (dim.per_factor) {
      params.samples = dim.size;
      params.sample_stride = dim.in_stride;
    } else {
      params.positions *= dim.size;
      params.axis[params.axes++] = {Divisor::of(static_cast<uint64_t>(dim.size)), dim.in_stride, 0, 0, 0};
      row_stride = dim.in_stride;
    }
  }
  params.factors = params.samples * params.factors_per_sample;
  if (!args.dim_per_factor) {
    params.lanes = Lanes::kGroupsOfRow;
    params.tiles = 1;
    params.stretches = ceil_div(params.groups, kStretch);
  } else if (row_stride < args.in_stride) {
    params.lanes = Lanes::kPositionsOfGroup;
    params.tiles = params.groups;
    params.stretches = ceil_div(params.positions, kStretch);
  } else {
    params.lanes = Lanes::kGroupsOfPosition;
    params.tiles = ceil_div<int64_t>(params.groups, kWarp);
    params.stretches = ceil_div(params.positions, kStretch);
  }
  const auto element_size = static_cast<size_t>(traits(args.dtype).size);
  const size_t group_bytes = static_cast<size_t>(args.pruning.m) * element_size;
  const size_t bytes = group_bytes < 16 ? group_bytes : 16;
  params.vector_in = args.pruning.m == compiled_size(args.pruning.m) && args.size % args.pruning.m == 0 &&
                     args.in_stride == 1 && reinterpret_cast<uintptr_t>(args.in) % bytes == 0 &&
                     static_cast<size_t>(params.sample_stride) * element_size % bytes == 0;
  for (int a = 0; a < params.axes; ++a) {
    params.vector_in = params.vector_in && static_cast<size_t>(params.axis[a].in_stride) * element_size % bytes == 0;
  }
  return params;
}

SDGP_HOST_DEVICE int64_t position_offset(const SumParams& params, int64_t position) {
  int64_t offset = 0;
  auto rest = static_cast<uint64_t>(position);
  for (int a = params.axes - 1; a >= 0; --a) {
    const ThreadAxis& axis = params.axis[a];
    const uint64_t outer = a > 0 ? axis.size.quotient(rest) : 0;
    offset += static_cast<int64_t>(rest - outer * axis.size.size) * axis.in_stride;
    rest = outer;
  }
  return offset;
}

// The share of one warp: which elements it sums, and where it stores the sums.
struct WarpShare {
  int64_t sample;
  int64_t tile;
  int64_t stretch;

  SDGP_HOST_DEVICE WarpShare(const SumParams& params, int64_t warp) {
    tile = warp % params.tiles;
    stretch = warp / params.tiles % params.stretches;
    sample = warp / params.tiles / params.stretches;
  }
};

// The sums of one lane, one for each element of its group. With one factor per row, element 0 holds the only sum.
template <class C, int kM>
struct LaneSums {
  using E = typename C::E;
  using Bits = typename C::Bits;
  E all[kM];
  E kept[kM];

  SDGP_HOST_DEVICE LaneSums() {
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) all[j] = kept[j] = 0;
  }

  SDGP_HOST_DEVICE void add(const SumParams& params, int64_t sample, int64_t position, int64_t group) {
    const int length = group_length(params.pruning.m, params.size, group);
    const Bits* from = static_cast<const Bits*>(params.in) + sample * params.sample_stride +
                       position_offset(params, position) + group * params.pruning.m * params.in_stride;
    Bits x[kM];
    load_group<Bits, kM>(from, params.in_stride, length, params.vector_in, x);
    const Mask<kM> keep = select_magnitude<C, kM>(x, params.pruning.n);
    const bool per_row = params.lanes == Lanes::kGroupsOfRow;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      const E magnitude = magnitude_of<C>(x[j]);
      const E kept_magnitude = has<kM>(keep, j) ? magnitude : E{0};
      if (per_row) {
        all[0] += magnitude;
        kept[0] += kept_magnitude;
      } else {
        all[j] += magnitude;
        kept[j] += kept_magnitude;
      }
    }
  }

  SDGP_HOST_DEVICE void sum(const SumParams& params, const WarpShare& share, int lane) {
    const int64_t begin = share.stretch * kStretch;
    const int64_t length = params.lanes == Lanes::kGroupsOfRow ? params.groups : params.positions;
    const int64_t end = begin + kStretch < length ? begin + kStretch : length;
    if (params.lanes == Lanes::kGroupsOfPosition) {
      const int64_t group = share.tile * kWarp + lane;
      if (group >= params.groups) return;
      for (int64_t position = begin; position < end; ++position) add(params, share.sample, position, group);
    } else if (params.lanes == Lanes::kPositionsOfGroup) {
      for (int64_t at = begin + lane; at < end; at += kWarp) add(params, share.sample, at, share.tile);
    } else {
      for (int64_t at = begin + lane; at < end; at += kWarp) add(params, share.sample, 0, at);
    }
  }

  // Stores the sums of a lane. They must be complete.
  SDGP_HOST_DEVICE void store(const SumParams& params, const WarpShare& share, int lane) const {
    E* partial =
        static_cast<E*>(params.partial) + share.stretch * params.factors + share.sample * params.factors_per_sample;
    E* partial_kept = partial + params.stretches * params.factors;
    if (params.lanes == Lanes::kGroupsOfRow) {
      *partial = all[0];
      *partial_kept = kept[0];
      return;
    }
    const int64_t group = params.lanes == Lanes::kGroupsOfPosition ? share.tile * kWarp + lane : share.tile;
    if (group >= params.groups) return;
    const int length = group_length(params.pruning.m, params.size, group);
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      if (j >= length) continue;
      partial[group * params.pruning.m + j] = all[j];
      partial_kept[group * params.pruning.m + j] = kept[j];
    }
  }
};

template <class E>
SDGP_HOST_DEVICE void find_factor(const SumParams& params, int64_t factor) {
  const E* partial = static_cast<const E*>(params.partial) + factor;
  E all = 0;
  E kept = 0;
  for (int64_t stretch = 0; stretch < params.stretches; ++stretch) {
    all += partial[stretch * params.factors];
    kept += partial[(params.stretches + stretch) * params.factors];
  }
  constexpr E kLargest = std::numeric_limits<E>::max();
  const E quotient = kept == 0 ? E{1} : all / kept;
  static_cast<E*>(params.factor)[factor] = all <= kLargest && quotient > kLargest ? kLargest : quotient;  // Sums::ratio
}

}  // namespace sdgp::cuda
