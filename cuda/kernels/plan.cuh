// SPDX-License-Identifier: BSD-3-Clause
//
// Tells a thread of a pruning kernel where its groups are. Thread numbers run through the output in memory order.
#pragma once

#include "../../cpp/kernels/args.h"
#include "host_device.cuh"

namespace sdgp::cuda {

constexpr int kMaxAxes = 8;  // if more dimensions do not merge, the op copies first

// Divides numbers below 2^63 by a number that the host knows, with a multiplication (Granlund, Montgomery, 1994).
struct Divisor {
  uint64_t size;
  uint64_t magic;
  int shift;

  static Divisor of(uint64_t size) {
    int shift = 0;
    while (shift < 63 && (uint64_t{1} << shift) < size) ++shift;
    const auto excess = static_cast<unsigned __int128>((uint64_t{1} << shift) - size) << 64;
    return {size, static_cast<uint64_t>(excess / size) + 1, shift};
  }

  SDGP_HOST_DEVICE uint64_t quotient(uint64_t x) const {
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(x, magic);
#else
    const auto high = static_cast<uint64_t>(static_cast<unsigned __int128>(x) * magic >> 64);
#endif
    return (high + x) >> shift;
  }
};

// One dimension that thread numbers run through: a dimension of rows, or the groups of a row.
struct ThreadAxis {
  Divisor size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t group_step;   // of the logical group index
  int64_t factor_step;  // of rescale's factors

  ThreadAxis with_size(uint64_t new_size) const {
    return {Divisor::of(new_size), in_stride, out_stride, group_step, factor_step};
  }

