// SPDX-License-Identifier: BSD-3-Clause
//
// compress_nm and its inverse. prune_nm prunes some rows into a buffer in the cache, and they are packed from there. So
// compression selects what prune_nm selects, for every method, type and layout. Compiled once per instruction set.
#pragma once

#include "packer-inl.h"

namespace sdgp::SDGP_ISA {

// How a call is divided: positions of the outer dimensions x pieces of the innermost dimension.
struct CompressPlan {
  int64_t inner;  // rows along the innermost dimension
  int64_t piece;  // rows that are pruned at a time
  int64_t pieces;
  int64_t units;
};

inline CompressPlan make_compress_plan(const PruneArgs& args) {
  CompressPlan plan{};
  int64_t rows = 1;
  for (int d = 0; d < args.ndim; ++d) rows *= args.dims[d].size;
  plan.inner = args.ndim ? args.dims[args.ndim - 1].size : 1;
  // If rows lie side by side, vector loads need several of them.
  const int64_t least = args.in_stride == 1 ? 1 : 64;
  plan.piece = kCompressElements / args.size > least ? kCompressElements / args.size : least;
  plan.pieces = ceil_div(plan.inner, plan.piece);
  plan.units = rows / plan.inner * plan.pieces;
  return plan;
}

template <class T>
void compress_range(const CompressArgs& args, int64_t begin, int64_t end) {
  const PruneArgs& whole = args.prune;
  const CompressPlan plan = make_compress_plan(whole);
  const int64_t groups = ceil_div(whole.size, whole.pruning.m);
  const int64_t kept = groups * whole.pruning.n;
  const Packer<T> packer(whole.pruning);
  PrunedRows<T> pruned;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % plan.pieces * plan.piece;
    const Dim inner = whole.ndim ? whole.dims[whole.ndim - 1] : Dim{1, whole.size, 0, 1, false};
    const Row outer = find_row(whole, whole.ndim ? whole.ndim - 1 : 0, unit / plan.pieces);
    const uint64_t row = outer.index + static_cast<uint64_t>(first * inner.row_step);

    PruneArgs part = whole;
    part.in = static_cast<const T*>(whole.in) + outer.in + first * inner.in_stride;
    part.first_group = row * static_cast<uint64_t>(groups);
    part.dims[0] = inner;
    part.dims[0].size = plan.inner - first < plan.piece ? plan.inner - first : plan.piece;
    const T* buffer = pruned.read(part, args.pruned || whole.pruning.keeps_all());

    T* values = static_cast<T*>(args.values) + row * static_cast<uint64_t>(kept);
    uint8_t* indices = args.indices + row * static_cast<uint64_t>(kept);
    const int64_t rows = part.dims[0].size;
    if (inner.row_step == 1 && whole.size % whole.pruning.m == 0) {
      packer.pack_row(buffer, rows * whole.size, values, indices);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * inner.row_step * kept;
      packer.pack_row(buffer + r * whole.size, whole.size, values + at, indices + at);
    }
  }
}

inline int64_t compress_nm_units(const CompressArgs& args) { return make_compress_plan(args.prune).units; }

inline void compress_nm_kernel(const CompressArgs& args, int64_t begin, int64_t end) {
  visit(DTypes{}, args.prune.dtype,
        [&]<DType kDType>(Constant<kDType>) { compress_range<WordOf<kDType>>(args, begin, end); });
}

// If an index occurs twice in a group, the first value counts; the later ones only fill a short group.
template <class T>
bool decompress_range(const DecompressArgs& args, int64_t begin, int64_t end) {
  const int64_t groups = ceil_div(args.size, args.m);
  bool valid = true;
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(args.out) + row * args.size;
    std::memset(out, 0, static_cast<size_t>(args.size) * sizeof(T));
    for (int64_t group = 0; group < groups; ++group, out += args.m) {
      const int64_t left = args.size - group * args.m;
      const int64_t length = left < args.m ? left : args.m;
      const int64_t first = (row * groups + group) * args.n;
      for (int64_t slot = first + args.n - 1; slot >= first; --slot) {
        const uint8_t index = args.indices[slot];
        if (index < length) {
          out[index] = static_cast<const T*>(args.values)[slot];
        } else {
          valid = false;
        }
      }
    }
  }
  return valid;
}

inline bool decompress_nm_kernel(const DecompressArgs& args, int64_t begin, int64_t end) {
  return visit(DTypes{}, args.dtype,
               [&]<DType kDType>(Constant<kDType>) { return decompress_range<WordOf<kDType>>(args, begin, end); });
}

}  // namespace sdgp::SDGP_ISA
