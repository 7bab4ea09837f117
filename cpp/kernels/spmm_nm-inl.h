// SPDX-License-Identifier: BSD-3-Clause
//
// The product of N:M rows with a dense matrix, and its gather form for convolutions: each result row is a sum, over
// taps, of one N:M row times the matrix of the tap. A plain product has one tap. This file divides the work and orders
// it for the caches; row_kernel-inl.h has the inner loops. Compiled once per instruction set.
#pragma once

#include "gather-inl.h"
#include "packer-inl.h"
#include "row_kernel-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kChunkRows = 256;        // result rows per load of the dense operand into the L1 cache
constexpr int64_t kSlabBytes = 3 << 18;    // kept values and offsets in the L2 cache
constexpr int64_t kResultBytes = 1 << 20;  // partial sums that wait for the next slab
constexpr int64_t kUnitsPerThread = 4;

// Units are chunks of result rows x convolution groups x parts of the panels. The division changes no result: every sum
// runs in the order of the blocks.
struct SpmmPlan {
  DensePlan dense;
  int64_t rows;  // rows of the result, over all samples
  int64_t chunks;
  int64_t parts;
  int64_t units;
};

template <class A>
SpmmPlan make_spmm_plan(const SpmmArgs& args) {
  SpmmPlan plan{};
  plan.dense = make_dense_plan<A>(args);
  plan.rows = args.samples * args.height.in * args.width.in;
  plan.chunks = ceil_div(plan.rows, kChunkRows);
  const int64_t panel_bytes = kChunkRows * plan.dense.width * static_cast<int64_t>(sizeof(typename A::Sum));
  // Each part repeats some work. It repeats more if it has to prune, so parts are larger then.
  plan.parts = ceil_div(plan.dense.panels * panel_bytes, args.gradient ? 4 * kResultBytes : kResultBytes);
  const int64_t wanted = args.threads > 1 ? ceil_div(kUnitsPerThread * args.threads, plan.chunks * args.groups) : 1;
  const int64_t most = ceil_div(plan.dense.panels, 3);  // each part reads all N:M rows again
  const int64_t split = wanted < most ? wanted : most;
  if (plan.parts < split) plan.parts = split;
  plan.units = plan.chunks * args.groups * plan.parts;
  return plan;
}

template <class C>
class Spmm {
  using T = typename C::T;
  using E = typename C::E;
  using A = ArithmeticOf<C>;
  using Packed = typename A::Packed;
  using Word = SDGP_ISA::Word<sizeof(T)>;

 public:
  static bool run(const SpmmArgs& args, int64_t begin, int64_t end) {
    Spmm spmm(args);
    for (int64_t unit = begin; unit < end; ++unit) spmm.run_unit(unit);
    return spmm.valid_;
  }

 private:
  // The number of kept values that are read at a time.
  static constexpr int64_t kStep = 16;
  // Stores write whole vectors. The excess falls into the next row, which is written later, or into the gap after a
  // block, which has this many elements.
  static constexpr int64_t kGap = 32;
  // In rows. A slab has too little of one row for the hardware prefetcher.
  static constexpr int64_t kAhead = 4;
  using Step = VecType<uint8_t, kStep>::type;
  using WideStep = VecType<uint16_t, 2 * kStep>::type;
  static constexpr VecType<int8_t, kStep>::type kStepLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  explicit Spmm(const SpmmArgs& args)
      : args_(args),
        plan_(make_spmm_plan<A>(args)),
        dense_(plan_.dense),
        gather_(args, dense_, kChunkRows),
        packer_(for_packing(args.pruning)) {}

