// SPDX-License-Identifier: BSD-3-Clause
//
// Brings the kept values of N:M rows into the order in which the row kernel reads them. They come from a compressed
// operand, or from a gradient that is pruned on the way. Compiled once per instruction set.
#pragma once

#include "gather-inl.h"
#include "packer-inl.h"
#include "row_kernel-inl.h"

namespace sdgp::SDGP_ISA {

// The kept values of one slab of the reduction, for the N:M rows that a chunk of result rows needs, as
// [block][source][kept]. If rows keep different numbers of values, each source begins where the previous one ends.
template <class C>
class KeptValues {
  using T = typename C::T;
  using A = ArithmeticOf<C>;
  using Packed = typename A::Packed;
  using Word = SDGP_ISA::Word<sizeof(T)>;

 public:
  KeptValues(const SpmmArgs& args, const DensePlan& dense, const Gather& gather)
      : args_(args), dense_(dense), gather_(gather), packer_(for_packing(args.pruning)) {}

  // Reads the blocks from `block_begin` to `block_end` of the rows that `gather` has found, in one convolution group.
  void read(int64_t group, int64_t block_begin, int64_t block_end) {
    group_ = group;
    block_begin_ = block_begin;
    const int64_t begin = kept_before(block_begin);
    const int64_t count = kept_before(block_end) - begin;
    const int64_t blocks = block_end - block_begin;
    offsets_.reserve(count * gather_.sources + blocks * kGap);
    values_.reserve(count * gather_.sources + blocks * kGap);
    if (args_.gradient != nullptr) return compress_rows(block_begin, block_end, count);
    find_bases(begin, count);
    const T* const values = static_cast<const T*>(args_.compressed.values);
    const int64_t end = source_offset(gather_.first_source + gather_.sources - 1) + begin + count;
    for (int64_t s = 0; s < gather_.sources; ++s) {
      const int64_t at = source_offset(gather_.first_source + s) + begin;
      place_row(s, values + at, args_.compressed.indices + at, count, values + end);
    }
  }

  // Returns one of the blocks that were read.
  KeptBlock<Packed> block(int64_t at) const {
    const int64_t before = at - block_begin_;
    const int64_t kept = (kept_before(at) - kept_before(block_begin_)) * gather_.sources + before * kGap;
    return {values_.data + kept, offsets_.data + kept, kept_before(at + 1) - kept_before(at),
            fixed_ ? nullptr : starts_.data + before * (gather_.sources + 1)};
  }

  // Returns whether all indices so far were in range.
  bool valid() const { return valid_; }

 private:
  // The number of kept values that are read at a time.
  static constexpr int64_t kRead = 16;
  // Stores write whole vectors. The excess falls into the next row, which is written later, or into the gap after a
  // block, which has this many elements.
  static constexpr int64_t kGap = 32;
  // In rows. A slab has too little of one row for the hardware prefetcher.
  static constexpr int64_t kAhead = 4;
  using Read = VecType<uint8_t, kRead>::type;
  using WideRead = VecType<uint16_t, 2 * kRead>::type;
  static constexpr VecType<int8_t, kRead>::type kReadLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // Returns how many values of a source the blocks before `block` keep, or have memory for.
  int64_t kept_before(int64_t block) const {
    if (!fixed_) return block * capacity();
    const int64_t groups = ceil_div(args_.size, args_.pruning.m);
    const int64_t before = block * (dense_.rows / args_.pruning.m);
    return (before < groups ? before : groups) * args_.pruning.n;
  }

  // Returns how many values of a source a block may keep, a multiple of what is multiplied together.
  int64_t capacity() const { return ceil_div(dense_.rows, A::kStep) * A::kStep; }

