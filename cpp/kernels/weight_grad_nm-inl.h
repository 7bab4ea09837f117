// SPDX-License-Identifier: BSD-3-Clause
//
// The weight gradient of a convolution. Its output gradient is pruned along the pixels on the way. Each output channel
// is a sum, over its kept pixels, of gradient times the input that each tap meets there. The plain product of a linear
// layer has one tap; its tokens are the pixels of one sample. Nothing is unfolded. Compiled once per instruction set.
//
// The loops, from outer to inner: chunks of output channels; slabs of the reduction, whose kept values fit the L2
// cache; panels of input channels; blocks of pixels, whose input is packed into the L1 cache; taps; output channels.
// All channels of a chunk and all taps use the packed input. So packing costs little, and no copy of the whole input is
// needed.
#pragma once

#include "pack_input-inl.h"
#include "packer-inl.h"
#include "spmm_nm-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kPrunedElements = 8192;  // elements that are pruned at a time, into the L1 cache
constexpr int64_t kNeighbors = 128;        // output channels at a time, if they lie side by side
constexpr int64_t kWeightRows = 768;       // output channels of a chunk

// Units are chunks of output channels x convolution groups x parts of the panels. The division changes no result: every
// sum runs in the order of the blocks.
struct WeightGradPlan {
  int64_t panel;  // in vectors
  int64_t panels;
  int64_t width;  // in columns
  int64_t taps;   // taps of one kernel line per call
  Cut cut;
  int64_t pixels;      // per sample
  int64_t groups;      // groups of m, per sample
  int64_t per_sample;  // blocks per sample, if a block belongs to one sample
  int64_t blocks;
  int64_t chunk_rows;
  int64_t chunks;
  int64_t parts;
  int64_t units;

  int64_t kept(int64_t size, const Pruning& pruning) const { return ceil_div(size, pruning.m) * pruning.n; }
};

// Estimates the cycles of a tap kernel per pixel of a block, for all panels: two loads per cycle, chains of additions
// with a latency of four cycles that partly overlap between rows, and the transfer of sums to and from the L2 cache.
inline double cycles_per_pixel(int64_t vectors, int64_t panels, double kept, double pixels) {
  const double loads = kept * static_cast<double>(vectors + 2) / 2, chain = kept * 3.2;
  return ((loads > chain ? loads : chain) + 2 * static_cast<double>(vectors) + 8) * static_cast<double>(panels) /
         pixels;
}

template <class A>
WeightGradPlan make_weight_grad_plan(const WeightGradArgs& args) {
  constexpr int kL = kLanes<typename A::Sum>;
  WeightGradPlan plan{};
  plan.pixels = args.height.out * args.width.out;
  plan.groups = ceil_div(plan.pixels, args.pruning.m);
  plan.taps = at_most(args.width.kernel, kMaxTaps);
  const int64_t vectors = ceil_div(args.cols, A::kVectors * kL) * A::kVectors;
  Patches patches(args);
  double best = 0;
  const int64_t widest = at_most(at_most(vectors, kMaxPanel), kMaxSums / plan.taps);
  for (int64_t panel = A::kVectors; panel <= widest; panel += A::kVectors) {
    const int64_t panels = ceil_div(vectors, panel);
    const int64_t bytes = panel * kL * static_cast<int64_t>(sizeof(typename A::Packed));
    const Cut cut = cut_pixels(args, patches, block_bytes() / bytes);
    const int64_t size = cut.samples * cut.pixels;
    const double kept = static_cast<double>(plan.kept(cut.pixels, args.pruning) * cut.samples);
    const double cycles = cycles_per_pixel(panel * plan.taps, panels, kept, static_cast<double>(size));
    if (plan.panel != 0 && cycles >= best) continue;
    best = cycles;
    plan.panel = panel;
    plan.panels = panels;
    plan.cut = cut;
  }
  plan.width = plan.panel * kL;
  plan.per_sample = ceil_div(plan.pixels, plan.cut.pixels);
  plan.blocks = plan.cut.samples > 1 ? ceil_div(args.samples, plan.cut.samples) : args.samples * plan.per_sample;
  plan.chunks = ceil_div(args.rows, kWeightRows);
  const int64_t taps = args.height.kernel * args.width.kernel;
  const int64_t panel_bytes = kWeightRows * taps * plan.width * static_cast<int64_t>(sizeof(typename A::Sum));
  plan.parts = at_most(ceil_div(plan.panels * panel_bytes, 4 * kResultBytes), plan.panels);
  const int64_t wanted = args.threads > 1 ? kUnitsPerThread * args.threads : 1;
  // Each part prunes again. Each chunk packs again, which costs less.
  while (plan.chunks * args.groups * plan.parts < wanted && plan.chunks * 32 < args.rows) plan.chunks *= 2;
  while (plan.chunks * args.groups * plan.parts < wanted && plan.parts * 2 <= plan.panels) plan.parts *= 2;
  plan.chunk_rows = ceil_div(args.rows, plan.chunks);
  plan.chunks = ceil_div(args.rows, plan.chunk_rows);
  plan.units = plan.chunks * args.groups * plan.parts;
  return plan;
}