  void run_unit(int64_t unit) {
    const int64_t part = unit % plan_.parts;
    panel_begin_ = dense_.panels * part / plan_.parts;
    panel_end_ = dense_.panels * (part + 1) / plan_.parts;
    // Otherwise the previous unit has left its sources and possibly its kept values.
    if (unit / plan_.parts != chunk_and_group_) {
      chunk_and_group_ = unit / plan_.parts;
      group_ = chunk_and_group_ % args_.groups;
      first_row_ = chunk_and_group_ / args_.groups * kChunkRows;
      rows_ = plan_.rows - first_row_ < kChunkRows ? plan_.rows - first_row_ : kChunkRows;
      gather_.find(first_row_, rows_);
      kept_end_ = 0;
    }

    const int64_t kept_bytes = static_cast<int64_t>(sizeof(uint16_t) + sizeof(Packed)) * gather_.sources;
    const int64_t block_kept = dense_.rows / args_.pruning.m * args_.pruning.n;
    int64_t slab_blocks = kSlabBytes / (kept_bytes * block_kept + 1);
    if (slab_blocks < 1) slab_blocks = 1;
    const int64_t slabs = ceil_div(dense_.blocks, slab_blocks);
    E* sums = sums_.reserve(rows_ * dense_.width * (slabs > 1 ? panel_end_ - panel_begin_ : 1));
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t block_begin = dense_.blocks * slab / slabs;
      const int64_t block_end = dense_.blocks * (slab + 1) / slabs;
      if (kept_begin_ != block_begin || kept_end_ != block_end) read_kept(block_begin, block_end);
      kept_begin_ = block_begin;
      kept_end_ = block_end;
      for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
        E* panel_sums = slabs > 1 ? sums + (panel - panel_begin_) * rows_ * dense_.width : sums;
        multiply_panel(panel, block_begin, block_end, panel_sums);
      }
    }
  }

  // Returns how many values of a source the blocks before this one keep, or have memory for.
  int64_t kept_before(int64_t block) const {
    if (!fixed_) return block * capacity();
    const int64_t groups = ceil_div(args_.size, args_.pruning.m);
    const int64_t before = block * (dense_.rows / args_.pruning.m);
    return (before < groups ? before : groups) * args_.pruning.n;
  }

  // Returns how many values of a source a block may keep, a multiple of what is multiplied together.
  int64_t capacity() const { return ceil_div(dense_.rows, A::kStep) * A::kStep; }

  // Brings the kept values and offsets of a slab into the order of the row kernel: [block][source][kept].
  void read_kept(int64_t block_begin, int64_t block_end) {
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

  // For place_row: for each kept value of a row from `begin` on, finds where its group begins in the block, and the
  // last valid index of its group.
  void find_bases(int64_t begin, int64_t count) {
    uint16_t* base = base_.reserve(count + kStep);
    uint8_t* last = last_.reserve(count + kStep);
    const auto row_bytes = static_cast<uint16_t>(dense_.row_bytes(sizeof(Packed)));
    for (int64_t i = 0; i < count + kStep; ++i) {
      const int64_t first = (begin + i) / args_.pruning.n * args_.pruning.m;
      const int64_t left = args_.size - first;
      base[i] = static_cast<uint16_t>(first % dense_.rows * row_bytes);
      last[i] = i < count ? static_cast<uint8_t>((left < args_.pruning.m ? left : args_.pruning.m) - 1) : 255;
    }
  }

  // Does the same from an uncompressed gradient: prunes and packs some rows at a time, in the L1 cache.
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
      Word* words = row_values_.reserve(piece * count + kStep);
      uint8_t* indices = row_indices_.reserve(piece * count + kStep);
      for (int64_t r = 0; r < rows; ++r) {
        packer_.pack_row(buffer + r * part.size, part.size, words + r * count, indices + r * count);
      }
      const T* values = reinterpret_cast<const T*>(words);
      for (int64_t r = 0; r < rows; ++r) {
        place_row(s + r, values + r * count, indices + r * count, count, values + piece * count + kStep);
      }
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
      if constexpr (A::kStep == 2) {
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
        Word* const words = row_values_.reserve(length + kStep);
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
    Step bad{};
    int64_t gap = 0;
    for (int64_t i = 0; i < count; i += block_kept, gap += kGap) {
      const int64_t length = count - i < block_kept ? count - i : block_kept;
      const int64_t to = i * gather_.sources + s * length + gap;
      for (int64_t j = 0; j < length; j += kStep) {
        const T* value = row + i + j;
        const uint8_t* index = row_indices + i + j;
        T value_copy[kStep];
        uint8_t index_copy[kStep];
        __builtin_prefetch(value + kAhead * args_.compressed.row_stride);
        __builtin_prefetch(index + kAhead * args_.compressed.row_stride);
        if (value + kStep > end) [[unlikely]] {
          for (int64_t k = 0; k < kStep; ++k) {
            value_copy[k] = j + k < length ? value[k] : T{};
            index_copy[k] = j + k < length ? index[k] : 0;
          }
          value = value_copy;
          index = index_copy;
        }
        Packing<C>::elements(value, values + to + j, kStep);
        const auto at_index = load_bits<Step>(index);
        const auto limit = load_bits<Step>(last + i + j);
        const Step safe = at_index < limit ? at_index : limit;
        const Step inside = (Step)(kStepLanes < static_cast<int8_t>(length - j < kStep ? length - j : kStep));
        bad |= (safe ^ at_index) & inside;
        const auto rows = __builtin_convertvector(safe, WideStep);
        store_bits(offsets + to + j, load_bits<WideStep>(base + i + j) + rows * row_bytes);
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

  void multiply_panel(int64_t panel, int64_t block_begin, int64_t block_end, E* sums) {
    const int64_t first_col = panel * dense_.width;
    const int64_t cols = args_.cols - first_col < dense_.width ? args_.cols - first_col : dense_.width;
    const bool direct = sizeof(T) == sizeof(E) && !args_.out_channels_first && cols == dense_.width &&
                        gather_.lists.data[gather_.sets - 1].count == rows_;
    const auto* packed = static_cast<const Packed*>(args_.packed) + dense_.panel_offset(args_, group_, panel);
    BlockCall<A> call{};
    call.in = sums;
    call.in_stride = dense_.width;
    const bool plain = is_plain_product(args_);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t kept =
          (kept_before(block) - kept_before(block_begin)) * gather_.sources + (block - block_begin) * kGap;
      call.kept = {values_.data + kept, offsets_.data + kept, kept_before(block + 1) - kept_before(block),
                   fixed_ ? nullptr : starts_.data + (block - block_begin) * (gather_.sources + 1)};
      call.tap_bytes = dense_.block_rows(args_, block) * dense_.row_bytes(sizeof(Packed));
      const char* dense = reinterpret_cast<const char*>(packed + dense_.block_offset(block));
      for (int64_t set = 0; set < gather_.sets; ++set) {
        const EntryList& list = gather_.lists.data[set];
        const bool first = block == 0 && set == 0;
        const bool last = block + 1 == dense_.blocks && set + 1 == gather_.sets;
        call.entries = list.entries;
        call.count = list.count;
        call.taps = list.taps;
        call.dense = dense + set * dense_.tap_set * call.tap_bytes;
        call.next = call.dense + call.taps * call.tap_bytes;
        call.next_lines = last ? 0 : ceil_div(call.taps * call.tap_bytes / 64, list.count + 1);
        const bool to_result = last && direct;
        call.out = to_result ? static_cast<E*>(args_.out) + result_offset(first_row_, first_col) : sums;
        call.out_stride = to_result ? args_.groups * args_.cols : dense_.width;
        if (plain) {
          multiply_plain(call, first);
        } else {
          multiply_block_of(dense_.panel, first, call);
        }
      }
    }
    if (block_end == dense_.blocks && !direct) store_panel(sums, first_col, cols);
  }

  void multiply_plain(const BlockCall<A>& call, bool first) {
    constexpr int64_t kRowsPerFetch = 4;
    const int64_t fetches = ceil_div(rows_, kRowsPerFetch);
    const int64_t piece = ceil_div(call.next_lines > 0 ? call.tap_bytes / 64 : 0, fetches) * 64;
    Ahead ahead{.strips = &call.next, .count = piece > 0, .pieces = fetches, .step = piece, .bytes = piece};
    multiply_taps_of<A, uint16_t>(dense_.panel, 1, first,
                                  {.kept = call.kept,
                                   .rows = rows_,
                                   .dense = call.dense,
                                   .tap_bytes = 0,
                                   .in = call.in,
                                   .in_stride = call.in_stride,
                                   .out = call.out,
                                   .out_stride = call.out_stride,
                                   .ahead = &ahead,
                                   .fetches = fetches});
  }

  int64_t result_offset(int64_t row, int64_t col) const {
    const int64_t channel = group_ * args_.cols + col;
    const int64_t channels = args_.groups * args_.cols;
    if (!args_.out_channels_first) return row * channels + channel;
    const int64_t per_sample = args_.height.in * args_.width.in;
    return (row / per_sample * channels + channel) * per_sample + row % per_sample;
  }

  void store_panel(const E* sums, int64_t first_col, int64_t cols) {
    T* const out = static_cast<T*>(args_.out);
    if (!args_.out_channels_first) {
      for (int64_t r = 0; r < rows_; ++r) {
        store_elements<C>(sums + r * dense_.width, out + result_offset(first_row_ + r, first_col), cols);
      }
      return;
    }
    const int64_t per_sample = args_.height.in * args_.width.in;
    for (int64_t r = 0; r < rows_;) {  // the rows of one sample are contiguous in every channel
      const int64_t left = per_sample - (first_row_ + r) % per_sample;
      const int64_t run = left < rows_ - r ? left : rows_ - r;
      E* column = column_.reserve(kChunkRows);
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = 0; i < run; ++i) column[i] = sums[(r + i) * dense_.width + j];
        store_elements<C>(column, out + result_offset(first_row_ + r, first_col + j), run);
      }
      r += run;
    }
  }

  // The settings of a packer that keeps n of every m elements, or those that are not +0.
  static Pruning for_packing(Pruning pruning) {
    if (!pruning.fixed()) pruning.n = 0;
    return pruning;
  }

  const SpmmArgs& args_;
  const SpmmPlan plan_;
  const bool fixed_ = args_.pruning.fixed();
  const DensePlan& dense_;
  Gather gather_;
  bool valid_ = true;
  int64_t chunk_and_group_ = -1;
  int64_t kept_begin_ = 0;  // in blocks
  int64_t kept_end_ = 0;
  int64_t group_ = 0;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t panel_begin_ = 0;
  int64_t panel_end_ = 0;
  const Packer<Word> packer_;
  PrunedRows<Word> pruned_;
  Scratch<Word> row_values_;
  Scratch<uint8_t> row_indices_;
  Scratch<uint16_t> base_;
  Scratch<uint8_t> last_;
  Scratch<uint16_t> offsets_;
  Scratch<Packed> values_;
  Scratch<uint32_t> starts_;  // by block and source: where its kept values begin in the block
  Scratch<E> sums_;
  Scratch<E> column_;
};

template <bool kPairs>
int64_t spmm_nm_units(const SpmmArgs& args) {
  return visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    return make_spmm_plan<ArithmeticOf<ProductLanes<kDType, kPairs>>>(args).units;
  });
}

template <bool kPairs>
bool spmm_nm_kernel(const SpmmArgs& args, int64_t begin, int64_t end) {
  return visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    return Spmm<ProductLanes<kDType, kPairs>>::run(args, begin, end);
  });
}

}  // namespace sdgp::SDGP_ISA
