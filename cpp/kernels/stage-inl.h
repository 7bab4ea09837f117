// SPDX-License-Identifier: BSD-3-Clause
//
// Staging copies data whose runs are shorter than a vector into a buffer, where it fills vectors, and copies the
// results back. This file defines the pieces and the copies; prune_staged-inl.h prunes in between.
//
// The buffer has two layouts, as memory does. If rows lie inside groups (NCHW maps smaller than a vector), buffer row j
// holds element j of every group. Otherwise the elements of a group are together, padded to the compiled size. So both
// sides of a copy are runs, which vectors move exactly: nothing outside a run is read or written.
#pragma once

#include "plan-inl.h"

namespace sdgp::SDGP_ISA {

template <int kBytes>
struct BlockType {
  using type = typename VecType<uint64_t, kBytes>::type;
};
template <>
struct BlockType<8> {
  using type = uint64_t;
};
template <>
struct BlockType<4> {
  using type = uint32_t;
};
template <>
struct BlockType<2> {
  using type = uint16_t;
};

// Three nested loops over elements. The innermost axis is last.
struct Box {
  int64_t size[3];

  int64_t volume() const { return size[0] * size[1] * size[2]; }
};
struct Strides {
  int64_t axis[3];
};

// Copies runs of `bytes` bytes in vectors. The last vector ends with the run and may overlap the one before it. A run
// shorter than a vector takes two moves of the widest type that fits. Strides are in bytes, and are passed by value
// because `to` may alias them.
template <int kBytes, int kSmallest>
SDGP_INLINE void copy_runs(char* to, const Strides to_strides, const char* from, const Strides from_strides,
                           const Box box, const int64_t bytes) {
  if constexpr (kBytes > kSmallest) {
    if (bytes < kBytes) return copy_runs<kBytes / 2, kSmallest>(to, to_strides, from, from_strides, box, bytes);
  }
  using Block = typename BlockType<kBytes>::type;
  const int64_t last = bytes - kBytes;
  for (int64_t i = 0; i < box.size[0]; ++i) {
    char* target = to + i * to_strides.axis[0];
    const char* source = from + i * from_strides.axis[0];
    for (int64_t j = 0; j < box.size[1]; ++j) {
      const auto end = load_bits<Block>(source + last);
      if constexpr (kBytes < kVectorBytes) {
        store_bits(target, load_bits<Block>(source));
      } else {
        for (int64_t at = 0; at < last; at += kBytes) store_bits(target + at, load_bits<Block>(source + at));
      }
      store_bits(target + last, end);
      target += to_strides.axis[1];
      source += from_strides.axis[1];
    }
  }
}

template <class T>
__attribute__((noinline)) void copy_box(T* to, const Strides& to_strides, const T* from, const Strides& from_strides,
                                        const Box& box) {
  constexpr int kSize = sizeof(T);
  if (to_strides.axis[2] == 1 && from_strides.axis[2] == 1) {
    return copy_runs<kVectorBytes, kSize>(
        reinterpret_cast<char*>(to), {{to_strides.axis[0] * kSize, to_strides.axis[1] * kSize}},
        reinterpret_cast<const char*>(from), {{from_strides.axis[0] * kSize, from_strides.axis[1] * kSize}}, box,
        box.size[2] * kSize);
  }
  for (int64_t i = 0; i < box.size[0]; ++i) {
    for (int64_t j = 0; j < box.size[1]; ++j) {
      T* const target = to + i * to_strides.axis[0] + j * to_strides.axis[1];
      const T* const source = from + i * from_strides.axis[0] + j * from_strides.axis[1];
      for (int64_t k = 0; k < box.size[2]; ++k) target[k * to_strides.axis[2]] = source[k * from_strides.axis[2]];
    }
  }
}

// Neighboring rows (along the innermost of the other dimensions) times consecutive groups of each. Lanes are numbered
// in memory order.
struct Piece {
  Row first;  // element offsets and group index of the first group
  int64_t rows;
  int64_t groups;
  int64_t tail;  // length of the last group if it is shorter, otherwise 0

