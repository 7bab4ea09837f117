// SPDX-License-Identifier: BSD-3-Clause
//
// The product of bfloat16 N:M rows with a dense matrix, on CPUs that have AVX512-BF16: a linear layer's data gradient
// and its weight gradient.
//
// Note [Permute kernel]
// Lanes are result rows. For one column of the dense operand, the values of a window of up to 32 reduction rows lie in
// one register as a lookup table. Each lane has two kept values of its row, as a pair of 16-bit floats, and their two
// positions in the window, as a pair of 16-bit indices: one vpermw looks up what 16 rows' pairs are multiplied with,
// one vdpbf16ps multiplies and adds them. No sum leaves its register while a block of windows passes, and every pattern
// whose group fits a window runs at the same rate per kept value.
//
// Limits, of vpermw and vdpbf16ps together: 4/3 cycles on Zen 4, whose row kernel takes 2 for as many products; 3 on
// Intel's Golden Cove, whose vdpbf16ps alone takes 2, so that the row kernel, at 1, stays the better one there.
#pragma once

#include "compress_nm-inl.h"
#include "pack_dense-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int kTable = 32;                // reduction rows of a window, at most: 16-bit elements of a register
constexpr int kTableBytes = 64;           // of one column
constexpr int kLaneRows = 16;             // result rows of a vector of sums
constexpr int kPairRows = 2 * kLaneRows;  // result rows of a vector of 16-bit elements
constexpr int kTableColumns = 16;         // whose sums stay in registers
constexpr int kResident = 10;             // tables that stay in registers as well
constexpr int64_t kBlockWindows = 16;     // whose tables stay in the first-level cache: 16 KiB
constexpr int64_t kPermuteRows = 256;     // result rows that share a trip of the tables to that cache
constexpr int64_t kKeptBytes = 1 << 20;   // of kept values and indices of a chunk of rows
constexpr int64_t kTileElements = 8192;   // pruned at a time, in the first-level cache
constexpr int kSlots = 8;                 // kept values that are collected at a time

// Work is cut into chunks of result rows x parts of the column blocks. No result depends on the cut: each is summed in
// the order of the windows.
struct PermutePlan {
  int64_t window;  // reduction rows: as many whole groups as a table holds
  int64_t windows;
  int64_t pairs;         // of kept values, of a row in a window
  int64_t window_bytes;  // of a vector of rows: per two pairs one vector of indices, then the pairs
  int64_t rows;          // of a chunk
  int64_t chunks;
  int64_t columns;  // blocks of kTableColumns
  int64_t parts;
  int64_t units;
};

inline PermutePlan make_permute_plan(const SpmmArgs& args) {
  PermutePlan plan{};
  const Pruning& pruning = args.pruning;
  plan.window = kTable / pruning.m * pruning.m;
  plan.windows = ceil_div(args.size, plan.window);
  plan.pairs = ceil_div(kTable / pruning.m * pruning.n, 2);
  plan.window_bytes = (plan.pairs + ceil_div(plan.pairs, 2)) * kVectorBytes;
  const int64_t rows = args.samples * args.height.in * args.width.in;
  const int64_t vectors = at_least(kKeptBytes / (plan.windows * plan.window_bytes), 4);
  plan.rows = at_most(vectors * kLaneRows, kPermuteRows) / kPairRows * kPairRows;
  plan.chunks = ceil_div(rows, plan.rows);
  plan.columns = ceil_div(args.cols, kTableColumns);
  const int64_t wanted = args.threads > 1 ? ceil_div(4 * args.threads, plan.chunks) : 1;
  plan.parts = at_most(wanted, at_least(plan.columns / 8, 1));  // each part prunes again
  plan.units = plan.chunks * plan.parts;
  return plan;
}

// What the permute kernel takes; other products are the row kernel's.
inline bool permutes(const SpmmArgs& args) {
  const auto is_point = [](const Axis2d& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0 && axis.in == axis.out;
  };
  const Gradient* gradient = args.gradient;
  return args.dtype == DType::kBFloat16 && args.pruning.m <= kTable && gradient != nullptr && args.groups == 1 &&
         is_point(args.height) && is_point(args.width) && !args.out_channels_first &&
         (args.samples == 1 || gradient->sample_stride == args.height.out * args.width.out * gradient->pixel_stride);
}

