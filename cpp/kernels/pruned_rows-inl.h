// SPDX-License-Identifier: BSD-3-Clause
//
// Copies pruned rows of a tensor of any layout into a buffer, one after the other. Compression and products read this
// buffer. Compiled once per instruction set.
#pragma once

#include "prune_any-inl.h"
#include "scratch-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int kPack = 8;  // elements that are packed at a time

// Transposes (size, rows) to (rows, size). The rows of the result are `pitch` elements apart.
template <class T>
void transpose_block(const T* from, int64_t size, int64_t rows, T* to, int64_t pitch) {
  constexpr int kL = kLanes<T>;
  const int64_t full_size = size / kL * kL, full_rows = rows / kL * kL;
  for (int64_t c = 0; c < full_size; c += kL) {
    for (int64_t r = 0; r < full_rows; r += kL) {
      Vec<T> tile[kL];
#pragma GCC unroll 64
      for (int i = 0; i < kL; ++i) tile[i] = load_bits<Vec<T>>(from + (c + i) * rows + r);
      transpose<T, kL>(tile);
#pragma GCC unroll 64
      for (int i = 0; i < kL; ++i) store_bits(to + (r + i) * pitch + c, tile[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < full_rows ? full_size : 0; c < size; ++c) to[r * pitch + c] = from[c * rows + r];
  }
}

// A buffer of rows, one after the other, that are pruned or, if `copy` is set, only copied. Values are moved as
// integers. Only the input, the size, the pattern and the seed of `rows_of` are used. Its only dimension is the rows.
template <class T>
class PrunedRows {
 public:
  // Returns the rows, valid until the next call. kPack - 1 elements beyond the end are readable.
  const T* read(const PruneArgs& rows_of, bool copy) {
    T* to = rows_.reserve(rows_of.dims[0].size * rows_of.size + kPack);
    read_into(rows_of, copy, to, rows_of.size);
    return to;
  }

  // Writes rows that are `pitch` elements apart.
  void read_into(const PruneArgs& rows_of, bool copy, T* to, int64_t pitch) {
    PruneArgs part = rows_of;
    Dim& rows = part.dims[0];
    const bool side_by_side = rows.in_stride == 1 && part.in_stride != 1 && rows.size > 1;
    T* buffer = side_by_side ? columns_.reserve(rows.size * part.size) : to;
    part.out = buffer;
    part.out_stride = side_by_side ? rows.size : 1;
    part.ndim = 1;
    rows.out_stride = side_by_side ? 1 : pitch;
    if (copy) part.pruning = kKeepAll;
    prune_nm_kernel(part, 0, prune_nm_units(part));
    if (side_by_side) transpose_block(buffer, part.size, rows.size, to, pitch);
  }

 private:
  Scratch<T> rows_;
  Scratch<T> columns_;
};

}  // namespace sdgp::SDGP_ISA
