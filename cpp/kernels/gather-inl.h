// SPDX-License-Identifier: BSD-3-Clause
//
// Finds the N:M rows whose products form each result row: one per tap that meets the gradient. Any stride, padding and
// dilation. Compiled once per instruction set.
#pragma once

#include "pack_dense-inl.h"
#include "scratch-inl.h"

namespace sdgp::SDGP_ISA {

// Returns the position of the gradient that position `at` of the result meets at tap `k`, or -1 if there is none.
SDGP_INLINE int64_t source_of(const Axis2d& axis, int64_t at, int64_t k) {
  const int64_t padded = at + axis.padding - k * axis.dilation;
  if (padded < 0 || padded % axis.stride != 0) return -1;
  return padded / axis.stride < axis.out ? padded / axis.stride : -1;
}

// Returns whether result rows are rows of the gradient, in the same order.
inline bool is_plain_product(const SpmmArgs& args) {
  const auto is_point = [](const Axis2d& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0 && axis.in == axis.out;
  };
  return is_point(args.height) && is_point(args.width);
}

// What one set of taps adds to a chunk. The taps of a set share the L1 cache.
struct EntryList {
  // Per result row that receives a sum: its number in the chunk, then the N:M row of each tap, or -1 if there is none.
  const int32_t* entries;
  int64_t count;
  int64_t taps;
};

class Gather {
 public:
  const int64_t sets;
  Scratch<EntryList> lists;  // (sets)
  int64_t first_source = 0;  // the first N:M row that the chunk needs, over all samples
  int64_t sources = 0;       // the number of N:M rows from there on

  Gather(const SpmmArgs& args, const DensePlan& dense, int64_t most_rows)
      : sets(ceil_div(dense.taps, dense.tap_set)), args_(args), dense_(dense) {
    const Axis2d& w = args.width;
    int32_t* column = columns_.reserve(w.in * w.kernel);
    for (int64_t x = 0; x < w.in; ++x) {
      for (int64_t k = 0; k < w.kernel; ++k) *column++ = static_cast<int32_t>(source_of(w, x, k));
    }
    line_.reserve(args.height.kernel);
    table_.reserve(most_rows * dense.taps);
    entries_.reserve(most_rows * (dense.taps + sets));
    lists.reserve(sets);
  }

  // Fills the lists for the result rows from `first_row` on, counted over all samples.
  void find(int64_t first_row, int64_t rows) {
    find_sources(first_row, rows);
    list_entries(rows);
  }

 private:
  // Fills the table of (result row, tap) -> N:M row. N:M rows are counted from the first one that the chunk needs.
  void find_sources(int64_t first_row, int64_t rows) {
    const Axis2d& h = args_.height;
    const Axis2d& w = args_.width;
    int32_t* entry = table_.data;
    int64_t x = first_row % w.in;
    int64_t y = first_row / w.in % h.in;
    int64_t sample = first_row / w.in / h.in;
    first_source = sample * h.out * w.out;
    int64_t low = INT32_MAX;
    int64_t high = -1;
    for (int64_t r = 0; r < rows; ++r) {
      if (r == 0 || x == 0) find_line(y, sample);
      const int32_t* column = columns_.data + x * w.kernel;
      for (int64_t ky = 0; ky < h.kernel; ++ky) {
        for (int64_t kx = 0; kx < w.kernel; ++kx) {
          const int64_t source = line_.data[ky] < 0 || column[kx] < 0 ? -1 : line_.data[ky] + column[kx];
          *entry++ = static_cast<int32_t>(source);
          if (source >= 0 && source < low) low = source;
          if (source > high) high = source;
        }
      }
      if (++x < w.in) continue;
      x = 0;
      if (++y < h.in) continue;
      y = 0;
      ++sample;
    }
    sources = high < 0 ? 0 : high - low + 1;
    first_source += high < 0 ? 0 : low;
    for (int64_t i = 0; i < rows * dense_.taps; ++i) {
      if (table_.data[i] >= 0) table_.data[i] -= static_cast<int32_t>(low);
    }
  }

  void find_line(int64_t y, int64_t sample) {
    const Axis2d& h = args_.height;
    for (int64_t k = 0; k < h.kernel; ++k) {
      const int64_t source = source_of(h, y, k);
      line_.data[k] = source < 0 ? -1 : (sample * h.out + source) * args_.width.out - first_source;
    }
  }

  // Lists the rows that each set of taps adds to. The first set lists all rows because it also initializes their sums.
  void list_entries(int64_t rows) {
    int32_t* entry = entries_.data;
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t first = set * dense_.tap_set;
      const int64_t taps = dense_.taps - first < dense_.tap_set ? dense_.taps - first : dense_.tap_set;
      lists.data[set] = {entry, 0, taps};
      for (int64_t r = 0; r < rows; ++r) {
        bool any = set == 0;
        for (int64_t t = 0; t < taps; ++t) {
          entry[1 + t] = table_.data[r * dense_.taps + first + t];
          any |= entry[1 + t] >= 0;
        }
        if (!any) continue;
        entry[0] = static_cast<int32_t>(r);
        entry += 1 + taps;
        ++lists.data[set].count;
      }
    }
  }

  const SpmmArgs& args_;
  const DensePlan& dense_;
  Scratch<int32_t> columns_;  // (width, kernel width)
  Scratch<int64_t> line_;     // (kernel height), for the current line of the result
  Scratch<int32_t> table_;    // (rows, taps)
  Scratch<int32_t> entries_;
};

}  // namespace sdgp::SDGP_ISA