  // Reads from a gradient that is not compressed: prunes and packs some rows at a time, in the L1 cache.
  void compress_rows(int64_t block_begin, int64_t block_end, int64_t count) {
    const Gradient& gradient = *args_.gradient;
    const int64_t first = block_begin * dense_.rows;
    const int64_t last = block_end * dense_.rows < args_.size ? block_end * dense_.rows : args_.size;
    const int64_t pixels = args_.height.out * args_.width.out;
    const bool one_run = !gradient.by_conv_group && gradient.sample_stride == pixels * gradient.pixel_stride;
    const int64_t row_groups = gradient.by_conv_group || args_.groups == 1
                                   ? ceil_div(args_.size, args_.pruning.m)
                                   : args_.size / args_.pruning.m * args_.groups;
    PruneArgs part{};
    part.dtype = args_.dtype;
    part.pruning = args_.pruning;
    part.size = last - first;
    part.in_stride = gradient.channel_stride;
    part.row_groups = row_groups;
    const int64_t least = gradient.channel_stride == 1 ? 1 : 64;  // rows that lie side by side
    const int64_t piece = kCompressElements / part.size > least ? kCompressElements / part.size : least;
    const bool whole = part.size % args_.pruning.m == 0;
    const bool placed = Packing<C>::kMoved && whole && packer_.places(part.size) && packer_.places(dense_.rows);
    if (fixed_ && !placed) find_bases(kept_before(block_begin), count);
    if (!fixed_) begin_blocks(block_end - block_begin);
    for (int64_t s = 0, rows = 0; s < gather_.sources; s += rows) {
      const int64_t source = gather_.first_source + s;
      const int64_t sample = one_run ? 0 : source / pixels;
      const int64_t pixel = source - sample * pixels;
      rows = gather_.sources - s < piece ? gather_.sources - s : piece;
      if (!one_run && rows > pixels - pixel) rows = pixels - pixel;
      part.in = static_cast<const T*>(gradient.data) + sample * gradient.sample_stride + pixel * gradient.pixel_stride +
                (group_ * args_.size + first) * gradient.channel_stride;
      const int64_t row = gradient.by_conv_group ? (sample * args_.groups + group_) * pixels + pixel : source;
      const int64_t groups_before = gradient.by_conv_group ? 0 : group_ * (args_.size / args_.pruning.m);
      part.first_group = static_cast<uint64_t>(row * row_groups + groups_before + first / args_.pruning.m);
      part.dims[0] = {rows, gradient.pixel_stride, 0, 1, false};
      if (part.in_stride == 1) prefetch_rows(part, s + rows < gather_.sources ? rows : 0);
      const Word* buffer = pruned_.read(part, args_.pruning.keeps_all());
      if (!fixed_) {
        for (int64_t r = 0; r < rows; ++r) place_nonzeros(s + r, buffer + r * part.size, part.size);
        continue;
      }
      if (placed) {
        for (int64_t r = 0; r < rows; ++r) place_pruned(s + r, buffer + r * part.size, part.size);
        continue;
      }
      Word* words = row_values_.reserve(piece * count + kRead);
      uint8_t* indices = row_indices_.reserve(piece * count + kRead);
      for (int64_t r = 0; r < rows; ++r) {
        packer_.pack_row(buffer + r * part.size, part.size, words + r * count, indices + r * count);
      }
      const T* values = reinterpret_cast<const T*>(words);
      for (int64_t r = 0; r < rows; ++r) {
        place_row(s + r, values + r * count, indices + r * count, count, values + piece * count + kRead);
      }
    }
  }

