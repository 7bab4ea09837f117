// SPDX-License-Identifier: BSD-3-Clause
//
// Cases for prune_nm: a tensor in any layout, a method and pieces, compared with scalar code or the specification.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "../cpp/scalar.h"
#include "setup.h"

namespace sdgp::test {

// Draws any order of the dimensions in memory. If `loose`, there may also be gaps and expanded dimensions.
inline std::array<int64_t, 4> draw_strides(Bytes& bytes, const std::array<int64_t, 4>& size, int ndim, bool loose) {
  std::array<int64_t, 4> stride{};
  std::array<int, 4> left = {0, 1, 2, 3};
  int64_t step = 1;
  for (int count = ndim; count > 0; --count) {
    const auto at = static_cast<size_t>(bytes.below(count));
    const auto d = static_cast<size_t>(left[at]);
    std::swap(left[at], left[static_cast<size_t>(count - 1)]);
    stride[d] = step;
    const int64_t choice = loose ? bytes.below(8) : 0;
    if (choice == 1) stride[d] = 0;
    if (choice == 2) stride[d] = step = 2 * step;
    if (choice == 3) step += 3;
    if (stride[d] != 0) step *= size[d];
  }
  return stride;
}

// Describes a tensor as the ops do: the other dimensions come by descending output stride, and none has size 1.
inline PruneArgs draw_tensor(Bytes& bytes, bool dense) {
  PruneArgs args{};
  const int64_t limit = draw_limit(bytes);
  const int ndim = static_cast<int>(1 + bytes.below(4));
  std::array<int64_t, 4> size{};
  int64_t left = limit;
  for (int d = 0; d < ndim; ++d) {
    const int64_t most = bytes.flag() ? left : std::min<int64_t>(left, 20);
    size[static_cast<size_t>(d)] = 1 + bytes.below(most);
    left /= size[static_cast<size_t>(d)];
  }
  const auto out_stride = draw_strides(bytes, size, ndim, false);
  const auto in_stride = dense || bytes.flag() ? out_stride : draw_strides(bytes, size, ndim, true);
  const auto pruned = static_cast<int>(bytes.below(ndim));
  args.size = size[static_cast<size_t>(pruned)];
  args.in_stride = in_stride[static_cast<size_t>(pruned)];
  args.out_stride = out_stride[static_cast<size_t>(pruned)];
  args.dim_per_factor = ndim > 2;
  int64_t row_step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    const auto at = static_cast<size_t>(d);
    if (d == pruned) continue;
    if (size[at] != 1) {
      args.dims[args.ndim++] = {size[at], in_stride[at], out_stride[at], row_step, d == (pruned == 0 ? 1 : 0)};
    }
    row_step *= size[at];
  }
  std::stable_sort(args.dims, args.dims + args.ndim,
                   [](const sdgp::Dim& a, const sdgp::Dim& b) { return a.out_stride > b.out_stride; });
  args.pruning.m = static_cast<int>(bytes.flag() ? int64_t{2} << bytes.below(6) : 2 + bytes.below(63));
  args.pruning.n = static_cast<int>(1 + bytes.below(args.pruning.m - 1));
  args.pruning.seed = bytes.byte();
  return args;
}

template <class T>
void prune(const Kernels& table, PruneArgs args, const Array<T>& in, const Array<T>& out, int64_t pieces) {
  args.in = in.data;
  args.out = out.data;
  calls += pieces;
  in_pieces(table.prune_nm_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.prune_nm(args, begin, end);
    return true;
  });
}

template <class F>
std::vector<typename F::Type> expected_group(const PruneArgs& args, const std::vector<typename F::Type>& x,
                                             uint64_t index) {
  using T = typename F::Type;
  const T one = from_eighths<F>(8);
  if (args.pruning.method == Method::kMagnitude) {
    return scalar::masked(args.pruning.scale ? std::vector<T>(x.size(), one) : x,
                          scalar::largest_magnitudes(x, args.pruning.n));
  }
  if (args.pruning.method == Method::kRandom) {
    return scalar::random(args.pruning.scale ? std::vector<T>(x.size(), one) : x, args.pruning.n, args.pruning.seed,
                          index);
  }
  if constexpr (sizeof(T) > 2) {
    if (args.pruning.method == Method::kMvue) return scalar::mvue(x, args.pruning.n, args.pruning.seed, index);
    if (args.pruning.method == Method::kRescaleGroup) return scalar::rescale_group(x, args.pruning.n);
    if (args.pruning.method == Method::kUnstructured) {
      return scalar::unstructured(x, args.pruning.n, static_cast<T>(args.pruning.step), args.pruning.seed, index);
    }
  }
  std::abort();
}

// Calls group(in offset, out offset, length, index) for every group.
template <class Visit>
void for_each_group(const PruneArgs& args, Visit visit) {
  const int64_t groups = ceil_div(args.size, args.pruning.m);
  const auto row_groups = static_cast<uint64_t>(args.row_groups ? args.row_groups : groups);
  for_each_row(args, [&](int64_t in_at, int64_t out_at, uint64_t row, int64_t) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * args.pruning.m;
      visit(in_at + first * args.in_stride, out_at + first * args.out_stride,
            std::min<int64_t>(args.pruning.m, args.size - first),
            args.first_group + row * row_groups + static_cast<uint64_t>(g));
    }
  });
}

