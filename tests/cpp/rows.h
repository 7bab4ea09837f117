// SPDX-License-Identifier: BSD-3-Clause
//
// Loops that follow a kernel's arguments: over all rows, and over all units in pieces.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace sdgp::test {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs [0, units) in the given number of pieces, as threads would. Returns true if all pieces were valid.
template <class Run>
bool in_pieces(int64_t units, int64_t pieces, Run run) {
  bool valid = true;
  for (int64_t p = 0; p < pieces; ++p) valid &= run(units * p / pieces, units * (p + 1) / pieces);
  return valid;
}

inline int64_t extent(const PruneArgs& args, bool out) {
  int64_t last = (args.size - 1) * (out ? args.out_stride : args.in_stride);
  for (int d = 0; d < args.ndim; ++d)
    last += (args.dims[d].size - 1) * (out ? args.dims[d].out_stride : args.dims[d].in_stride);
  return last + 1;
}

// Calls row(in offset, out offset, index, sample) for every row.
template <class Visit>
void for_each_row(const PruneArgs& args, Visit visit, int d = 0, int64_t in = 0, int64_t out = 0, uint64_t index = 0,
                  int64_t sample = 0) {
  if (d == args.ndim) return visit(in, out, index, sample);
  const sdgp::Dim& dim = args.dims[d];
  for (int64_t i = 0; i < dim.size; ++i) {
    for_each_row(args, visit, d + 1, in + i * dim.in_stride, out + i * dim.out_stride,
                 index + static_cast<uint64_t>(i * dim.row_step), dim.per_factor ? i : sample);
  }
}

}  // namespace sdgp::test