  // For place_row: for each kept value of a row from `begin` on, finds where its group begins in the block, and the
  // last valid index of its group.
  void find_bases(int64_t begin, int64_t count) {
    uint16_t* base = base_.reserve(count + kRead);
    uint8_t* last = last_.reserve(count + kRead);
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(Packed)));
    for (int64_t i = 0; i < count + kRead; ++i) {
      const int64_t first = (begin + i) / args_.pruning.n * args_.pruning.m;
      const int64_t left = args_.size - first;
      base[i] = static_cast<uint16_t>(first % dense_.rows * row_bytes);
      last[i] = i < count ? static_cast<uint8_t>((left < args_.pruning.m ? left : args_.pruning.m) - 1) : 255;
    }
  }

  // Prefetches the `rows` rows after those of `part`. A slab has too little of each row for the hardware prefetcher.
  static void prefetch_rows(const PruneArgs& part, int64_t rows) {
    const T* row = static_cast<const T*>(part.in) + part.dims[0].size * part.dims[0].in_stride;
    for (int64_t r = 0; r < rows; ++r, row += part.dims[0].in_stride) {
      for (int64_t i = 0; i < part.size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
    }
  }

  // Stores the pruned elements of one row (whole groups) at their places.
  SDGP_INLINE void place_pruned(int64_t s, const Word* row, int64_t size) {
    const int64_t block_kept = dense_.rows / args_.pruning.m * args_.pruning.n;
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(Packed)));
    int64_t first_kept = 0;  // of the block, over all sources
    for (int64_t i = 0; i < size; i += dense_.rows) {
      const int64_t length = size - i < dense_.rows ? size - i : dense_.rows;
      const int64_t to = first_kept + s * (length / args_.pruning.m * args_.pruning.n);
      packer_.place_block(row + i, length, reinterpret_cast<Word*>(values_.data) + to, offsets_.data + to, row_bytes);
      first_kept += block_kept * gather_.sources + kGap;
    }
  }

  // For place_nonzeros: the rows of each block begin where its memory begins.
  void begin_blocks(int64_t blocks) {
    uint32_t* starts = starts_.reserve(blocks * (gather_.sources + 1));
    for (int64_t b = 0; b < blocks; ++b) starts[b * (gather_.sources + 1)] = 0;
  }

  // Stores the elements of one pruned row that are not +0. The rows must come in order.
  SDGP_INLINE void place_nonzeros(int64_t s, const Word* row, int64_t size) {
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(Packed)));
    const int64_t block_capacity = capacity() * gather_.sources + kGap;
    uint32_t* starts = starts_.data + s;
    int64_t first = 0;  // of the block
    for (int64_t i = 0; i < size; i += dense_.rows, first += block_capacity, starts += gather_.sources + 1) {
      const int64_t length = size - i < dense_.rows ? size - i : dense_.rows;
      Packed* values = values_.data + first + starts[0];
      uint16_t* offsets = offsets_.data + first + starts[0];
      int64_t kept = 0;
      if constexpr (A::kPairs) {
        kept = place_words(row + i, length, values, offsets, row_bytes);
      } else if (length % args_.pruning.m != 0 || !packer_.places(length)) {
        for (int64_t j = 0; j < length; ++j) {
          if (row[i + j] == 0) continue;
          values[kept] = Packing<C>::element(reinterpret_cast<const T*>(row) + i + j);
          offsets[kept++] = static_cast<uint16_t>(j * row_bytes);
        }
      } else if constexpr (Packing<C>::kMoved) {
        Word* const words = reinterpret_cast<Word*>(values);
        kept = packer_.place_block(row + i, length, words, offsets, row_bytes) - words;
      } else {
        Word* const words = row_values_.reserve(length + kRead);
        kept = packer_.place_block(row + i, length, words, offsets, row_bytes) - words;
        Packing<C>::elements(reinterpret_cast<const T*>(words), values, kept);
      }
      for (; kept % A::kStep != 0; ++kept) {  // so that no row ends with a part of a step
        values[kept] = 0;
        offsets[kept] = offsets[kept - 1];
      }
      starts[1] = starts[0] + static_cast<uint32_t>(kept);
    }
  }

  // Stores the kept values of one row at their places. An index out of range clears `valid_` and is replaced by the
  // last index in range. Nothing may be read from `end` on.
  SDGP_INLINE void place_row(int64_t s, const T* row, const uint8_t* row_indices, int64_t count, const T* end) {
    const int64_t block_kept = dense_.rows / args_.pruning.m * args_.pruning.n;
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(Packed)));
    const uint16_t* base = base_.data;
    const uint8_t* last = last_.data;
    uint16_t* offsets = offsets_.data;
    Packed* values = values_.data;
    Read bad{};
    int64_t gap = 0;
    for (int64_t i = 0; i < count; i += block_kept, gap += kGap) {
      const int64_t length = count - i < block_kept ? count - i : block_kept;
      const int64_t to = i * gather_.sources + s * length + gap;
      for (int64_t j = 0; j < length; j += kRead) {
        const T* value = row + i + j;
        const uint8_t* index = row_indices + i + j;
        T value_copy[kRead];
        uint8_t index_copy[kRead];
        __builtin_prefetch(value + kAhead * args_.compressed.row_stride);
        __builtin_prefetch(index + kAhead * args_.compressed.row_stride);
        if (value + kRead > end) [[unlikely]] {
          for (int64_t k = 0; k < kRead; ++k) {
            value_copy[k] = j + k < length ? value[k] : T{};
            index_copy[k] = j + k < length ? index[k] : 0;
          }
          value = value_copy;
          index = index_copy;
        }
        Packing<C>::elements(value, values + to + j, kRead);
        const auto at_index = load_bits<Read>(index);
        const auto limit = load_bits<Read>(last + i + j);
        const Read safe = at_index < limit ? at_index : limit;
        const Read inside = (Read)(kReadLanes < static_cast<int8_t>(length - j < kRead ? length - j : kRead));
        bad |= (safe ^ at_index) & inside;
        const auto rows = __builtin_convertvector(safe, WideRead);
        store_bits(offsets + to + j, load_bits<WideRead>(base + i + j) + rows * row_bytes);
      }
    }
    const auto halves = (VecType<uint64_t, 16>::type)bad;
    if (halves[0] | halves[1]) valid_ = false;
  }

  int64_t source_offset(int64_t source) const {
    const int64_t per_sample = args_.height.out * args_.width.out;
    return source / per_sample * args_.compressed.sample_stride + source % per_sample * args_.compressed.row_stride +
           group_ * args_.compressed.group_stride;
  }

  // The settings of a packer that keeps n of every m elements, or those that are not +0.
  static Pruning for_packing(Pruning pruning) {
    if (!pruning.fixed()) pruning.n = 0;
    return pruning;
  }

  const SpmmArgs& args_;
  const DensePlan& dense_;
  const Gather& gather_;
  const bool fixed_ = args_.pruning.fixed();
  bool valid_ = true;
  int64_t group_ = 0;
  int64_t block_begin_ = 0;
  const Packer<Word> packer_;
  PrunedRows<Word> pruned_;
  Scratch<Word> row_values_;
  Scratch<uint8_t> row_indices_;
  Scratch<uint16_t> base_;
  Scratch<uint8_t> last_;
  Scratch<uint16_t> offsets_;
  Scratch<Packed> values_;
  Scratch<uint32_t> starts_;  // by block and source: where its kept values begin in the block
};

}  // namespace sdgp::SDGP_ISA
