// SPDX-License-Identifier: BSD-3-Clause
//
// The product of bfloat16 N:M rows with a dense matrix by the permute kernel (Note [Permute kernel]). It computes the
// data gradient and the weight gradient of a linear layer and, in gather form, the data gradient of a convolution.
//
// The result rows of a convolution are input pixels, and the reduction runs over all taps. For each tap, 16 input
// pixels meet certain output pixels, whose kept values are copied side by side. These copies are made once for all
// columns.
#pragma once

#include "gather-inl.h"
#include "paired_rows-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int64_t kPermuteRows = 256;    // result rows per load of the tables into the L1 cache
constexpr int64_t kKeptBytes = 1 << 20;  // kept values and indices of a chunk

// Units are chunks of result rows x parts of the columns. The division changes no result: every sum runs in the order
// of the windows.
struct PermutePlan {
  Window window;
  int64_t windows = 0;  // per tap
  int64_t steps = 0;    // windows of all taps
  int64_t rows = 0;     // per chunk
  int64_t chunks = 0;
  int64_t columns = 0;  // in blocks of kTableColumns
  int64_t parts = 0;
  int64_t units = 0;
};

inline PermutePlan make_permute_plan(const SpmmArgs& args) {
  PermutePlan plan{.window = Window(args.pruning)};
  plan.windows = ceil_div(args.size, plan.window.size);
  plan.steps = plan.windows * args.height.kernel * args.width.kernel;
  const int64_t rows = args.samples * args.height.in * args.width.in;
  const int64_t vectors = at_least(kKeptBytes / (plan.steps * plan.window.bytes), 4);
  plan.rows = at_most(vectors * kLaneRows, kPermuteRows) / kPairRows * kPairRows;
  plan.chunks = ceil_div(rows, plan.rows);
  plan.columns = ceil_div(args.cols, kTableColumns);
  const int64_t wanted = args.threads > 1 ? ceil_div(4 * args.threads, plan.chunks) : 1;
  plan.parts = at_most(wanted, at_least(plan.columns / 8, 1));  // each part prunes again
  plan.units = plan.chunks * plan.parts;
  return plan;
}

// Returns whether the permute kernel supports this product. The row kernel computes the others.
inline bool permutes(const SpmmArgs& args) {
  const Gradient* gradient = args.gradient;
  if (args.dtype != DType::kBFloat16 || args.pruning.m > kTable || gradient == nullptr) return false;
  if (!args.pruning.fixed()) return false;
  if (args.groups != 1 || args.out_channels_first) return false;
  const int64_t pixels = args.height.out * args.width.out;
  if (args.samples > 1 && gradient->sample_stride != pixels * gradient->pixel_stride) return false;
  if (is_plain_product(args)) return true;
  // Whole rows of the gradient are packed and then copied. If the gradient has many more pixels than the result, most
  // of this would be wasted. Rows are counted in 32 bits.
  return is_short(args.height) && is_short(args.width) && args.height.stride == 1 && args.width.stride == 1 &&
         gradient->channel_stride == 1 && pixels <= 4 * args.height.in * args.width.in && pixels < int64_t{1} << 20;
}

// The tables are [column block][tap][window][column][reduction row]. Missing elements are zero.
inline int64_t table_bytes(const SpmmArgs& args) {
  const PermutePlan plan = make_permute_plan(args);
  return plan.columns * plan.steps * kWindowTableBytes;
}

inline int64_t table_units(const SpmmArgs& args) {
  const PermutePlan plan = make_permute_plan(args);
  return ceil_div(plan.columns, 2) * plan.steps;
}