template <class C>
class WeightGrad {
  using T = typename C::T;
  using E = typename C::E;
  using A = ArithmeticOf<C>;
  using Packed = typename A::Packed;
  using Word = SDGP_ISA::Word<sizeof(T)>;

 public:
  static void run(const WeightGradArgs& args, int64_t begin, int64_t end) {
    WeightGrad grad(args);
    for (int64_t unit = begin; unit < end; ++unit) grad.run_unit(unit);
  }

 private:
  struct Block : PixelBlock {
    int64_t kept;      // kept values per row, or the memory for them
    int64_t at;        // where the kept values of the first row begin
    uint32_t* starts;  // where those of each row begin, counted from there; null if all rows keep equally many
  };

  explicit WeightGrad(const WeightGradArgs& args)
      : args_(args),
        plan_(make_weight_grad_plan<A>(args)),
        patches_(args),
        input_(args, plan_.width),
        taps_(args.height.kernel * args.width.kernel) {}

  void run_unit(int64_t unit) {
    const int64_t part = unit % plan_.parts;
    panel_begin_ = plan_.panels * part / plan_.parts;
    panel_end_ = plan_.panels * (part + 1) / plan_.parts;
    group_ = unit / plan_.parts % args_.groups;
    first_row_ = unit / plan_.parts / args_.groups * plan_.chunk_rows;
    rows_ = at_most(args_.rows - first_row_, plan_.chunk_rows);
    const int64_t row_bytes = rows_ * static_cast<int64_t>(sizeof(uint32_t) + sizeof(Packed));
    const int64_t block_kept = plan_.kept(plan_.cut.pixels, args_.pruning) * plan_.cut.samples;
    const int64_t slabs = ceil_div(plan_.blocks, at_least(kSlabBytes / (row_bytes * block_kept), 1));
    const int64_t panel_sums = rows_ * taps_ * plan_.width;
    sums_.reserve(panel_sums * (slabs > 1 ? panel_end_ - panel_begin_ : 1));
    for (int64_t slab = 0; slab < slabs; ++slab) {
      read_kept(plan_.blocks * slab / slabs, plan_.blocks * (slab + 1) / slabs);
      for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
        E* sums = sums_.data + (slabs > 1 ? (panel - panel_begin_) * panel_sums : 0);
        for (int64_t i = 0; i < count_; ++i) multiply_block(panel, i, slab == 0 && i == 0, sums);
        if (slab + 1 == slabs) store_panel(panel, sums);
      }
    }
  }

  Block block_at(int64_t index) const {
    if (plan_.cut.samples > 1) {
      const int64_t sample = index * plan_.cut.samples;
      return {{sample, at_most(args_.samples - sample, plan_.cut.samples), 0, plan_.pixels}, 0, 0, nullptr};
    }
    const int64_t begin = index % plan_.per_sample * plan_.cut.pixels;
    return {{index / plan_.per_sample, 1, begin, at_most(begin + plan_.cut.pixels, plan_.pixels)}, 0, 0, nullptr};
  }

  // Prunes a slab of the chunk's rows and packs the kept values as [block][row][kept].
  void read_kept(int64_t begin, int64_t end) {
    count_ = end - begin;
    Block* blocks = blocks_.reserve(count_);
    uint32_t* starts = fixed_ ? nullptr : starts_.reserve(count_ * (rows_ + 1));
    int64_t at = 0;
    for (int64_t i = 0; i < count_; ++i) {
      blocks[i] = block_at(begin + i);
      blocks[i].kept = fixed_ ? plan_.kept(blocks[i].end - blocks[i].begin, args_.pruning) * blocks[i].samples
                              : ceil_div(blocks[i].size(), A::kStep) * A::kStep;
      blocks[i].at = at;
      if (!fixed_) {
        blocks[i].starts = starts + i * (rows_ + 1);
        blocks[i].starts[0] = 0;
      }
      at += blocks[i].kept * rows_ + kKeep;
    }
    values_.reserve(at + kKeep);
    offsets_.reserve(at + kKeep);
    // If the pixels of a channel lie side by side, all blocks of a sample are pruned together, in long runs.
    const bool together = args_.gradient.pixel_stride == 1 && plan_.cut.samples == 1;
    for (int64_t i = 0, next = 0; i < count_; i = next) {
      next = i + 1;
      while (together && next < count_ && blocks[next].sample == blocks[i].sample) ++next;
      read_span(blocks + i, blocks + next);
    }
  }

  // Prunes several blocks of one sample, or one block, together.
  void read_span(const Block* first, const Block* last) {
    int64_t size = 0;
    for (const Block* block = first; block < last; ++block) size += block->size();
    uint32_t* places = places_.reserve(size + kKeep);
    for (const Block* block = first; block < last; ++block) {
      patches_.find(block->begin, block->end);
      for (int64_t s = 0; s < block->samples; ++s, places += block->end - block->begin) {
        patches_.find_places(block->begin, block->end, s * patches_.size,
                             plan_.width * static_cast<int64_t>(sizeof(Packed)), places);
      }
    }
    const Gradient& gradient = args_.gradient;
    const int64_t least = gradient.pixel_stride == 1 ? 1 : kNeighbors;
    const int64_t piece = at_least(kPrunedElements / size, least);
    Word* pruned = pruned_.reserve(piece * size + kKeep);
    const int64_t span = (last - 1)->end - first->begin;
    for (int64_t row = 0; row < rows_; row += piece) {
      const int64_t rows = at_most(rows_ - row, piece);
      for (int64_t s = 0; s < first->samples; ++s) {
        const int64_t channel = group_ * args_.rows + first_row_ + row;
        PruneArgs part{};
        part.dtype = args_.dtype;
        part.pruning = args_.pruning;
        part.in = static_cast<const T*>(gradient.data) + (first->sample + s) * gradient.sample_stride +
                  channel * gradient.channel_stride + first->begin * gradient.pixel_stride;
        part.size = span;
        part.in_stride = gradient.pixel_stride;
        part.row_groups = plan_.groups;
        const int64_t logical = (first->sample + s) * args_.groups * args_.rows + channel;
        part.first_group = static_cast<uint64_t>(logical * plan_.groups + first->begin / args_.pruning.m);
        part.dims[0] = {rows, gradient.channel_stride, 0, 1, false};
        rows_of_.read_into(part, args_.pruning.keeps_all(), pruned + s * span, size);
      }
      for (int64_t r = 0; r < rows; ++r) place_row(first, last, row + r, pruned + r * size);
    }
  }

  // Stores what a row keeps at its place in each block. If rows keep equally many, fills up with zeros; otherwise the
  // rows must come in order.
  SDGP_INLINE void place_row(const Block* first, const Block* last, int64_t row, const Word* pruned) {
    const uint32_t* places = places_.data;
    for (const Block* block = first; block < last; pruned += block->size(), places += block->size(), ++block) {
      const int64_t at = block->at + (fixed_ ? row * block->kept : block->starts[row]);
      Packed* values = values_.data + at;
      uint32_t* offsets = offsets_.data + at;
      int64_t kept = 0;
      if constexpr (A::kPairs) {
        kept = keep_words(pruned, block->size(), places, values, offsets);
      } else if constexpr (Packing<C>::kMoved) {
        kept = keep_row(pruned, block->size(), places, reinterpret_cast<Word*>(values), offsets);
      } else {
        Word* words = words_.reserve(block->kept + kKeep);
        kept = keep_row(pruned, block->size(), places, words, offsets);
        Packing<C>::elements(reinterpret_cast<const T*>(words), values, kept);
      }
      if (!fixed_) {
        for (; kept % A::kStep != 0; ++kept) {  // so that no row ends with a part of a step
          values[kept] = 0;
          offsets[kept] = offsets[kept - 1];
        }
        block->starts[row + 1] = block->starts[row] + static_cast<uint32_t>(kept);
        continue;
      }
      for (; kept < block->kept; ++kept) {
        values[kept] = 0;
        offsets[kept] = 0;
      }
    }
  }

  void multiply_block(int64_t panel, int64_t index, bool first, E* sums) {
    const Block& block = blocks_.data[index];
    const char* input = reinterpret_cast<const char*>(input_.pack(block, columns_of(panel)));
    Ahead ahead = find_ahead(panel, index);
    const int64_t calls = args_.height.kernel * ceil_div(args_.width.kernel, plan_.taps);
    const int64_t position_bytes = plan_.width * static_cast<int64_t>(sizeof(Packed));
    TapsCall<A, uint32_t> call{};
    call.kept = {values_.data + block.at, offsets_.data + block.at, block.kept, block.starts};
    call.rows = rows_;
    call.tap_bytes = args_.width.dilation * position_bytes;
    call.ahead = &ahead;
    call.fetches = at_least(ceil_div(ahead.total(), calls), 1);
    for (int64_t ky = 0; ky < args_.height.kernel; ++ky) {
      for (int64_t kx = 0; kx < args_.width.kernel; kx += plan_.taps) {
        const int64_t taps = at_most(args_.width.kernel - kx, plan_.taps);
        call.dense = input + (ky * args_.height.dilation * input_.pitch + kx * args_.width.dilation) * position_bytes;
        call.in = call.out = sums;
        call.in_stride = call.out_stride = taps * plan_.width;
        sums += rows_ * taps * plan_.width;
        multiply_taps_of(plan_.panel, taps, first, call);
      }
    }
  }

  // Returns what is packed after this block: the input of the next block, or of the first block for the next panel.
  Ahead find_ahead(int64_t panel, int64_t index) {
    if (index + 1 < count_) return input_.ahead(blocks_.data[index + 1], columns_of(panel));
    return panel + 1 < panel_end_ ? input_.ahead(blocks_.data[0], columns_of(panel + 1)) : Ahead{};
  }

  Columns columns_of(int64_t panel) const {
    const int64_t first = panel * plan_.width;
    return {group_ * args_.cols + first, at_most(args_.cols - first, plan_.width)};
  }

  void store_panel(int64_t panel, const E* sums) {
    const int64_t first_col = panel * plan_.width;
    const int64_t cols = at_most(args_.cols - first_col, plan_.width);
    // Where the sums of each tap begin, and the distance from row to row.
    const E** begin = begin_.reserve(taps_);
    int64_t* pitch = pitch_.reserve(taps_);
    int64_t tap = 0;
    for (int64_t ky = 0; ky < args_.height.kernel; ++ky) {
      for (int64_t kx = 0; kx < args_.width.kernel; kx += plan_.taps) {
        const int64_t taps = at_most(args_.width.kernel - kx, plan_.taps);
        for (int64_t t = 0; t < taps; ++t, ++tap) {
          begin[tap] = sums + t * plan_.width;
          pitch[tap] = taps * plan_.width;
        }
        sums += rows_ * taps * plan_.width;
      }
    }
    T* out = static_cast<T*>(args_.out) + (group_ * args_.rows + first_row_) * args_.out_row_stride +
             first_col * args_.out_col_stride;
    for (int64_t r = 0; r < rows_; ++r, out += args_.out_row_stride) {
      if (args_.out_col_stride == 1) {
        for (tap = 0; tap < taps_; ++tap) {
          store_elements<C>(begin[tap] + r * pitch[tap], out + tap * args_.out_tap_stride, cols);
        }
        continue;
      }
      for (int64_t c = 0; c < cols; ++c) {
        for (tap = 0; tap < taps_; ++tap) {
          store_element<C>(out + c * args_.out_col_stride + tap * args_.out_tap_stride, begin[tap][r * pitch[tap] + c]);
        }
      }
    }
  }

  const WeightGradArgs& args_;
  const WeightGradPlan plan_;
  Patches patches_;
  PackedInput<C> input_;
  const int64_t taps_;
  const bool fixed_ = args_.pruning.fixed();
  PrunedRows<Word> rows_of_;
  int64_t group_ = 0;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t panel_begin_ = 0;
  int64_t panel_end_ = 0;
  int64_t count_ = 0;  // blocks of the slab
  Scratch<Block> blocks_;
  Scratch<uint32_t> places_;
  Scratch<Word> pruned_;
  Scratch<Word> words_;
  Scratch<Packed> values_;
  Scratch<uint32_t> offsets_;
  Scratch<uint32_t> starts_;
  Scratch<E> sums_;
  Scratch<const E*> begin_;
  Scratch<int64_t> pitch_;
};

template <bool kPairs>
int64_t weight_grad_nm_units(const WeightGradArgs& args) {
  return visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    return make_weight_grad_plan<ArithmeticOf<ProductLanes<kDType, kPairs>>>(args).units;
  });
}

template <bool kPairs>
void weight_grad_nm_kernel(const WeightGradArgs& args, int64_t begin, int64_t end) {
  visit(DTypes{}, args.dtype,
        [&]<DType kDType>(Constant<kDType>) { WeightGrad<ProductLanes<kDType, kPairs>>::run(args, begin, end); });
}

}  // namespace sdgp::SDGP_ISA
