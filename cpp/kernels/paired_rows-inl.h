// SPDX-License-Identifier: BSD-3-Clause
//
// Prunes rows of bfloat16 and packs them for the permute kernel (Note [Permute kernel]): lanes are rows, and the kept
// values of a row come in pairs.
#pragma once

#include "permute_kernel-inl.h"
#include "prune_any-inl.h"
#include "scratch-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int64_t kTileElements = 8192;  // elements that are pruned at a time, in the L1 cache
constexpr int kSlots = 8;                // kept values that are collected at a time

// Collects one group of each of kPairRows rows that lie side by side. The values that are not +0 move to the end of the
// kN slots, in ascending order. Their indices, which start at `index`, move the same way. kRanked: collects only kN
// values, starting with kept value number `first`.
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

// Rows of a gradient. They may start inside the gradient's rows.
struct RowBlock {
  const void* data;  // the first element
  int64_t rows;
  int64_t row_stride;
  int64_t size;  // whole windows, or the rest of the row
  int64_t element_stride;
  uint64_t first_group;  // logical index
  int64_t row_groups;
};

// Where the words of two vectors of rows are stored, and the step in bytes from one word to the next.
struct WordPlace {
  char* lower;
  char* upper;
  int64_t step;
};

class PairedRows {
 public:
  explicit PairedRows(const Pruning& pruning) : pruning_(pruning), window_(pruning) {}

  // Prunes the rows and packs the kept values. place_of(window, row) returns where to store the words of the kPairRows
  // rows from `row` on; `window` and `row` count from the start of `block`. Missing rows keep nothing.
  template <class PlaceOf>
  void read(const RowBlock& block, const PlaceOf& place_of) {
    const bool side_by_side = block.element_stride != 1 && block.row_stride == 1;
    const int64_t rows = side_by_side ? at_most(ceil_div(block.rows, kPairRows) * kPairRows, 256) : kPairRows;
    const int64_t size = at_least(kTileElements / (rows * window_.size), 1) * window_.size;
    for (int64_t row = 0; row < block.rows; row += rows) {
      for (int64_t k = 0; k < block.size; k += size) {
        RowBlock tile = block;
        tile.data = static_cast<const uint16_t*>(block.data) + row * block.row_stride + k * block.element_stride;
        tile.rows = at_most(block.rows - row, rows);
        tile.size = at_most(block.size - k, size);
        tile.first_group += static_cast<uint64_t>(row * block.row_groups + k / pruning_.m);
        const int64_t pitch = ceil_div(tile.rows, kPairRows) * kPairRows;
        const uint16_t* elements = prune(tile, pitch, side_by_side);
        for (int64_t at = 0; at < tile.size; at += window_.size) {
          for (int64_t r = 0; r < tile.rows; r += kPairRows) {
            pack(elements + at * pitch + r, pitch, at_most(tile.size - at, window_.size),
                 place_of((k + at) / window_.size, row + r));
          }
        }
      }
    }
  }

 private:
  using V = Vec<uint16_t>;

  // Returns the pruned elements as (reduction row, row). Missing rows are zero.
  const uint16_t* prune(const RowBlock& tile, int64_t pitch, bool side_by_side) {
    uint16_t* elements = elements_.reserve(tile.size * pitch);
    if (tile.rows < pitch) std::memset(elements, 0, static_cast<size_t>(tile.size * pitch) * sizeof *elements);
    PruneArgs part{};
    part.dtype = DType::kBFloat16;
    part.pruning = pruning_;
    part.size = tile.size;
    part.row_groups = tile.row_groups;
    part.first_group = tile.first_group;
    part.out = elements;
    part.out_stride = pitch;
    part.ndim = 1;
    if (side_by_side) {
      part.in = tile.data;
      part.in_stride = tile.element_stride;
      part.dims[0] = {tile.rows, 1, 1, 1, false};
    } else {
      transpose_rows(tile, elements);
      if (pruning_.keeps_all()) return elements;
      part.in = elements;
      part.in_stride = pitch;
      part.dims[0] = {pitch, 1, 1, 1, false};
    }
    if (pruning_.keeps_all()) part.pruning = kKeepAll;
    prune_nm_kernel(part, 0, prune_nm_units(part));
    return elements;
  }

  // Transposes at most kPairRows rows to (reduction row, row).
  static void transpose_rows(const RowBlock& tile, uint16_t* to) {
    const auto* from = static_cast<const uint16_t*>(tile.data);
    int64_t k = 0;
    if (tile.rows == kPairRows && tile.element_stride == 1) {
      for (; k + kPairRows <= tile.size; k += kPairRows) {
        V lines[kPairRows];
#pragma GCC unroll 64
        for (int i = 0; i < kPairRows; ++i) lines[i] = load_bits<V>(from + i * tile.row_stride + k);
        transpose<uint16_t, kPairRows>(lines);
#pragma GCC unroll 64
        for (int i = 0; i < kPairRows; ++i) store_bits(to + (k + i) * kPairRows, lines[i]);
      }
    }
    for (; k < tile.size; ++k) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        to[k * kPairRows + r] = from[r * tile.row_stride + k * tile.element_stride];
      }
    }
  }

  // Packs one window of kPairRows rows.
  void pack(const uint16_t* elements, int64_t pitch, int64_t size, WordPlace to) const {
    V values[kTable + 4], indices[kTable + 4];
    const int n = pruning_.n, m = pruning_.m;
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
    for (const int slots = static_cast<int>(2 * window_.pairs) + 2; at < slots; ++at) values[at] = indices[at] = V{};
    for (int64_t pair = 0; pair < window_.pairs; pair += 2) {
      store_pairs(indices[2 * pair] | indices[2 * pair + 2] << 8, indices[2 * pair + 1] | indices[2 * pair + 3] << 8,
                  to);
      for (int64_t p = pair; p < pair + 2 && p < window_.pairs; ++p) store_pairs(values[2 * p], values[2 * p + 1], to);
    }
  }

  // Stores one word per row: the row's element of `a`, then its element of `b`.
  static SDGP_INLINE void store_pairs(V a, V b, WordPlace& to) {
    [&]<int... kI>(std::integer_sequence<int, kI...>) {
      store_bits(to.lower, __builtin_shufflevector(a, b, (kI / 2 + kI % 2 * kPairRows)...));
      store_bits(to.upper, __builtin_shufflevector(a, b, (kLaneRows + kI / 2 + kI % 2 * kPairRows)...));
    }(std::make_integer_sequence<int, kPairRows>{});
    to.lower += to.step;
    to.upper += to.step;
  }

  const Pruning pruning_;
  const Window window_;
  Scratch<uint16_t> elements_;
};

}  // namespace sdgp::SDGP_ISA
#endif
