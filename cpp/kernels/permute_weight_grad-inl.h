// SPDX-License-Identifier: BSD-3-Clause
//
// The weight gradient of a convolution in bfloat16, channels last, by the permute kernel (Note [Permute kernel]).
//
// Lanes are output channels, and a window is up to 32 output pixels of one sample. The table of a tap and a column (an
// input channel) holds what the tap meets in that column at the pixels of the window. The tables of a block of windows
// are made in the L1 cache just before they are used, and serve all output channels of a chunk.
#pragma once

#include "paired_rows-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int64_t kPermuteChannels = 512;   // maximum number of output channels of a chunk
constexpr int64_t kChannelBytes = 1 << 20;  // kept values, indices and pixel positions of a slab
constexpr int64_t kFewestChannels =
    64;  // minimum number of output channels of a chunk that is divided for more threads

// Units are chunks of output channels x parts of the columns. The division changes no result: every sum runs in the
// order of the windows.
struct PermuteWeightPlan {
  Window window;
  int64_t pixels = 0;      // per sample
  int64_t per_sample = 0;  // windows per sample
  int64_t windows = 0;     // windows of all samples
  int64_t taps = 0;
  int64_t rows = 0;  // per chunk
  int64_t chunks = 0;
  int64_t slab = 0;     // windows that are packed at a time
  int64_t columns = 0;  // in blocks of kTableColumns
  int64_t parts = 0;
  int64_t units = 0;
};

inline PermuteWeightPlan make_permute_weight_plan(const WeightGradArgs& args) {
  PermuteWeightPlan plan{.window = Window(args.pruning)};
  plan.pixels = args.height.out * args.width.out;
  plan.per_sample = ceil_div(plan.pixels, plan.window.size);
  plan.windows = args.samples * plan.per_sample;
  plan.taps = args.height.kernel * args.width.kernel;
  plan.columns = ceil_div(args.cols, kTableColumns);
  plan.chunks = ceil_div(args.rows, kPermuteChannels);
  plan.parts = 1;
  const int64_t wanted = args.threads > 1 ? 4 * args.threads : 1;
  while (plan.chunks * plan.parts < wanted && args.rows >= 2 * plan.chunks * kFewestChannels) plan.chunks *= 2;
  while (plan.chunks * plan.parts < wanted && 2 * plan.parts <= plan.columns) plan.parts *= 2;
  plan.rows = ceil_div(ceil_div(args.rows, plan.chunks), kPairRows) * kPairRows;
  plan.chunks = ceil_div(args.rows, plan.rows);
  const int64_t pixel_bytes = plan.taps * kTable * static_cast<int64_t>(sizeof(int32_t));
  const int64_t window_bytes = plan.rows / kLaneRows * plan.window.bytes + pixel_bytes;
  plan.slab = at_least(kChannelBytes / window_bytes / kBlockWindows, 1) * kBlockWindows;
  plan.units = plan.chunks * plan.parts;
  return plan;
}

// Returns whether the permute kernel supports this weight gradient. The tap kernel computes the others.
inline bool permutes_weight(const WeightGradArgs& args) {
  return args.dtype == DType::kBFloat16 && args.pruning.m <= kTable && args.pruning.fixed() && args.groups == 1 &&
         args.col_stride == 1 && is_short(args.height) && is_short(args.width) &&
         args.line_stride < INT32_MAX / at_least(args.height.in, 1) / 2 &&
         args.pixel_stride < INT32_MAX / at_least(args.width.in, 1) / 2;
}

template <class C>
class PermuteWeightGrad {
 public:
  static void run(const WeightGradArgs& args, int64_t begin, int64_t end) {
    PermuteWeightGrad grad(args);
    for (int64_t unit = begin; unit < end; ++unit) grad.run_unit(unit);
  }

 private:
  explicit PermuteWeightGrad(const WeightGradArgs& args)
      : args_(args), plan_(make_permute_weight_plan(args)), paired_(args.pruning) {}