template <class F>
void check_groups(const PruneArgs& args, const Array<typename F::Type>& in, const Array<typename F::Type>& out) {
  for_each_group(args, [&](int64_t in_at, int64_t out_at, int64_t length, uint64_t index) {
    std::vector<typename F::Type> group;
    for (int64_t j = 0; j < length; ++j) group.push_back(in[in_at + j * args.in_stride]);
    group = expected_group<F>(args, group, index);
    for (int64_t j = 0; j < length; ++j) {
      require(same<F>(out[out_at + j * args.out_stride], group[static_cast<size_t>(j)]), "prune_nm: as scalar code");
    }
  });
}

template <class F>
void check_at_most_n(const PruneArgs& args, const Array<typename F::Type>& out) {
  for_each_group(args, [&](int64_t, int64_t out_at, int64_t length, uint64_t) {
    int kept = 0;
    for (int64_t j = 0; j < length; ++j) kept += F::value(out[out_at + j * args.out_stride]) != 0;
    require(kept <= args.pruning.n, "prune_nm: at most n of m");
  });
}

// Needs values whose sums are exact. The result must be that of magnitude times sum |x| / sum |kept|.
template <class F>
void check_rescale(const PruneArgs& args, const Array<typename F::Type>& in, const Array<typename F::Type>& pruned,
                   const Array<typename F::Type>& out) {
  std::map<std::pair<int64_t, int64_t>, std::pair<double, double>> sums;
  const auto each = [&](auto visit) {
    int64_t row_at = 0;
    for_each_row(args, [&](int64_t in_at, int64_t out_at, uint64_t, int64_t sample) {
      const bool row_factor = args.ndim == 1 && args.dims[0].per_factor;
      for (int64_t k = 0; k < args.size; ++k) {
        auto& sum = sums[{args.dim_per_factor ? k : 0, row_factor ? row_at : sample}];
        visit(F::value(in[in_at + k * args.in_stride]), out_at + k * args.out_stride, sum);
      }
      ++row_at;
    });
  };
  each([&](double x, int64_t at, auto& sum) {
    sum.first += std::abs(x);
    sum.second += std::abs(F::value(pruned[at]));
  });
  each([&](double, int64_t at, auto& sum) {
    const double x = F::value(pruned[at]);
    const double factor = sum.second == 0 ? 1 : sum.first / sum.second;
    const double wanted =
        args.pruning.scale ? (std::memcmp(&pruned[at], "\0\0\0\0\0\0\0", sizeof pruned[at]) != 0) * factor : x * factor;
    const double actual = F::value(out[at]);
    require(std::abs(actual - wanted) <= (1e-5 + F::kRounding) * std::abs(wanted), "prune_nm: rescale's factor");
  });
}

template <class F>
void fuzz_prune(Bytes& bytes) {
  using T = typename F::Type;
  PruneArgs args = draw_tensor(bytes, false);
  args.dtype = F::kDType;
  args.pruning.method = static_cast<Method>(bytes.below(6));
  args.pruning.step = std::ldexp(1, static_cast<int>(bytes.below(32)) - 16);
  args.pruning.scale = bytes.below(4) == 0;
  if (args.pruning.method != Method::kRescale && bytes.below(4) == 0) {  // one part of a larger tensor
    args.first_group = bytes.word() >> 20;
    const int64_t step = int64_t{1} << bytes.below(33);
    for (int d = 0; d < args.ndim; ++d) args.dims[d].row_step *= step;
    if (bytes.flag()) args.row_groups = ceil_div(args.size, args.pruning.m) + bytes.below(3);
  }
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const auto values = static_cast<Values>(bytes.below(5));
  const Array<T> in(extent(args, false), skew);
  fill<F>(in, values, bytes);

  const Array<T> first(extent(args, true), skew);
  prune(*kTables[0], args, in, first, 1);
  const bool exact = args.pruning.method == Method::kMagnitude || args.pruning.method == Method::kRandom ||
                     (sizeof(T) > 2 && !args.pruning.scale);
  if (args.pruning.method == Method::kRescale) {
    PruneArgs by_magnitude = args;
    by_magnitude.pruning.method = Method::kMagnitude;
    by_magnitude.pruning.scale = false;
    const Array<T> pruned(first.size, skew);
    prune(*kTables[0], by_magnitude, in, pruned, 1);
    if (values == kTame && !args.pruning.scale) check_rescale<F>(args, in, pruned, first);
  } else if (exact) {
    check_groups<F>(args, in, first);
  }
  if (args.pruning.method != Method::kUnstructured) check_at_most_n<F>(args, first);
  for (const Kernels* table : kTables) {
    const Array<T> whole(first.size, skew);
    const Array<T> cut(first.size, skew);
    prune(*table, args, in, cut, pieces);
    if (args.pruning.method != Method::kRescale || values == kTame)
      require(same<F>(cut, first), "prune_nm: of every ISA");
    if (args.pruning.method != Method::kRescale) continue;
    prune(*table, args, in, whole, 1);
    require(same<F>(cut, whole), "prune_nm: in pieces");
  }
}

}  // namespace sdgp::test