// A unit is the tables of two column blocks for one window.
inline void make_tables(const SpmmArgs& args, int64_t begin, int64_t end) {
  const PermutePlan plan = make_permute_plan(args);
  const DenseOperand& dense = args.dense;
  constexpr int kCols = 2 * kTableColumns;
  static_assert(kCols == kTable && kTable == kLanes<uint16_t>);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t step = unit % plan.steps;
    const int64_t block = unit / plan.steps * 2;
    const int64_t tap = step / plan.windows, window = step % plan.windows;
    const int64_t rows = at_most(args.size - window * plan.window.size, plan.window.size);
    const int64_t cols = at_most(args.cols - block * kTableColumns, kCols);
    const auto* from = static_cast<const uint16_t*>(dense.data) + window * plan.window.size * dense.row_stride +
                       block * kTableColumns * dense.col_stride + tap / args.width.kernel * dense.height_stride +
                       tap % args.width.kernel * dense.width_stride;
    uint16_t elements[kTable * kCols] = {};  // row by row, or column by column if the operand lies that way
    const bool by_column = dense.row_stride == 1;
    const int64_t lines = by_column ? cols : rows, length = by_column ? rows : cols;
    const int64_t line_stride = by_column ? dense.col_stride : dense.row_stride;
    const int64_t element_stride = by_column ? dense.row_stride : dense.col_stride;
    for (int64_t i = 0; i < lines; ++i, from += line_stride) {
      uint16_t* line = elements + i * kTable;
      if (element_stride == 1) {
        std::memcpy(line, from, static_cast<size_t>(length) * sizeof *line);
      } else {
        for (int64_t j = 0; j < length; ++j) line[j] = from[j * element_stride];
      }
    }
    Vec<uint16_t> tables[kTable];
#pragma GCC unroll 64
    for (int i = 0; i < kTable; ++i) tables[i] = load_bits<Vec<uint16_t>>(elements + i * kTable);
    if (!by_column) transpose<uint16_t, kTable>(tables);
    for (int64_t half = 0; half < 2 && block + half < plan.columns; ++half) {
      char* to = static_cast<char*>(args.packed) + ((block + half) * plan.steps + step) * kWindowTableBytes;
#pragma GCC unroll 64
      for (int i = 0; i < kTableColumns; ++i) store_bits(to + i * kVectorBytes, tables[half * kTableColumns + i]);
    }
  }
}

template <class C>
class PermuteProduct {
 public:
  static bool run(const SpmmArgs& args, int64_t begin, int64_t end) {
    PermuteProduct product(args);
    for (int64_t unit = begin; unit < end; ++unit) product.run_unit(unit);
    return true;
  }

 private:
  explicit PermuteProduct(const SpmmArgs& args)
      : args_(args), gradient_(*args.gradient), plan_(make_permute_plan(args)), paired_(args.pruning) {}

  void run_unit(int64_t unit) {
    if (unit / plan_.parts != chunk_) {  // otherwise the previous unit has left the kept values of this chunk
      chunk_ = unit / plan_.parts;
      first_row_ = chunk_ * plan_.rows;
      rows_ = at_most(args_.samples * args_.height.in * args_.width.in - first_row_, plan_.rows);
      vectors_ = ceil_div(rows_, kPairRows) * 2;
      read_kept();
    }
    const int64_t part = unit % plan_.parts;
    const int64_t stop = plan_.columns * (part + 1) / plan_.parts;
    for (int64_t block = plan_.columns * part / plan_.parts; block < stop; ++block) multiply_columns(block);
  }

  void multiply_columns(int64_t block) {
    float* sums = sums_.reserve(vectors_ * kTableColumns * kLaneRows);
    const int64_t live = ceil_div(rows_, kLaneRows);
    const char* const end = static_cast<const char*>(args_.packed) + plan_.columns * plan_.steps * kWindowTableBytes;
    for (int64_t step = 0; step < plan_.steps; step += kBlockWindows) {
      PermuteCall call{};
      call.windows = at_most(plan_.steps - step, kBlockWindows);
      call.tables = static_cast<const char*>(args_.packed) + (block * plan_.steps + step) * kWindowTableBytes;
      call.kept = kept_.data + layout_.offset(step, 0);
      call.pairs = plan_.window.pairs;
      call.vectors = live;
      call.sums = sums;
      call.next = call.tables + call.windows * kWindowTableBytes;
      call.next_lines = call.next < end ? ceil_div(call.windows * kWindowTableBytes / 64, live) : 0;
      step == 0 ? multiply_windows<true>(call) : multiply_windows<false>(call);
    }
    store_columns(block, sums);
  }

