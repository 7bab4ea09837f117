// SPDX-License-Identifier: BSD-3-Clause
//
// One input of a fuzzer is one case: arguments of the torch-free kernels, then values. Every instruction set that this
// CPU runs must give what scalar code gives, or what follows from the specification, bit for bit the same whatever the
// pieces that the work is cut into, and touch nothing outside its arrays.
#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "../cpp/scalar.h"
#include "values.h"

namespace {

using namespace sdgp::test;
using sdgp::Kernels;
using sdgp::Method;
using sdgp::PruneArgs;

int64_t calls = 0;

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&sdgp::avx512::table);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&sdgp::avx2::table);
#endif
  found.push_back(&sdgp::baseline::table);
  return found;
}

const std::vector<const Kernels*> kTables = tables();

// What takes milliseconds is rare; most take a fraction of one.
int64_t draw_limit(const Bytes& bytes) { return bytes.one_in(2048) ? 80000 : bytes.one_in(32) ? 4000 : 600; }

// --- prune_nm -----------------------------------------------------------------------------------------------------

// Any order of the dimensions in memory; gaps after one of them, and some expanded, where `loose`.
std::array<int64_t, 4> draw_strides(Bytes& bytes, const std::array<int64_t, 4>& size, int ndim, bool loose) {
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

// As the ops describe a tensor: the other dimensions by descending output stride, none of one element.
PruneArgs draw_tensor(Bytes& bytes, bool dense) {
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
  args.m = static_cast<int>(bytes.flag() ? int64_t{2} << bytes.below(6) : 2 + bytes.below(63));
  args.n = static_cast<int>(1 + bytes.below(args.m - 1));
  args.seed = bytes.byte();
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
  if (args.method == Method::kMagnitude) {
    return scalar::masked(args.scale ? std::vector<T>(x.size(), one) : x, scalar::largest_magnitudes(x, args.n));
  }
  if (args.method == Method::kRandom) {
    return scalar::random(args.scale ? std::vector<T>(x.size(), one) : x, args.n, args.seed, index);
  }
  if constexpr (sizeof(T) > 2) {
    if (args.method == Method::kMvue) return scalar::mvue(x, args.n, args.seed, index);
    if (args.method == Method::kRescaleGroup) return scalar::rescale_group(x, args.n);
  }
  std::abort();
}

// Calls group(in offset, out offset, length, index) for every group.
template <class Visit>
void for_each_group(const PruneArgs& args, Visit visit) {
  const int64_t groups = ceil_div(args.size, args.m);
  const auto row_groups = static_cast<uint64_t>(args.row_groups ? args.row_groups : groups);
  for_each_row(args, [&](int64_t in_at, int64_t out_at, uint64_t row, int64_t) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * args.m;
      visit(in_at + first * args.in_stride, out_at + first * args.out_stride,
            std::min<int64_t>(args.m, args.size - first),
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
    require(kept <= args.n, "prune_nm: at most n of m");
  });
}

// Of values whose sums are exact: what magnitude keeps, times sum |x| / sum |kept|.
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
        args.scale ? (std::memcmp(&pruned[at], "\0\0\0\0\0\0\0", sizeof pruned[at]) != 0) * factor : x * factor;
    const double actual = F::value(out[at]);
    require(std::abs(actual - wanted) <= (1e-5 + F::kRounding) * std::abs(wanted), "prune_nm: rescale's factor");
  });
}

template <class F>
void fuzz_prune(Bytes& bytes) {
  using T = typename F::Type;
  PruneArgs args = draw_tensor(bytes, false);
  args.dtype = F::kDType;
  args.method = static_cast<Method>(bytes.below(5));
  args.scale = bytes.below(4) == 0;
  if (args.method != Method::kRescale && bytes.below(4) == 0) {  // a part of a larger tensor
    args.first_group = bytes.word() >> 20;
    const int64_t step = int64_t{1} << bytes.below(33);
    for (int d = 0; d < args.ndim; ++d) args.dims[d].row_step *= step;
    if (bytes.flag()) args.row_groups = ceil_div(args.size, args.m) + bytes.below(3);
  }
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const auto values = static_cast<Values>(bytes.below(5));
  const Array<T> in(extent(args, false), skew);
  fill<F>(in, values, bytes);

  const Array<T> first(extent(args, true), skew);
  prune(*kTables[0], args, in, first, 1);
  const bool exact =
      args.method == Method::kMagnitude || args.method == Method::kRandom || (sizeof(T) > 2 && !args.scale);
  if (args.method == Method::kRescale) {
    PruneArgs by_magnitude = args;
    by_magnitude.method = Method::kMagnitude;
    by_magnitude.scale = false;
    const Array<T> pruned(first.size, skew);
    prune(*kTables[0], by_magnitude, in, pruned, 1);
    if (values == kTame && !args.scale) check_rescale<F>(args, in, pruned, first);
  } else if (exact) {
    check_groups<F>(args, in, first);
  }
  check_at_most_n<F>(args, first);
  for (const Kernels* table : kTables) {
    const Array<T> whole(first.size, skew);
    const Array<T> cut(first.size, skew);
    prune(*table, args, in, cut, pieces);
    if (args.method != Method::kRescale || values == kTame) require(same<F>(cut, first), "prune_nm: of every ISA");
    if (args.method != Method::kRescale) continue;
    prune(*table, args, in, whole, 1);
    require(same<F>(cut, whole), "prune_nm: in pieces");
  }
}