  int64_t lanes() const { return rows * groups; }
};

// Divides a range of (row, group) pairs, in memory order, into pieces. Only groups from `first_group` on are included.
class Pieces {
 public:
  Pieces(const PruneArgs& args, const Plan& plan, int64_t first_group, int64_t begin, int64_t end)
      : args_(args), plan_(plan), first_group_(first_group), left_(end - begin) {
    const int64_t groups = plan.groups - first_group;
    majors_ = plan.rows_inside ? groups : plan.inner;
    minors_ = plan.rows_inside ? plan.inner : groups;
    outer_ = begin / (majors_ * minors_);
    major_ = begin / minors_ % majors_;
    minor_ = begin % minors_;
    base_ = find_row(args_, args_.ndim - 1, outer_);
  }

  // Sets the next piece and returns true, if one is left and fits into `room` lanes of a buffer of `capacity`. Only a
  // run that is longer than half of the buffer is divided.
  bool next(int64_t room, int64_t capacity, Piece& piece) {
    if (left_ == 0 || room == 0) return false;
    int64_t count = 1;
    int64_t run = at_most(minors_ - minor_, left_);
    if (run > room) {
      if (minors_ <= capacity / 2) return false;
      run = room;
    } else if (run == minors_) {
      count = at_most(majors_ - major_, at_most(room, left_) / minors_);
    }
    const int64_t row = plan_.rows_inside ? minor_ : major_;
    const int64_t group = first_group_ + (plan_.rows_inside ? major_ : minor_);
    piece.rows = plan_.rows_inside ? run : count;
    piece.groups = plan_.rows_inside ? count : run;
    piece.tail = group + piece.groups > plan_.full ? args_.size % args_.pruning.m : 0;
    const Dim inner = args_.ndim ? args_.dims[args_.ndim - 1] : Dim{};
    piece.first.in = base_.in + row * inner.in_stride + group * args_.pruning.m * args_.in_stride;
    piece.first.out = base_.out + row * inner.out_stride + group * args_.pruning.m * args_.out_stride;
    piece.first.index =
        args_.first_group +
        (base_.index + static_cast<uint64_t>(row * inner.row_step)) * static_cast<uint64_t>(plan_.row_groups) +
        static_cast<uint64_t>(group);
    advance(count, run);
    return true;
  }

 private:
  void advance(int64_t count, int64_t run) {
    left_ -= count * run;
    minor_ += run;
    if (minor_ < minors_) return;
    minor_ = 0;
    major_ += count;
    if (major_ < majors_) return;
    major_ = 0;
    base_ = find_row(args_, args_.ndim - 1, ++outer_);
  }

  const PruneArgs& args_;
  const Plan& plan_;
  int64_t first_group_;
  int64_t left_;
  int64_t outer_;
  int64_t majors_;  // size of the axis with the larger strides, of the two axes of a piece
  int64_t minors_;
  int64_t major_;
  int64_t minor_;
  Row base_;
};

// Calls copy(box, buffer offset, buffer strides, tensor offset, tensor strides) for the full groups of a piece and for
// its tails. `padded` is the compiled group size. The tensor's strides are those of the input or those of the output.
template <class Copy>
SDGP_INLINE void for_each_box(const PruneArgs& args, const Plan& plan, const Piece& piece, int64_t capacity,
                              int64_t padded, int64_t row_stride, int64_t stride, Copy copy) {
  const int64_t m = args.pruning.m;
  const int64_t full = piece.groups - (piece.tail != 0);
  if (plan.rows_inside) {
    const Strides buffer{{piece.rows, capacity, 1}};
    const Strides tensor{{m * stride, stride, row_stride}};
    if (full) copy(Box{{full, m, piece.rows}}, 0, buffer, 0, tensor);
    if (piece.tail) copy(Box{{1, piece.tail, piece.rows}}, full * piece.rows, buffer, full * m * stride, tensor);
    return;
  }
  const Strides buffer{{piece.groups * padded, padded, 1}};
  const Strides tensor{{row_stride, m * stride, stride}};
  if (m == padded && stride == 1) {
    copy(Box{{piece.rows, 1, full * m + piece.tail}}, 0, buffer, 0, tensor);
    return;
  }
  if (full) copy(Box{{piece.rows, full, m}}, 0, buffer, 0, tensor);
  if (piece.tail) copy(Box{{piece.rows, 1, piece.tail}}, full * padded, buffer, full * m * stride, tensor);
}

}  // namespace sdgp::SDGP_ISA
