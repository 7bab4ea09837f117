// SPDX-License-Identifier: BSD-3-Clause
//
// Cases for spmm_nm: linear layers and convolutions, with a compressed gradient or pruning inside the kernel.
#pragma once

#include "compress_nm.h"

namespace sdgp::test {

inline sdgp::Axis2d draw_axis(Bytes& bytes) {
  if (bytes.flag()) return kPoint;
  return {1 + bytes.below(7), 1 + bytes.below(7), 1 + bytes.below(3),
          1 + bytes.below(3), bytes.below(4),     1 + bytes.below(2)};
}

inline Product draw_product(Bytes& bytes) {
  const int64_t limit = draw_limit(bytes);
  Product p{};
  p.height = draw_axis(bytes);
  p.width = draw_axis(bytes);
  p.groups = 1 + (bytes.byte() >= 192) * bytes.below(3);
  p.size = 1 + bytes.below(std::min<int64_t>(limit / 6, 1500));
  p.cols = 1 + bytes.below(std::min<int64_t>(limit / 6, 300));
  const int64_t pixels = std::max(p.height.out * p.width.out, p.height.in * p.width.in);
  p.samples = 1 + bytes.below(std::clamp<int64_t>(limit * 4 / (p.size + p.cols) / pixels, 1, 300));
  p.weight = static_cast<Weight>(bytes.below(3));
  p.channels_first = bytes.flag();
  return p;
}

template <class F>
bool times(const Kernels& table, sdgp::SpmmArgs args, const Array<typename F::Type>& out, int64_t pieces) {
  const Packed packed(table.packed_bytes(args));
  args.packed = packed.data;
  args.out = out.data;
  calls += 2 * pieces;
  in_pieces(table.pack_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.pack(args, begin, end);
    return true;
  });
  return in_pieces(table.spmm_nm_units(args), pieces,
                   [&](int64_t begin, int64_t end) { return table.spmm_nm(args, begin, end); });
}

template <class F>
void check_sums(const sdgp::SpmmArgs& args, const Array<typename F::Type>& out) {
  const Sums sums = product_sums<F>(args);
  const double terms = static_cast<double>(ceil_div(args.size, args.pruning.m) * args.pruning.n * args.height.kernel *
                                           args.width.kernel);
  for (int64_t i = 0; i < out.size; ++i) {
    const double exact = sums.exact[static_cast<size_t>(i)];
    if (F::kDType == sdgp::DType::kFloat16 && std::fabs(exact) > 65000) continue;  // may round to infinity
    const double bound =
        (terms + 2) * std::ldexp(1, sizeof(out[0]) == 8 ? -52 : -23) * sums.magnitude[static_cast<size_t>(i)] +
        0.51 * F::kRounding * std::fabs(exact) + (F::kRounding > 0 ? std::ldexp(1, -24) : 0);
    require(std::fabs(F::value(out[i]) - exact) <= bound, "spmm_nm: as scalar code");
  }
}

template <class F>
void fuzz_product(Bytes& bytes) {
  using T = typename F::Type;
  const Product p = draw_product(bytes);
  const int m = static_cast<int>(bytes.flag() ? int64_t{1} << bytes.below(7) : 1 + bytes.below(64));
  const int n = static_cast<int>(1 + bytes.below(m));
  const bool channels_first = bytes.flag();
  const Method method = bytes.flag() ? Method::kMagnitude : bytes.flag() ? Method::kRandom : Method::kMvue;
  const sdgp::Pruning pruning{.method = method, .n = n, .m = m, .seed = bytes.byte(), .scale = false};
  sdgp::SpmmArgs args = describe(p, F::kDType, pruning);
  PruneArgs rows = describe_rows(p, F::kDType, pruning, channels_first);
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const int64_t threads = 1 + bytes.below(8);
  const auto values = static_cast<Values>(bytes.below(5));
  const Array<T> gradient(p.samples * p.groups * p.size * p.height.out * p.width.out, skew);
  const Array<T> dense(p.groups * p.size * p.cols * p.height.kernel * p.width.kernel, skew);
  fill<F>(gradient, values, bytes);
  fill<F>(dense, bytes.below(4) == 0 ? values : kTame, bytes);
  args.dense.data = dense.data;

  const Array<T> kept(p.samples * args.compressed.sample_stride, skew);
  const Array<uint8_t> indices(kept.size, skew);
  compress(*kTables[0], {rows, false, nullptr, nullptr}, gradient, kept, indices, 1);
  args.compressed.values = kept.data;
  args.compressed.indices = indices.data;
  rows.in = gradient.data;
  const sdgp::Gradient pruned_inside = describe_gradient(p, rows);
  const Array<T> first(p.samples * p.height.in * p.width.in * p.groups * p.cols, skew);
  for (const Kernels* table : kTables) {
    const Array<T> whole(first.size, skew);
    const Array<T> cut(first.size, skew);
    args.gradient = nullptr;
    args.threads = 1;
    require(times<F>(*table, args, whole, 1), "spmm_nm: valid");
    require(times<F>(*table, args, cut, pieces), "spmm_nm: valid in pieces");
    require(same<F>(whole, cut), "spmm_nm: in pieces");
    if (values == kTame && table == kTables[0]) check_sums<F>(args, whole);
    args.gradient = &pruned_inside;
    args.threads = threads;
    require(times<F>(*table, args, cut, pieces), "spmm_nm: valid gradient");
    if (table->permutes(args)) {  // adds in another order than the kernel for compressed rows
      require(times<F>(*table, args, whole, 1), "spmm_nm: valid gradient, permuted");
      if (values == kTame) check_sums<F>(args, whole);
    }
    require(same<F>(whole, cut), "spmm_nm: of a gradient pruned inside");
  }
  args.gradient = nullptr;
  indices[bytes.below(indices.size)] = static_cast<uint8_t>(m + bytes.below(256 - m));
  const bool valid =
      times<F>(*kTables[static_cast<size_t>(bytes.below(static_cast<int64_t>(kTables.size())))], args, first, pieces);
  const bool all_read = p.height.kernel * p.width.kernel * p.height.in * p.width.in * p.height.out * p.width.out == 1;
  require(!valid || !all_read || p.height.padding + p.width.padding > 0, "spmm_nm: an index out of range");
}

}  // namespace sdgp::test