// --- compress_nm, decompress_nm -----------------------------------------------------------------------------------

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
                                  .element_size = sizeof(T),
                                  .n = prune.n,
                                  .m = prune.m,
                                  .size = prune.size,
                                  .rows = out.size / prune.size};
  const auto run = [&](const Kernels& table) {
    calls += pieces;
    return in_pieces(args.rows, pieces,
                     [&](int64_t begin, int64_t end) { return table.decompress_nm(args, begin, end); });
  };
  const int64_t at = bytes.below(count);
  const auto wrong = static_cast<uint8_t>(prune.m + bytes.below(256 - prune.m));
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
  args.prune.method = bytes.flag() ? Method::kMagnitude : bytes.flag() ? Method::kRandom : Method::kMvue;
  if (bytes.below(8) == 0) args.prune.n = args.prune.m;
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const Array<T> drawn(extent(args.prune, false), skew);
  fill<F>(drawn, static_cast<Values>(bytes.below(5)), bytes);
  const Array<T> pruned(extent(args.prune, true), skew);
  const bool all = args.prune.n == args.prune.m;
  if (!all) prune(*kTables[0], args.prune, drawn, pruned, 1);

  const int64_t groups = ceil_div(args.prune.size, args.prune.m);
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
      const int64_t length = std::min<int64_t>(args.prune.m, args.prune.size - g * args.prune.m);
      pack_group(rows.data() + static_cast<int64_t>(rows.size()) - args.prune.size + g * args.prune.m, length,
                 args.prune.n, expected);
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

// --- spmm_nm ------------------------------------------------------------------------------------------------------

sdgp::Axis2d draw_axis(Bytes& bytes) {
  if (bytes.flag()) return kPoint;
  return {1 + bytes.below(7), 1 + bytes.below(7), 1 + bytes.below(3),
          1 + bytes.below(3), bytes.below(4),     1 + bytes.below(2)};
}

Product draw_product(Bytes& bytes) {
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
  const Packed packed(table.packed_size(args) * (sizeof(typename F::Type) == 8 ? 8 : 4));
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
  const double terms =
      static_cast<double>(ceil_div(args.size, args.m) * args.n * args.height.kernel * args.width.kernel);
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
  sdgp::SpmmArgs args = describe(p, F::kDType, n, m);
  PruneArgs rows = describe_rows(p, F::kDType, n, m, bytes.flag());
  rows.method = bytes.flag() ? Method::kMagnitude : bytes.flag() ? Method::kRandom : Method::kMvue;
  rows.seed = bytes.byte();
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const int64_t threads = 1 + bytes.below(8);
  const auto values = static_cast<Values>(bytes.below(5));
  const Array<T> gradient(p.samples * p.groups * p.size * p.height.out * p.width.out, skew);
  const Array<T> dense(p.groups * p.size * p.cols * p.height.kernel * p.width.kernel, skew);
  fill<F>(gradient, values, bytes);
  fill<F>(dense, bytes.below(4) == 0 ? values : kTame, bytes);
  args.dense = dense.data;

  const Array<T> kept(p.samples * args.sample_stride, skew);
  const Array<uint8_t> indices(kept.size, skew);
  compress(*kTables[0], {rows, false, nullptr, nullptr}, gradient, kept, indices, 1);
  args.values = kept.data;
  args.indices = indices.data;
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
    require(same<F>(whole, cut), "spmm_nm: of a gradient pruned inside");
  }
  args.gradient = nullptr;
  indices[bytes.below(indices.size)] = static_cast<uint8_t>(m + bytes.below(256 - m));
  const bool valid =
      times<F>(*kTables[static_cast<size_t>(bytes.below(static_cast<int64_t>(kTables.size())))], args, first, pieces);
  const bool all_read = p.height.kernel * p.width.kernel * p.height.in * p.width.in * p.height.out * p.width.out == 1;
  require(!valid || !all_read || p.height.padding + p.width.padding > 0, "spmm_nm: an index out of range");
}

template <class F>
void fuzz(Bytes& bytes) {
  switch (bytes.below(3)) {
    case 0: return fuzz_prune<F>(bytes);
    case 1: return fuzz_compress<F>(bytes);
    default: return fuzz_product<F>(bytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit([] { std::printf("%lld kernel calls\n", static_cast<long long>(calls)); });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.below(4)) {
    case 0: fuzz<Real<float>>(bytes); break;
    case 1: fuzz<Real<double>>(bytes); break;
    case 2: fuzz<Half>(bytes); break;
    default: fuzz<BFloat16>(bytes);
  }
  return 0;
}
