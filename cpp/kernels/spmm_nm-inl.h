// SPDX-License-Identifier: BSD-3-Clause
//
// The product of N:M rows with a dense matrix, and its gather form for convolutions: each result row is a sum, over
// taps, of one N:M row times the matrix of the tap. A plain product has one tap. This file divides the work and orders
// it for the caches; kept_values-inl.h reads the N:M rows, and row_kernel-inl.h has the inner loops. Compiled once per
// instruction set.
#pragma once

#include "kept_values-inl.h"

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

 public:
  static bool run(const SpmmArgs& args, int64_t begin, int64_t end) {
    Spmm spmm(args);
    for (int64_t unit = begin; unit < end; ++unit) spmm.run_unit(unit);
    return spmm.kept_.valid();
  }

 private:
  explicit Spmm(const SpmmArgs& args)
      : args_(args),
        plan_(make_spmm_plan<A>(args)),
        dense_(plan_.dense),
        gather_(args, dense_, kChunkRows),
        kept_(args, dense_, gather_) {}

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
      if (kept_begin_ != block_begin || kept_end_ != block_end) kept_.read(group_, block_begin, block_end);
      kept_begin_ = block_begin;
      kept_end_ = block_end;
      for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
        E* panel_sums = slabs > 1 ? sums + (panel - panel_begin_) * rows_ * dense_.width : sums;
        multiply_panel(panel, block_begin, block_end, panel_sums);
      }
    }
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
      call.kept = kept_.block(block);
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

  const SpmmArgs& args_;
  const SpmmPlan plan_;
  const DensePlan& dense_;
  Gather gather_;
  KeptValues<C> kept_;
  int64_t chunk_and_group_ = -1;
  int64_t kept_begin_ = 0;  // in blocks
  int64_t kept_end_ = 0;
  int64_t group_ = 0;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t panel_begin_ = 0;
  int64_t panel_end_ = 0;
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