  void store_columns(int64_t block, const float* sums) {
    const int64_t first = block * kTableColumns;
    const int64_t cols = at_most(args_.cols - first, kTableColumns);
    uint16_t* out = static_cast<uint16_t*>(args_.out) + first_row_ * args_.cols + first;
    for (int64_t row = 0; row < rows_; row += kLaneRows, sums += kTableColumns * kLaneRows) {
      Vec<float> tile[kLaneRows];
#pragma GCC unroll 64
      for (int i = 0; i < kLaneRows; ++i) tile[i] = load_bits<Vec<float>>(sums + i * kLaneRows);
      transpose<float, kLaneRows>(tile);
      const int64_t rows = at_most(rows_ - row, kLaneRows);
      if (cols == kTableColumns && rows == kLaneRows) {
#pragma GCC unroll 64
        for (int i = 0; i < kLaneRows; ++i) C::store(out + i * args_.cols, C::round(tile[i]));
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          uint16_t line[kTableColumns];
          C::store(line, C::round(tile[i]));
          std::memcpy(out + i * args_.cols, line, static_cast<size_t>(cols) * sizeof *line);
        }
      }
      out += kLaneRows * args_.cols;
    }
  }

  // Prunes the rows that a chunk meets and packs their kept values. A window of KeptLayout is a step.
  void read_kept() {
    layout_ = {plan_.steps, vectors_, plan_.window.bytes};
    kept_.reserve(layout_.bytes());
    if (is_plain_product(args_)) return read_rows(first_row_, rows_);
    find_sources();
    read_rows(first_source_, sources_);
    for (int64_t tap = 0; tap < plan_.steps / plan_.windows; ++tap) {
      for (int64_t vector = 0; vector < vectors_; ++vector) copy_sources(tap, vector);
    }
  }

  // For each tap and each result row of the chunk, finds the row of the gradient that they meet, or -1 if there is
  // none. Counts from the first row that any of them meets.
  void find_sources() {
    const Axis2d &height = args_.height, &width = args_.width;
    const int64_t pitch = vectors_ * kLaneRows;
    const int64_t per_sample = height.in * width.in;
    const auto lines = static_cast<int32_t>(height.out), columns = static_cast<int32_t>(width.out);
    // Per result row: the first gradient row of its sample, counted from the chunk's first sample.
    int32_t* before = before_.reserve(3 * pitch);
    int32_t* y = before + pitch;
    int32_t* x = y + pitch;
    const int64_t first_sample = first_row_ / per_sample;
    for (int64_t i = 0; i < pitch; ++i) {
      const int64_t row = first_row_ + i;
      before[i] = static_cast<int32_t>((row / per_sample - first_sample) * height.out * width.out);
      // Rows beyond the chunk meet nothing: every tap leads to a smaller, negative line.
      y[i] = i < rows_ ? static_cast<int32_t>(row % per_sample / width.in + height.padding) : -1;
      x[i] = static_cast<int32_t>(row % width.in + width.padding);
    }
    int32_t* source = source_.reserve(plan_.steps / plan_.windows * pitch);
    int32_t least = INT32_MAX, most = -1;
    for (int64_t tap = 0; tap < height.kernel * width.kernel; ++tap, source += pitch) {
      const auto dy = static_cast<int32_t>(tap / width.kernel * height.dilation);
      const auto dx = static_cast<int32_t>(tap % width.kernel * width.dilation);
      for (int64_t i = 0; i < pitch; ++i) {
        const int32_t line = y[i] - dy, column = x[i] - dx;
        const bool inside = (line >= 0) & (line < lines) & (column >= 0) & (column < columns);
        const int32_t at = inside ? before[i] + line * columns + column : -1;
        source[i] = at;
        least = inside && at < least ? at : least;
        most = inside && at > most ? at : most;
      }
    }
    if (most < 0) least = 0;
    source_base_ = least;
    sources_ = most - least + 1;
    source_pitch_ = ceil_div(sources_, kPairRows) * kPairRows;
    first_source_ = first_sample * height.out * width.out + least;
    sources_kept_.reserve(plan_.windows * plan_.window.bytes / kVectorBytes * source_pitch_);
  }

  // Copies what a vector of result rows meets at a tap. If the rows meet consecutive rows of the gradient, or none,
  // this takes one load per word.
  void copy_sources(int64_t tap, int64_t vector) {
    const auto source = load_bits<Vec<int32_t>>(source_.data + (tap * vectors_ + vector) * kLaneRows);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 met = _mm512_movepi32_mask((__m512i)source) ^ 0xffff;
    const __m512i at = _mm512_sub_epi32((__m512i)source, _mm512_set1_epi32(static_cast<int>(source_base_)));
    const __m512i begin = _mm512_sub_epi32(at, lanes);
    const int first = met == 0 ? 0 : _mm512_mask_reduce_max_epi32(met, begin);
    const bool consecutive = (_mm512_cmpneq_epi32_mask(begin, _mm512_set1_epi32(first)) & met) == 0;
    const int64_t words = plan_.window.bytes / kVectorBytes;
    const uint32_t* from = sources_kept_.data;
    for (int64_t window = 0; window < plan_.windows; ++window) {
      char* to = kept_.data + layout_.offset(tap * plan_.windows + window, vector);
      for (int64_t word = 0; word < words; ++word, to += kVectorBytes, from += source_pitch_) {
        const __m512i moved = consecutive ? _mm512_maskz_loadu_epi32(met, from + first)
                                          : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), met, at, from, 4);
        store_bits(to, moved);
      }
    }
  }

  void read_rows(int64_t first, int64_t count) {
    const int64_t groups = ceil_div(args_.size, args_.pruning.m);
    paired_.read({.data = static_cast<const uint16_t*>(gradient_.data) + first * gradient_.pixel_stride,
                  .rows = count,
                  .row_stride = gradient_.pixel_stride,
                  .size = args_.size,
                  .element_stride = gradient_.channel_stride,
                  .first_group = static_cast<uint64_t>(first * groups),
                  .row_groups = groups},
                 [&](int64_t window, int64_t row) { return place_of_rows(window, row); });
  }

  // Rows of a plain product go to their final place. Otherwise they first go to the rows of the gradient, as
  // [window][word][row].
  WordPlace place_of_rows(int64_t window, int64_t row) const {
    if (is_plain_product(args_)) {
      char* lower = kept_.data + layout_.offset(window, row / kLaneRows);
      return {lower, lower + layout_.vector_bytes(window), kVectorBytes};
    }
    const int64_t step = source_pitch_ * static_cast<int64_t>(sizeof(uint32_t));
    char* lower = reinterpret_cast<char*>(sources_kept_.data + row) + window * plan_.window.bytes / kVectorBytes * step;
    return {lower, lower + kVectorBytes, step};
  }

  const SpmmArgs& args_;
  const Gradient& gradient_;
  const PermutePlan plan_;
  PairedRows paired_;
  int64_t chunk_ = -1;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t vectors_ = 0;
  int64_t first_source_ = 0;
  int64_t source_base_ = 0;
  int64_t sources_ = 0;
  int64_t source_pitch_ = 0;
  KeptLayout layout_{};
  Scratch<char> kept_;
  Scratch<float> sums_;
  Scratch<int32_t> before_;
  Scratch<int32_t> source_;
  Scratch<uint32_t> sources_kept_;
};

inline int64_t permute_nm_units(const SpmmArgs& args) { return make_permute_plan(args).units; }

inline bool permute_nm_kernel(const SpmmArgs& args, int64_t begin, int64_t end) {
  return PermuteProduct<BFloat16>::run(args, begin, end);
}

}  // namespace sdgp::SDGP_ISA
#endif