// The tables: [column block][window][column][reduction row], zeros where there is none.
inline int64_t table_bytes(const SpmmArgs& args) {
  const PermutePlan plan = make_permute_plan(args);
  return plan.columns * plan.windows * kTableColumns * kTableBytes;
}

inline int64_t table_units(const SpmmArgs& args) {
  const PermutePlan plan = make_permute_plan(args);
  return ceil_div(plan.columns, 2) * plan.windows;
}

// A unit is the tables of two column blocks in one window.
inline void make_tables(const SpmmArgs& args, int64_t begin, int64_t end) {
  const PermutePlan plan = make_permute_plan(args);
  const DenseOperand& dense = args.dense;
  constexpr int kCols = 2 * kTableColumns;
  static_assert(kCols == kTable && kTable == kLanes<uint16_t>);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t window = unit % plan.windows;
    const int64_t block = unit / plan.windows * 2;
    const int64_t rows = at_most(args.size - window * plan.window, plan.window);
    const int64_t cols = at_most(args.cols - block * kTableColumns, kCols);
    const auto* from = static_cast<const uint16_t*>(dense.data) + window * plan.window * dense.row_stride +
                       block * kTableColumns * dense.col_stride;
    uint16_t elements[kTable * kCols] = {};  // row after row, or, where that is how they lie, column after column
    const bool by_column = dense.row_stride == 1;
    const int64_t lines = by_column ? cols : rows, length = by_column ? rows : cols;
    const int64_t line_stride = by_column ? dense.col_stride : dense.row_stride;
    const int64_t step = by_column ? dense.row_stride : dense.col_stride;
    for (int64_t i = 0; i < lines; ++i, from += line_stride) {
      uint16_t* line = elements + i * kTable;
      if (step == 1) {
        std::memcpy(line, from, static_cast<size_t>(length) * sizeof *line);
      } else {
        for (int64_t j = 0; j < length; ++j) line[j] = from[j * step];
      }
    }
    Vec<uint16_t> tables[kTable];
#pragma GCC unroll 64
    for (int i = 0; i < kTable; ++i) tables[i] = load_bits<Vec<uint16_t>>(elements + i * kTable);
    if (!by_column) transpose<uint16_t, kTable>(tables);
    for (int64_t half = 0; half < 2 && block + half < plan.columns; ++half) {
      char* to =
          static_cast<char*>(args.packed) + ((block + half) * plan.windows + window) * kTableColumns * kTableBytes;
#pragma GCC unroll 64
      for (int i = 0; i < kTableColumns; ++i) store_bits(to + i * kTableBytes, tables[half * kTableColumns + i]);
    }
  }
}

// A column block and a block of windows, for all vectors of rows.
struct PermuteCall {
  const char* tables;  // [window][column]
  const char* kept;    // [vector][window][pairs and indices]
  int64_t windows;
  int64_t pairs;
  int64_t vectors;
  float* sums;         // [vector][column][row]
  const char* next;    // the tables that follow, fetched into the second-level cache meanwhile
  int64_t next_lines;  // per vector
};

template <int... kI>
__attribute__((target("avx512bf16"))) SDGP_INLINE void multiply_pair(__m512* sum, __m512i values, __m512i indices,
                                                                     const __m512i* resident, const char* tables,
                                                                     std::integer_sequence<int, kI...>) {
  asm("" : "+r"(tables));  // what is not resident is vpermw's memory operand, not a register's that is then spilled
  ((sum[kI] = _mm512_dpbf16_ps(
        sum[kI], (__m512bh)values,
        (__m512bh)_mm512_permutexvar_epi16(
            indices, kI < kResident ? resident[kI % kResident] : load_bits<__m512i>(tables + kI * kTableBytes)))),
   ...);
}

