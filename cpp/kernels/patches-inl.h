// SPDX-License-Identifier: BSD-3-Clause
//
// Divides a weight gradient into blocks of output pixels. Finds the input that a block reads, how that input is packed,
// and how many pixels a block may have to fit the L1 cache. Compiled once per instruction set.
//
// Note [Patches]
// The pixels of a block are whole groups of one sample, or whole samples. Their input is packed as patches. A patch is
// a rectangle of pixels and their surroundings: whole lines of the image, or a single line if that needs less memory.
// The lines of all patches of a block are `pitch` positions long, so the distance to a tap is the same for every pixel.
#pragma once

#include "pack_dense-inl.h"
#include "scratch-inl.h"

namespace sdgp::SDGP_ISA {

// The packed form of one spatial dimension. If there is only one tap, only the positions that the output reads are
// packed.
struct PackedAxis {
  int64_t step;   // packed positions from one output position to the next
  int64_t jump;   // input positions from one packed position to the next
  int64_t reach;  // packed positions that one output position reads

  explicit PackedAxis(const Axis2d& axis)
      : step(axis.kernel == 1 ? 1 : axis.stride),
        jump(axis.kernel == 1 ? axis.stride : 1),
        reach((axis.kernel - 1) * axis.dilation + 1) {}

  int64_t packed(int64_t outputs) const { return (outputs - 1) * step + reach; }
};

struct Patch {
  int64_t line;  // first line of the output
  int64_t column;
  int64_t lines;  // number of lines of the output
  int64_t columns;
  int64_t at;  // packed positions of the sample before this patch
};

// The patches of output pixels [begin, end) of a sample.
class Patches {
 public:
  const PackedAxis height;
  const PackedAxis width;
  int64_t pitch = 0;
  int64_t size = 0;   // in packed positions
  int64_t count = 0;  // number of patches in `list`
  Scratch<Patch> list;

  explicit Patches(const WeightGradArgs& args) : height(args.height), width(args.width), args_(args) {}

  // Sets pitch and size.
  void measure(int64_t begin, int64_t end) {
    const int64_t columns = args_.width.out;
    first_line_ = begin / columns;
    lines_ = (end - 1) / columns - first_line_ + 1;
    const int64_t first = begin % columns, last = (end - 1) % columns;
    const int64_t longest = lines_ > 2 ? columns : lines_ == 2 ? at_least(columns - first, last + 1) : last - first + 1;
    pitch = width.packed(longest);
    const int64_t by_line = lines_ * height.packed(1) * pitch;
    const int64_t whole = height.packed(lines_) * width.packed(lines_ > 1 ? columns : longest);
    by_line_ = lines_ == 1 || by_line < whole;
    if (!by_line_) pitch = width.packed(columns);
    size = by_line_ ? by_line : whole;
  }

  // Also lists the patches.
  void find(int64_t begin, int64_t end) {
    measure(begin, end);
    const int64_t columns = args_.width.out;
    count = by_line_ ? lines_ : 1;
    list.reserve(count);
    if (!by_line_) {
      list.data[0] = {first_line_, 0, lines_, columns, 0};
      return;
    }
    for (int64_t i = 0; i < lines_; ++i) {
      const int64_t line = first_line_ + i;
      const int64_t first = i == 0 ? begin - line * columns : 0;
      const int64_t stop = i + 1 == lines_ ? end - line * columns : columns;
      list.data[i] = {line, first, 1, stop - first, i * height.packed(1) * pitch};
    }
  }

  // Writes the byte offset at which the first tap of each pixel reads. A packed position has `bytes` bytes, and the
  // sample starts at packed position `first`.
  void find_places(int64_t begin, int64_t end, int64_t first, int64_t bytes, uint32_t* places) const {
    const int64_t columns = args_.width.out;
    const Patch* patch = list.data;
    int64_t line = begin / columns, column = begin % columns;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t at = patch->at + (line - patch->line) * height.step * pitch + (column - patch->column) * width.step;
      *places++ = static_cast<uint32_t>((first + at) * bytes);
      if (++column < columns) continue;
      column = 0;
      ++line;
      if (by_line_) ++patch;
    }
  }

 private:
  const WeightGradArgs& args_;
  int64_t first_line_ = 0;
  int64_t lines_ = 0;
  bool by_line_ = false;
};

// How the reduction is divided into blocks: `samples` whole samples each or, if `samples` is 1, `pixels` pixels of one
// sample. The last block may be smaller.
struct Cut {
  int64_t samples;
  int64_t pixels;
};

// Returns the largest blocks whose input fits `room` packed positions, but at least one group.
inline Cut cut_pixels(const WeightGradArgs& args, Patches& patches, int64_t room) {
  const int64_t pixels = args.height.out * args.width.out;
  const int64_t m = args.pruning.m;
  patches.measure(0, pixels);
  if (patches.size <= room) return {at_least(at_most(room / patches.size, args.samples), 1), pixels};
  const int64_t line = args.width.out;
  for (int64_t size = at_most(pixels - 1, room) / m * m; size > m; size -= m) {
    const int64_t blocks = args.height.out == 1 ? 1 : at_most(ceil_div(pixels, size), line);
    int64_t block = 0;
    for (; block < blocks; ++block) {
      const int64_t end = (block + 1) * size < pixels ? (block + 1) * size : pixels;
      patches.measure(block * size, end);
      if (patches.size > room) break;
    }
    if (block == blocks) return {1, size};
  }
  return {1, at_most(m, pixels)};
}

}  // namespace sdgp::SDGP_ISA
