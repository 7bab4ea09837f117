// SPDX-License-Identifier: BSD-3-Clause
//
// Packs the input that a block of output pixels reads. The columns of a position are contiguous, and the distance from
// a pixel to each of its taps is the same for all pixels (Note [Patches]). Compiled once per instruction set.
#pragma once

#include "patches-inl.h"
#include "row_kernel-inl.h"

namespace sdgp::SDGP_ISA {

// Pixels [begin, end) of each of `samples` samples.
struct PixelBlock {
  int64_t sample;
  int64_t samples;
  int64_t begin;
  int64_t end;

  int64_t size() const { return samples * (end - begin); }
};

// Consecutive columns of the input. `first` counts over all convolution groups.
struct Columns {
  int64_t first;
  int64_t count;
};

template <class C>
class PackedInput {
  using T = typename C::T;
  using Packed = typename ArithmeticOf<C>::Packed;

 public:
  int64_t pitch = 0;  // positions from one line to the next in the last result of pack()

  // `width` is the number of columns of a packed position. Missing columns are zero.
  PackedInput(const WeightGradArgs& args, int64_t width) : args_(args), width_(width), patches_(args) {}

  // Returns [sample][patch][line][position][column], valid until the next call.
  const Packed* pack(const PixelBlock& block, const Columns& columns) {
    patches_.find(block.begin, block.end);
    pitch = patches_.pitch;
    Packed* to = packed_.reserve(block.samples * patches_.size * width_);
    for (int64_t s = 0; s < block.samples; ++s, to += patches_.size * width_) {
      for (int64_t i = 0; i < patches_.count; ++i) {
        const Patch& patch = patches_.list.data[i];
        const Strip strip = strip_of(patch);
        Packed* line = to + patch.at * width_;
        for (int64_t y = 0; y < patches_.height.packed(patch.lines); ++y, line += pitch * width_) {
          pack_line(strip, line_of(patch, strip, y, columns.first, block.sample + s), columns.count, line);
        }
      }
    }
    return packed_.data;
  }

  // Returns the memory that packing this block will read. The result is valid until the next call.
  Ahead ahead(const PixelBlock& block, const Columns& columns) {
    patches_.find(block.begin, block.end);
    int64_t most = 0;
    for (int64_t i = 0; i < patches_.count; ++i) most += patches_.height.packed(patches_.list.data[i].lines);
    const char** strips = strips_.reserve(most * block.samples);
    int64_t count = 0, longest = 0;
    for (int64_t s = 0; s < block.samples; ++s) {
      for (int64_t i = 0; i < patches_.count; ++i) {
        const Patch& patch = patches_.list.data[i];
        const Strip strip = strip_of(patch);
        longest = at_least(longest, strip.count);
        for (int64_t y = 0; y < patches_.height.packed(patch.lines); ++y) {
          const T* line = line_of(patch, strip, y, columns.first, block.sample + s);
          if (line) strips[count++] = reinterpret_cast<const char*>(line);
        }
      }
    }
    const int64_t bytes = sizeof(T), step = patches_.width.jump * args_.pixel_stride * bytes;
    if (args_.col_stride == 1) return {strips, count, longest, step, columns.count * bytes};
    return {strips, count, columns.count, args_.col_stride * bytes, longest * step};
  }

 private:
  // The positions that a packed line of a patch takes from a line of the input. Zeros surround them.
  struct Strip {
    int64_t before;  // number of zeros before them
    int64_t count;   // number of positions of the input
    int64_t length;  // positions of the packed line
    int64_t first;   // first position of the input
  };

  Strip strip_of(const Patch& patch) const {
    const int64_t length = patches_.width.packed(patch.columns), jump = patches_.width.jump;
    const int64_t first = patch.column * args_.width.stride - args_.width.padding;
    const int64_t before = first < 0 ? at_most(ceil_div(-first, jump), length) : 0;
    const int64_t inside = args_.width.in - first;  // number of positions from `first` on
    const int64_t stop = inside > 0 ? at_most(ceil_div(inside, jump), length) : 0;
    return {before, at_least(stop - before, 0), length, first + before * jump};
  }

  // Returns where the strip begins in the input line that packed line `y` of a patch holds, or null if the line is
  // outside the input.
  const T* line_of(const Patch& patch, const Strip& strip, int64_t y, int64_t first_col, int64_t sample) const {
    const int64_t at = patch.line * args_.height.stride - args_.height.padding + y * patches_.height.jump;
    if (at < 0 || at >= args_.height.in) return nullptr;
    return static_cast<const T*>(args_.input) + sample * args_.sample_stride + first_col * args_.col_stride +
           at * args_.line_stride + strip.first * args_.pixel_stride;
  }

  // Packs one line. `from` is where its strip begins in the input, or null if the line is outside the input.
  void pack_line(const Strip& strip, const T* from, int64_t cols, Packed* to) {
    if (from == nullptr || strip.count == 0) return clear(to, strip.length * width_);
    clear(to, strip.before * width_);
    to += strip.before * width_;
    clear(to + strip.count * width_, (strip.length - strip.before - strip.count) * width_);
    const int64_t step = patches_.width.jump * args_.pixel_stride;
    constexpr int kL = kLanes<Packed>;
    int64_t i = 0;
    if (args_.col_stride != 1 && step == 1) {
      for (; i + kL <= strip.count; i += kL) {
        for (int64_t c = 0; c < width_; c += kL) {
          Vec<Packed> tile[kL];
#pragma GCC unroll 64
          for (int j = 0; j < kL; ++j) {
            tile[j] = c + j < cols ? Packing<C>::load(from + i + (c + j) * args_.col_stride) : Vec<Packed>{};
          }
          transpose<Packed, kL>(tile);
#pragma GCC unroll 64
          for (int j = 0; j < kL; ++j) Packing<C>::store_columns(to + (i + j) * width_ + c, tile[j]);
        }
      }
    }
    for (; i < strip.count; ++i) {
      Packing<C>::columns(from + i * step, args_.col_stride, cols, to + i * width_, width_);
    }
  }

  static SDGP_INLINE void clear(Packed* to, int64_t count) {
    if (count > 0) std::memset(to, 0, static_cast<size_t>(count) * sizeof(Packed));
  }

  const WeightGradArgs& args_;
  const int64_t width_;
  Patches patches_;
  Scratch<Packed> packed_;
  Scratch<const char*> strips_;
};

}  // namespace sdgp::SDGP_ISA