template <bool kFirst, int... kI, int... kR>
__attribute__((target("avx512bf16"))) SDGP_INLINE void multiply_vector(const PermuteCall& call, const char* kept,
                                                                       float* sums,
                                                                       std::integer_sequence<int, kI...> columns,
                                                                       std::integer_sequence<int, kR...>) {
  __m512 sum[kTableColumns] = {(kFirst ? __m512{} : load_bits<__m512>(sums + kI * kLaneRows))...};
  const char* tables = call.tables;
  for (int64_t window = 0; window < call.windows; ++window, tables += kTableColumns * kTableBytes) {
    const __m512i resident[kResident] = {load_bits<__m512i>(tables + kR * kTableBytes)...};
    int64_t left = call.pairs;
    for (; left >= 2; left -= 2, kept += 3 * kVectorBytes) {
      const auto indices = load_bits<__m512i>(kept);
      multiply_pair(sum, load_bits<__m512i>(kept + kVectorBytes), indices, resident, tables, columns);
      multiply_pair(sum, load_bits<__m512i>(kept + 2 * kVectorBytes), _mm512_srli_epi16(indices, 8), resident, tables,
                    columns);
    }
    if (left == 0) continue;
    multiply_pair(sum, load_bits<__m512i>(kept + kVectorBytes), load_bits<__m512i>(kept), resident, tables, columns);
    kept += 2 * kVectorBytes;
  }
  ((store_bits(sums + kI * kLaneRows, sum[kI])), ...);
}

template <bool kFirst>
__attribute__((noinline, target("avx512bf16"))) void multiply_windows(const PermuteCall& block) {
  const PermuteCall call = block;  // a copy: nothing that is stored can change it
  const char* kept = call.kept;
  const char* next = call.next;
  float* sums = call.sums;
  const int64_t bytes = call.windows * (call.pairs + ceil_div(call.pairs, 2)) * kVectorBytes;
  for (int64_t v = 0; v < call.vectors; ++v, kept += bytes, sums += kTableColumns * kLaneRows) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_vector<kFirst>(call, kept, sums, std::make_integer_sequence<int, kTableColumns>{},
                            std::make_integer_sequence<int, kResident>{});
  }
}