  // The axis whose steps are `count` steps of this one.
  ThreadAxis grouped(int count) const {
    return {Divisor::of(size.size / static_cast<uint64_t>(count)), count * in_stride, count * out_stride,
            count * group_step, count * factor_step};
  }
};

struct PruneParams {
  const void* in;
  void* out;
  const int64_t* seed;  // on the device, so that a captured graph can draw anew
  const void* factors;  // for rescale
  Pruning pruning;
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t factor_step;      // from element to element
  int64_t next_group_step;  // from a thread's group to its next one
  int64_t next_factor_step;
  bool vector_in;  // a group consists of aligned vectors
  bool vector_out;
  uint64_t threads;
  int partial_axis;  // the axis of the groups if the last group of a row is shorter, else -1
  int axes;
  ThreadAxis axis[kMaxAxes];  // outermost first
};

struct Place {
  int64_t in = 0;  // element offsets of the group's first element
  int64_t out = 0;
  int64_t factor = 0;  // set for rescale
  uint64_t group = 0;  // logical index in the tensor, set for methods that draw
  int64_t in_row = 0;  // index of the group in its row; 0 if all groups are whole
};

template <Method kMethod>
SDGP_HOST_DEVICE Place find_place(const PruneParams& params, uint64_t thread) {
  Place place;
  const auto move = [&](int a, int64_t at) {
    const ThreadAxis& axis = params.axis[a];
    place.in += at * axis.in_stride;
    place.out += at * axis.out_stride;
    if constexpr (!traits(kMethod).by_group) place.factor += at * axis.factor_step;
    if constexpr (traits(kMethod).draws) place.group += static_cast<uint64_t>(at * axis.group_step);
    if (a == params.partial_axis) place.in_row = at;
  };
  SDGP_UNROLL_BY(1)  // a contiguous tensor has one axis, which is not divided
  for (int a = params.axes - 1; a > 0; --a) {
    const uint64_t rest = params.axis[a].size.quotient(thread);
    move(a, static_cast<int64_t>(thread - rest * params.axis[a].size.size));
    thread = rest;
  }
  move(0, static_cast<int64_t>(thread));
  return place;
}

// The group sizes that kernels are compiled for. A group of another size is padded.
using GroupSizes = Values<4, 8, 16, 32, 64>;
static_assert(contains(GroupSizes{}, kMaxGroupSize));

inline int compiled_size(int m) {
  return visit_at_least(GroupSizes{}, m, []<int kM>(Constant<kM>) { return kM; });
}

// What one thread takes. 16-bit types have all three, for some methods and group sizes.
enum class Share {
  kGroup,    // one group
  kTwoRows,  // the same group of two neighboring rows, which one 4-byte access moves
  kSpan,     // kSpanSize consecutive elements, which are whole groups, in vectors of 16 bytes
};

using Shares = EnumValues<Share, 3>;

constexpr int kSpanSize = 16;

constexpr bool has_kernel(Share share, Method method, int element_size, int compiled_m) {
  if (share == Share::kGroup) return true;
  if (element_size != 2) return false;
  // The registers of a thread hold only one row of larger groups.
  if (share == Share::kTwoRows) return compiled_m <= 16;
  return (method == Method::kMagnitude || method == Method::kMvue) && compiled_m <= kSpanSize / 2;
}

struct PrunePlan {
  PruneParams params;
  Share share;
};

// Merges the axis of the groups with the outer ones that continue it. Returns its new index.
inline int merge_group_axis(PruneParams& params, int group_axis) {
  int merged = group_axis;
  for (; merged > 0; --merged) {
    const ThreadAxis& group = params.axis[merged];
    ThreadAxis& outer = params.axis[merged - 1];
    const auto groups = static_cast<int64_t>(group.size.size);
    if (outer.in_stride != group.in_stride * groups || outer.out_stride != group.out_stride * groups ||
        outer.group_step != group.group_step * groups || outer.factor_step != group.factor_step * groups) {
      break;
    }
    outer = group.with_size(group.size.size * outer.size.size);
  }
  params.axes -= group_axis - merged;
  for (int a = merged + 1; a < params.axes; ++a) params.axis[a] = params.axis[a + group_axis - merged];
  return merged;
}

// Supports at most kMaxAxes - 1 dimensions besides the pruned one.
inline PrunePlan plan_prune(const PruneArgs& args) {
  PrunePlan plan{};
  PruneParams& params = plan.params;
  params.in = args.in;
  params.out = args.out;
  params.pruning = args.pruning;
  params.size = args.size;
  params.in_stride = args.in_stride;
  params.out_stride = args.out_stride;
  const int64_t groups = ceil_div<int64_t>(args.size, args.pruning.m);
  const int64_t factors_per_sample = args.dim_per_factor ? args.size : 1;
  const bool has_factors = !traits(args.pruning.method).by_group;
  params.factor_step = has_factors && args.dim_per_factor ? 1 : 0;

  // The output stride of the groups decides the place of their axis. The dimensions are already sorted by theirs.
  const int64_t group_stride = args.pruning.m * args.out_stride;
  const ThreadAxis groups_axis{Divisor::of(static_cast<uint64_t>(groups)), args.pruning.m * args.in_stride,
                               group_stride, 1, args.pruning.m * params.factor_step};
  int group_axis = -1;
  for (int d = 0; d < args.ndim; ++d) {
    const Dim& dim = args.dims[d];
    if (group_axis < 0 && dim.out_stride < group_stride) {
      group_axis = params.axes;
      params.axis[params.axes++] = groups_axis;
    }
    params.axis[params.axes++] = {Divisor::of(static_cast<uint64_t>(dim.size)), dim.in_stride, dim.out_stride,
                                  dim.row_step * groups, has_factors && dim.per_factor ? factors_per_sample : 0};
  }
  if (group_axis < 0) {
    group_axis = params.axes;
    params.axis[params.axes++] = groups_axis;
  }

  params.partial_axis = args.size % args.pruning.m != 0 ? group_axis : -1;
  if (params.partial_axis < 0) group_axis = merge_group_axis(params, group_axis);

  const auto element_size = static_cast<size_t>(traits(args.dtype).size);
  const int compiled_m = compiled_size(args.pruning.m);
  const size_t group_bytes = static_cast<size_t>(args.pruning.m) * element_size;
  const size_t vector_bytes = group_bytes < 16 ? group_bytes : 16;
  const bool whole = args.pruning.m == compiled_m && args.size % args.pruning.m == 0;
  const auto aligned = [&](const void* pointer, size_t bytes, bool in) {
    bool result = reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    for (int a = 0; a < params.axes; ++a) {
      const int64_t stride = in ? params.axis[a].in_stride : params.axis[a].out_stride;
      result = result && static_cast<size_t>(stride) * element_size % bytes == 0;
    }
    return result;
  };
  params.vector_in = whole && args.in_stride == 1 && aligned(args.in, vector_bytes, true);
  params.vector_out = whole && args.out_stride == 1 && aligned(args.out, vector_bytes, false);

  // A thread takes two rows or a span if both tensors have them, aligned.
  plan.share = Share::kGroup;
  const auto try_share = [&](Share share, int count, size_t bytes) {
    ThreadAxis& last = params.axis[params.axes - 1];
    if (!has_kernel(share, args.pruning.method, traits(args.dtype).size, compiled_m) ||
        last.size.size % static_cast<uint64_t>(count) != 0) {
      return;
    }
    const ThreadAxis one = last;
    last = one.grouped(count);
    if (aligned(args.in, bytes, true) && aligned(args.out, bytes, false)) {
      params.next_group_step = one.group_step;
      params.next_factor_step = one.factor_step;
      plan.share = share;
    } else {
      last = one;
    }
  };
  const ThreadAxis& last = params.axis[params.axes - 1];
  const bool last_is_groups = group_axis == params.axes - 1;
  if (last_is_groups && params.vector_in && params.vector_out) {
    try_share(Share::kSpan, kSpanSize / args.pruning.m, 16);
  } else if (!last_is_groups && last.in_stride == 1 && last.out_stride == 1 && args.in_stride % 2 == 0 &&
             args.out_stride % 2 == 0) {
    try_share(Share::kTwoRows, 2, 4);
  }
  params.threads = 1;
  for (int a = 0; a < params.axes; ++a) params.threads *= params.axis[a].size.size;
  return plan;
}

}  // namespace sdgp::cuda