  void run_unit(int64_t unit) {
    const int64_t part = unit % plan_.parts;
    const int64_t begin = plan_.columns * part / plan_.parts, end = plan_.columns * (part + 1) / plan_.parts;
    first_row_ = unit / plan_.parts * plan_.rows;
    rows_ = at_most(args_.rows - first_row_, plan_.rows);
    vectors_ = ceil_div(rows_, kPairRows) * 2;
    const int64_t block_sums = plan_.taps * vectors_ * kTableColumns * kLaneRows;
    const bool whole = plan_.windows <= plan_.slab;
    float* sums = sums_.reserve(block_sums * (whole ? 1 : end - begin));
    for (int64_t window = 0; window < plan_.windows; window += plan_.slab) {
      first_window_ = window;
      windows_ = at_most(plan_.windows - window, plan_.slab);
      read_kept();
      find_pixels();
      for (int64_t block = begin; block < end; ++block) {
        float* block_at = sums + (whole ? 0 : block - begin) * block_sums;
        multiply_columns(block, block_at);
        if (window + windows_ == plan_.windows) store_columns(block, block_at);
      }
    }
  }

  // Prunes the chunk's rows in one slab of windows and packs the kept values.
  void read_kept() {
    layout_ = {windows_, vectors_, plan_.window.bytes};
    kept_.reserve(layout_.bytes());
    const Gradient& gradient = args_.gradient;
    const int64_t groups = ceil_div(plan_.pixels, args_.pruning.m);
    for (int64_t at = 0; at < windows_;) {
      const int64_t sample = (first_window_ + at) / plan_.per_sample;
      const int64_t window = (first_window_ + at) % plan_.per_sample;
      const int64_t count = at_most(plan_.per_sample - window, windows_ - at);
      const int64_t pixel = window * plan_.window.size;
      const auto* from = static_cast<const uint16_t*>(gradient.data) + sample * gradient.sample_stride +
                         first_row_ * gradient.channel_stride + pixel * gradient.pixel_stride;
      const int64_t row = sample * args_.rows + first_row_;
      paired_.read({.data = from,
                    .rows = rows_,
                    .row_stride = gradient.channel_stride,
                    .size = at_most(plan_.pixels - pixel, count * plan_.window.size),
                    .element_stride = gradient.pixel_stride,
                    .first_group = static_cast<uint64_t>(row * groups + pixel / args_.pruning.m),
                    .row_groups = groups},
                   [&](int64_t of_read, int64_t first) -> WordPlace {
                     char* lower = kept_.data + layout_.offset(at + of_read, first / kLaneRows);
                     return {lower, lower + layout_.vector_bytes(at + of_read), kVectorBytes};
                   });
      at += count;
    }
  }

  // For each tap and each pixel of the slab, finds the element offset of the input that the tap meets, within its
  // sample. -1: the tap is outside the image, or the pixel does not exist.
  void find_pixels() {
    const Axis2d &height = args_.height, &width = args_.width;
    const int64_t pitch = windows_ * kTable;
    int32_t* lines = lines_.reserve(2 * pitch);
    int32_t* columns = lines + pitch;
    for (int64_t window = 0; window < windows_; ++window) {
      const int64_t first = (first_window_ + window) % plan_.per_sample * plan_.window.size;
      for (int64_t i = 0; i < kTable; ++i) {
        const int64_t pixel = first + i;
        const bool exists = i < plan_.window.size && pixel < plan_.pixels;
        const int64_t line = pixel / width.out * height.stride - height.padding;
        lines[window * kTable + i] = exists ? static_cast<int32_t>(line) : INT32_MIN / 2;
        columns[window * kTable + i] = static_cast<int32_t>(pixel % width.out * width.stride - width.padding);
      }
    }
    int32_t* at = pixels_.reserve(plan_.taps * pitch);
    const auto line_stride = static_cast<int32_t>(args_.line_stride);
    const auto pixel_stride = static_cast<int32_t>(args_.pixel_stride);
    const auto in_lines = static_cast<int32_t>(height.in), in_columns = static_cast<int32_t>(width.in);
    for (int64_t tap = 0; tap < plan_.taps; ++tap, at += pitch) {
      const auto dy = static_cast<int32_t>(tap / width.kernel * height.dilation);
      const auto dx = static_cast<int32_t>(tap % width.kernel * width.dilation);
      for (int64_t i = 0; i < pitch; ++i) {
        const int32_t line = lines[i] + dy, column = columns[i] + dx;
        const bool inside = (line >= 0) & (line < in_lines) & (column >= 0) & (column < in_columns);
        at[i] = inside ? line * line_stride + column * pixel_stride : -1;
      }
    }
  }

