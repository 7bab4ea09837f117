// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm through a buffer (stage-inl.h), for every method and group size. What depends on them is behind a pointer,
// so that this code is compiled once per element type.
#pragma once

#include "select_nm-inl.h"
#include "stage-inl.h"

namespace sdgp::SDGP_ISA {

// The groups in the buffer, by lane.
template <class C>
struct StagedGroups {
  static constexpr int kMost = 8 * kLanes<typename C::E>;

  typename C::U lo[kMost] = {};
  typename C::U hi[kMost] = {};
  typename C::U length[kMost] = {};

  LaneGroups<C> at(int64_t lane) const {
    return {load_bits<Unsigned<C>>(lo + lane), load_bits<Unsigned<C>>(hi + lane), load_bits<Unsigned<C>>(length + lane),
            true};
  }
};

// A compiled kernel, as far as staging depends on it.
template <class C>
struct StagedKernel {
  using T = typename C::T;

  int64_t size;                  // the compiled group size
  int64_t lanes;                 // the groups in a full buffer
  bool draws;                    // whether the method reads StagedGroups
  const uint8_t* lane_of_group;  // by the group's position in a tile, where the elements of a group are together
  // Prunes the first `count` groups of the buffer.
  void (*prune)(const Plan& plan, const T* in, T* out, int64_t count, const StagedGroups<C>& groups);
};

template <class C>
void describe(const PruneArgs& args, const Plan& plan, const Piece& piece, int64_t first_lane,
              const StagedKernel<C>& kernel, StagedGroups<C>& groups) {
  constexpr int kL = kLanes<typename C::E>;
  const uint64_t row_step = args.ndim ? static_cast<uint64_t>(args.dims[args.ndim - 1].row_step * plan.row_groups) : 0;
  for (int64_t r = 0; r < piece.rows; ++r) {
    for (int64_t g = 0; g < piece.groups; ++g) {
      const int64_t at = first_lane + (plan.rows_inside ? g * piece.rows + r : r * piece.groups + g);
      const int64_t lane = plan.rows_inside ? at : at / kL * kL + kernel.lane_of_group[at % kL];
      const uint64_t index = piece.first.index + static_cast<uint64_t>(r) * row_step + static_cast<uint64_t>(g);
      groups.lo[lane] = static_cast<typename C::U>(index & 0xffffffffu);
      groups.hi[lane] = static_cast<typename C::U>(index >> 32);
      groups.length[lane] =
          static_cast<typename C::U>(piece.tail && g + 1 == piece.groups ? piece.tail : args.pruning.m);
    }
  }
}

template <class C>
__attribute__((noinline)) void run_staged(const PruneArgs& args, const Plan& plan, Pieces pieces,
                                          const StagedKernel<C>& kernel) {
  using T = typename C::T;
  constexpr int kMost = 64;  // pieces that are staged at a time
  constexpr int64_t kElements = 4 * kMaxGroupSize * kLanes<typename C::E>;
  const Dim* const inner = args.ndim ? &args.dims[args.ndim - 1] : nullptr;
  const int64_t lane_step = plan.rows_inside ? 1 : kernel.size;
  const size_t bytes = static_cast<size_t>(kernel.size * kernel.lanes) * sizeof(T);
  alignas(kVectorBytes) T in[kElements];
  alignas(kVectorBytes) T out[kElements];
  StagedGroups<C> groups;
  Piece piece[kMost];
  std::memset(in, 0, bytes);
  for (;;) {
    int count = 0;
    int64_t lanes = 0;
    if (args.size % args.pruning.m != 0) std::memset(in, 0, bytes);
    for (; count < kMost && pieces.next(kernel.lanes - lanes, kernel.lanes, piece[count]); ++count) {
      const Piece& p = piece[count];
      T* const buffer = in + lanes * lane_step;
      const T* const tensor = static_cast<const T*>(args.in) + p.first.in;
      for_each_box(
          args, plan, p, kernel.lanes, kernel.size, inner ? inner->in_stride : 0, args.in_stride,
          [&](const Box& box, int64_t to, const Strides& to_strides, int64_t from, const Strides& from_strides) {
            copy_box(buffer + to, to_strides, tensor + from, from_strides, box);
          });
      if (kernel.draws) describe(args, plan, p, lanes, kernel, groups);
      lanes += p.lanes();
    }
    if (count == 0) return;
    kernel.prune(plan, in, out, lanes, groups);
    lanes = 0;
    for (int i = 0; i < count; ++i) {
      const Piece& p = piece[i];
      const T* const buffer = out + lanes * lane_step;
      T* const tensor = static_cast<T*>(args.out) + p.first.out;
      for_each_box(
          args, plan, p, kernel.lanes, kernel.size, inner ? inner->out_stride : 0, args.out_stride,
          [&](const Box& box, int64_t from, const Strides& from_strides, int64_t to, const Strides& to_strides) {
            copy_box(tensor + to, to_strides, buffer + from, from_strides, box);
          });
      lanes += p.lanes();
    }
  }
}

}  // namespace sdgp::SDGP_ISA