// Of one group in each of kPairRows rows side by side: the values that are not +0 move to the end of the kN slots, in
// ascending order, and their indices, from `index` on, likewise. kRanked: only the kN values from the `first` on.
template <int kN, bool kRanked, int... kI>
SDGP_INLINE void collect(const uint16_t* group, int64_t pitch, int64_t length, uint16_t index, int first,
                         Vec<uint16_t>* values, Vec<uint16_t>* indices, std::integer_sequence<int, kI...>) {
  using V = Vec<uint16_t>;
  V value[kN + 1] = {}, position[kN + 1] = {};
  V rank = splat(static_cast<uint16_t>(-first));
  for (int64_t j = 0; j < length; ++j, ++index, group += pitch) {
    const auto x = load_bits<V>(group);
    auto taken = x != 0;
    if constexpr (kRanked) {
      const V next = rank - (V)taken;
      taken &= rank < static_cast<uint16_t>(kN);
      rank = next;
    }
    value[kN] = x;
    position[kN] = splat(index);
    ((value[kI] = taken ? value[kI + 1] : value[kI]), ...);
    ((position[kI] = taken ? position[kI + 1] : position[kI]), ...);
  }
  ((values[kI] = value[kI]), ...);
  ((indices[kI] = position[kI]), ...);
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
  using V = Vec<uint16_t>;

  explicit PermuteProduct(const SpmmArgs& args)
      : args_(args), gradient_(*args.gradient), plan_(make_permute_plan(args)) {}

  void run_unit(int64_t unit) {
    if (unit / plan_.parts != chunk_) {  // else the unit before left its kept values
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
    constexpr int64_t kWindowBytes = kTableColumns * kTableBytes;
    float* sums = sums_.reserve(vectors_ * kTableColumns * kLaneRows);
    const int64_t live = ceil_div(rows_, kLaneRows);
    const char* const end = static_cast<const char*>(args_.packed) + plan_.columns * plan_.windows * kWindowBytes;
    for (int64_t window = 0; window < plan_.windows; window += kBlockWindows) {
      PermuteCall call{};
      call.windows = at_most(plan_.windows - window, kBlockWindows);
      call.tables = static_cast<const char*>(args_.packed) + (block * plan_.windows + window) * kWindowBytes;
      call.kept = kept_.data + window * vectors_ * plan_.window_bytes;
      call.pairs = plan_.pairs;
      call.vectors = live;
      call.sums = sums;
      call.next = call.tables + call.windows * kWindowBytes;
      call.next_lines = call.next < end ? ceil_div(call.windows * kWindowBytes / 64, live) : 0;
      window == 0 ? multiply_windows<true>(call) : multiply_windows<false>(call);
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

  // Prunes a chunk of rows and packs what they keep: [block of windows][vector][window][pairs and indices].
  void read_kept() {
    kept_.reserve(plan_.windows * vectors_ * plan_.window_bytes);
    const bool side_by_side = gradient_.channel_stride != 1 && gradient_.pixel_stride == 1;
    const int64_t tile_rows = side_by_side ? vectors_ * kLaneRows : kPairRows;
    const int64_t tile_windows = at_least(kTileElements / (tile_rows * plan_.window), 1);
    for (int64_t row = 0; row < rows_; row += tile_rows) {
      for (int64_t window = 0; window < plan_.windows; window += tile_windows) {
        const int64_t windows = at_most(plan_.windows - window, tile_windows);
        read_tile({row, at_most(rows_ - row, tile_rows), tile_rows, window, windows}, side_by_side);
      }
    }
  }

  // Rows of the chunk times windows of the reduction.
  struct Tile {
    int64_t row;
    int64_t rows;
    int64_t pitch;  // the rows and some that do not exist
    int64_t window;
    int64_t windows;
  };

  // Brings a tile into the form (reduction row, result row), pruned, and keeps what is left.
  void read_tile(const Tile& tile, bool side_by_side) {
    const int64_t first = tile.window * plan_.window;
    const int64_t size = at_most(args_.size - first, tile.windows * plan_.window);
    const int64_t row = first_row_ + tile.row;
    const auto* from =
        static_cast<const uint16_t*>(gradient_.data) + row * gradient_.pixel_stride + first * gradient_.channel_stride;
    uint16_t* elements = elements_.reserve(tile.windows * plan_.window * tile.pitch);
    if (tile.rows < tile.pitch) clear(elements, size * tile.pitch);
    PruneArgs part{};
    part.dtype = args_.dtype;
    part.pruning = args_.pruning;
    part.size = size;
    part.row_groups = ceil_div(args_.size, args_.pruning.m);
    part.first_group = static_cast<uint64_t>(row * part.row_groups + first / args_.pruning.m);
    part.out = elements;
    part.out_stride = tile.pitch;
    part.ndim = 1;
    if (side_by_side) {
      part.in = from;
      part.in_stride = gradient_.channel_stride;
      part.dims[0] = {tile.rows, gradient_.pixel_stride, 1, 1, false};
    } else {
      transpose_rows(from, tile.rows, size, elements);
      part.in = elements;
      part.in_stride = tile.pitch;
      part.dims[0] = {tile.pitch, 1, 1, 1, false};
    }
    if (side_by_side || !args_.pruning.keeps_all()) {
      if (args_.pruning.keeps_all())
        part.pruning = {.method = Method::kMagnitude, .n = 4, .m = 4, .seed = 0, .scale = false};
      prune_nm(part, 0, prune_nm_units(part));
    }
    for (int64_t i = 0; i < tile.windows; ++i) {
      const int64_t left = at_most(size - i * plan_.window, plan_.window);
      for (int64_t r = 0; r < tile.pitch; r += kPairRows) {
        char* to = place_of(tile.window + i, (tile.row + r) / kLaneRows);
        pack_window(elements + i * plan_.window * tile.pitch + r, tile.pitch, left, to,
                    to + vector_bytes(tile.window + i));
      }
    }
  }

  // kPairRows rows, some of which may not exist, to (reduction row, result row).
  void transpose_rows(const uint16_t* from, int64_t rows, int64_t size, uint16_t* to) const {
    const int64_t step = gradient_.pixel_stride;
    int64_t k = 0;
    if (rows == kPairRows && gradient_.channel_stride == 1) {
      for (; k + kPairRows <= size; k += kPairRows) {
        V tile[kPairRows];
#pragma GCC unroll 64
        for (int i = 0; i < kPairRows; ++i) tile[i] = load_bits<V>(from + i * step + k);
        transpose<uint16_t, kPairRows>(tile);
#pragma GCC unroll 64
        for (int i = 0; i < kPairRows; ++i) store_bits(to + (k + i) * kPairRows, tile[i]);
      }
    }
    for (; k < size; ++k) {
      for (int64_t r = 0; r < rows; ++r) to[k * kPairRows + r] = from[r * step + k * gradient_.channel_stride];
    }
  }

  // Where a window's kept values of two vectors of rows begin; the second vector's are block_bytes(window) further.
  char* place_of(int64_t window, int64_t vector) const {
    const int64_t first = window / kBlockWindows * kBlockWindows;
    return kept_.data + first * vectors_ * plan_.window_bytes + vector * vector_bytes(window) +
           (window - first) * plan_.window_bytes;
  }

  int64_t vector_bytes(int64_t window) const {
    const int64_t first = window / kBlockWindows * kBlockWindows;
    return at_most(plan_.windows - first, kBlockWindows) * plan_.window_bytes;
  }

  void pack_window(const uint16_t* elements, int64_t pitch, int64_t size, char* to, char* upper) {
    V values[kTable + 4], indices[kTable + 4];
    const int n = args_.pruning.n, m = args_.pruning.m;
    int at = 0;
    for (int64_t k = 0; k < size; k += m, at += n) {
      const int64_t length = at_most(size - k, m);
      for (int first = 0; first < n; first += kSlots) {
        visit_at_least(
            Values<1, 2, 3, 4, 5, 6, 7, kSlots>{}, n - first < kSlots ? n - first : kSlots, [&]<int kN>(Constant<kN>) {
              constexpr auto kSequence = std::make_integer_sequence<int, kN>{};
              const uint16_t* group = elements + k * pitch;
              const auto index = static_cast<uint16_t>(k);
              V* value = values + at + first;
              V* position = indices + at + first;
              n <= kSlots ? collect<kN, false>(group, pitch, length, index, 0, value, position, kSequence)
                          : collect<kN, true>(group, pitch, length, index, first, value, position, kSequence);
            });
      }
    }
    for (const int slots = static_cast<int>(2 * plan_.pairs) + 2; at < slots; ++at) values[at] = indices[at] = V{};
    for (int64_t pair = 0; pair < plan_.pairs; pair += 2) {
      store_pairs(indices[2 * pair] | indices[2 * pair + 2] << 8, indices[2 * pair + 1] | indices[2 * pair + 3] << 8,
                  to, upper);
      to += kVectorBytes;
      upper += kVectorBytes;
      for (int64_t p = pair; p < pair + 2 && p < plan_.pairs; ++p) {
        store_pairs(values[2 * p], values[2 * p + 1], to, upper);
        to += kVectorBytes;
        upper += kVectorBytes;
      }
    }
  }

  // Elements of `a` and `b` by turns: those of the lower 16 rows to `lower`, those of the upper to `upper`.
  static SDGP_INLINE void store_pairs(V a, V b, char* lower, char* upper) {
    [&]<int... kI>(std::integer_sequence<int, kI...>) {
      store_bits(lower, __builtin_shufflevector(a, b, (kI / 2 + kI % 2 * kPairRows)...));
      store_bits(upper, __builtin_shufflevector(a, b, (kLaneRows + kI / 2 + kI % 2 * kPairRows)...));
    }(std::make_integer_sequence<int, kPairRows>{});
  }

  static void clear(uint16_t* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count) * sizeof *to); }

  const SpmmArgs& args_;
  const Gradient& gradient_;
  const PermutePlan plan_;
  int64_t chunk_ = -1;
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t vectors_ = 0;
  Scratch<char> kept_;
  Scratch<uint16_t> elements_;
  Scratch<float> sums_;
};

inline int64_t permute_nm_units(const SpmmArgs& args) { return make_permute_plan(args).units; }

inline bool permute_nm(const SpmmArgs& args, int64_t begin, int64_t end) {
  return PermuteProduct<BFloat16>::run(args, begin, end);
}

}  // namespace sdgp::SDGP_ISA
#endif
