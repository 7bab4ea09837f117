// SPDX-License-Identifier: BSD-3-Clause
//
// Cases for compress_nm and for its inverse, decompress_nm.
#pragma once

#include "prune_nm.h"

namespace sdgp::test {

template <class T>
void compress(const Kernels& table, sdgp::CompressArgs args, const Array<T>& in, const Array<T>& values,
              const Array<uint8_t>& indices, int64_t pieces) {
  args.prune.in = in.data;
  args.values = values.data;
  args.indices = indices.data;
  calls += pieces;
  in_pieces(table.compress_nm_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.compress_nm(args, begin, end);
    return true;
  });
}

template <class F>
void fuzz_decompress(Bytes& bytes, const PruneArgs& prune, const Compressed<typename F::Type>& from,
                     const std::vector<typename F::Type>& rows, int64_t pieces) {
  using T = typename F::Type;
  const auto count = static_cast<int64_t>(from.values.size());
  const Array<T> values(count);
  const Array<uint8_t> indices(count);
  std::copy(from.values.begin(), from.values.end(), values.data);
  std::copy(from.indices.begin(), from.indices.end(), indices.data);
  const Array<T> out(static_cast<int64_t>(rows.size()));
  const sdgp::DecompressArgs args{.values = values.data,
                                  .indices = indices.data,
                                  .out = out.data,
                                  .dtype = prune.dtype,
                                  .n = prune.pruning.n,
                                  .m = prune.pruning.m,
                                  .size = prune.size,
                                  .rows = out.size / prune.size};
  const auto run = [&](const Kernels& table) {
    calls += pieces;
    return in_pieces(args.rows, pieces,
                     [&](int64_t begin, int64_t end) { return table.decompress_nm(args, begin, end); });
  };
  const int64_t at = bytes.below(count);
  const auto wrong = static_cast<uint8_t>(prune.pruning.m + bytes.below(256 - prune.pruning.m));
  for (const Kernels* table : kTables) {
    require(run(*table), "decompress_nm: valid");
    require(std::memcmp(out.data, rows.data(), rows.size() * sizeof(T)) == 0, "decompress_nm: the inverse");
    const uint8_t right = std::exchange(indices[at], wrong);
    require(!run(*table), "decompress_nm: an index out of range");
    indices[at] = right;
  }
}

template <class F>
void fuzz_compress(Bytes& bytes) {
  using T = typename F::Type;
  sdgp::CompressArgs args{};
  args.pruned = bytes.below(4) == 0;
  args.prune = draw_tensor(bytes, args.pruned);
  args.prune.dtype = F::kDType;
  args.prune.pruning.method = bytes.flag() ? Method::kMagnitude : bytes.flag() ? Method::kRandom : Method::kMvue;
  if (bytes.below(8) == 0) args.prune.pruning.n = args.prune.pruning.m;
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const Array<T> drawn(extent(args.prune, false), skew);
  fill<F>(drawn, static_cast<Values>(bytes.below(5)), bytes);
  const Array<T> pruned(extent(args.prune, true), skew);
  const bool all = args.prune.pruning.keeps_all();
  if (!all) prune(*kTables[0], args.prune, drawn, pruned, 1);

  const int64_t groups = ceil_div(args.prune.size, args.prune.pruning.m);
  std::map<uint64_t, int64_t> offset_of_row;
  for_each_row(args.prune, [&](int64_t in_at, int64_t out_at, uint64_t row, int64_t) {
    offset_of_row[row] = all ? in_at : out_at;
  });
  Compressed<T> expected;
  std::vector<T> rows;
  for (const auto& [row, at] : offset_of_row) {
    const int64_t stride = all ? args.prune.in_stride : args.prune.out_stride;
    for (int64_t k = 0; k < args.prune.size; ++k) rows.push_back((all ? drawn : pruned)[at + k * stride]);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t length = std::min<int64_t>(args.prune.pruning.m, args.prune.size - g * args.prune.pruning.m);
      pack_group(rows.data() + static_cast<int64_t>(rows.size()) - args.prune.size + g * args.prune.pruning.m, length,
                 args.prune.pruning.n, expected);
    }
  }
  const auto count = static_cast<int64_t>(expected.values.size());
  for (const Kernels* table : kTables) {
    const Array<T> values(count, skew);
    const Array<uint8_t> indices(count, skew);
    compress(*table, args, args.pruned && !all ? pruned : drawn, values, indices, pieces);
    require(std::equal(expected.indices.begin(), expected.indices.end(), indices.data), "compress_nm: indices");
    for (int64_t i = 0; i < count; ++i) {
      require(same<F>(values[i], expected.values[static_cast<size_t>(i)]), "compress_nm: values");
    }
  }
  fuzz_decompress<F>(bytes, args.prune, expected, rows, pieces);
}

}  // namespace sdgp::test