  void multiply_columns(int64_t block, float* sums) {
    char* tables = tables_.reserve(kBlockWindows * kWindowTableBytes);
    for (int64_t window = 0; window < windows_; window += kBlockWindows) {
      PermuteCall call{};
      call.windows = at_most(windows_ - window, kBlockWindows);
      call.tables = tables;
      call.kept = kept_.data + layout_.offset(window, 0);
      call.pairs = plan_.window.pairs;
      call.vectors = ceil_div(rows_, kLaneRows);
      call.sums = sums;
      for (int64_t tap = 0; tap < plan_.taps; ++tap) {
        for (int64_t i = 0; i < call.windows; ++i)
          make_tables_at(block, tap, window + i, tables + i * kWindowTableBytes);
        first_window_ + window == 0 ? multiply_windows<true>(call) : multiply_windows<false>(call);
        call.sums += vectors_ * kTableColumns * kLaneRows;
      }
    }
  }

  // Makes the tables of a column block for one tap and one window.
  void make_tables_at(int64_t block, int64_t tap, int64_t window, char* to) const {
    constexpr int kHalf = kTable / 2;
    static_assert(kHalf == kTableColumns);
    const int64_t col = block * kTableColumns;
    const int64_t sample = (first_window_ + window) / plan_.per_sample;
    const auto* from = static_cast<const uint16_t*>(args_.input) + sample * args_.sample_stride + col;
    const int64_t cols = at_most(args_.cols - col, kTableColumns);
    const auto inside = static_cast<__mmask16>((1u << cols) - 1);
    const int32_t* at = pixels_.data + (tap * windows_ + window) * kTable;
    const auto load = [&](int32_t place) {
      return _mm256_maskz_loadu_epi16(place < 0 ? 0 : inside, from + (place < 0 ? 0 : place));
    };
    Vec<uint16_t> lines[kHalf];  // pixels i and 16 + i
#pragma GCC unroll 64
    for (int i = 0; i < kHalf; ++i) {
      lines[i] = (Vec<uint16_t>)_mm512_inserti64x4(_mm512_castsi256_si512(load(at[i])), load(at[kHalf + i]), 1);
    }
    transpose<uint16_t, kHalf>(lines);
#pragma GCC unroll 64
    for (int i = 0; i < kHalf; ++i) store_bits(to + i * kVectorBytes, lines[i]);
  }

  void store_columns(int64_t block, const float* sums) const {
    const int64_t col = block * kTableColumns;
    const int64_t cols = at_most(args_.cols - col, kTableColumns);
    for (int64_t tap = 0; tap < plan_.taps; ++tap, sums += vectors_ * kTableColumns * kLaneRows) {
      auto* out = static_cast<uint16_t*>(args_.out) + first_row_ * args_.out_row_stride + col * args_.out_col_stride +
                  tap * args_.out_tap_stride;
      for (int64_t row = 0; row < rows_; ++row, out += args_.out_row_stride) {
        const float* of_row = sums + row / kLaneRows * kTableColumns * kLaneRows + row % kLaneRows;
        float line[kTableColumns];
        for (int c = 0; c < kTableColumns; ++c) line[c] = of_row[c * kLaneRows];
        uint16_t rounded[kTableColumns];
        C::store(rounded, C::round(load_bits<Vec<float>>(line)));
        for (int64_t c = 0; c < cols; ++c) out[c * args_.out_col_stride] = rounded[c];
      }
    }
  }

  const WeightGradArgs& args_;
  const PermuteWeightPlan plan_;
  PairedRows paired_;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t vectors_ = 0;
  int64_t first_window_ = 0;  // of the current slab
  int64_t windows_ = 0;
  KeptLayout layout_{};
  Scratch<char> kept_;
  Scratch<char> tables_;
  Scratch<int32_t> lines_;
  Scratch<int32_t> pixels_;
  Scratch<float> sums_;
};

inline int64_t permute_weight_grad_units(const WeightGradArgs& args) { return make_permute_weight_plan(args).units; }

inline void permute_weight_grad_kernel(const WeightGradArgs& args, int64_t begin, int64_t end) {
  PermuteWeightGrad<BFloat16>::run(args, begin, end);
}

}  // namespace sdgp::SDGP_ISA
#endif
