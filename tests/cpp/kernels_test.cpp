// SPDX-License-Identifier: BSD-3-Clause
//
// Tests prune_nm of one instruction set without torch, against scalar code, group by group, for every dtype and on each
// path (rows, groups, staged). The cases have odd sizes, remainders, gaps, ties, NaN, and group indices beyond 2^32.
// Tensors lie against guard pages at either end, so any access outside fails.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "harness.h"
#include "kernels/table.h"
#include "rows.h"
#include "scalar.h"

namespace {

using sdgp::DType;
using sdgp::Method;
using sdgp::PruneArgs;
using namespace sdgp::test;

// The pruned dimension and the other dimensions, with separate strides for input and output.
struct Layout {
  const char* name;
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  std::vector<sdgp::Dim> dims;  // outermost first; make_args fills in row_step
};

// A contiguous (outer, size, inner) layout. The first and the pruned dimension have their own rescale factors.
Layout nchw(const char* name, int64_t outer, int64_t size, int64_t inner) {
  return {name, size, inner, inner, {{outer, size * inner, size * inner, 0, true}, {inner, 1, 1, 0, false}}};
}

// An (outer, inner, size) layout, with an optional gap after each line of the input or the output.
Layout lines(const char* name, int64_t outer, int64_t inner, int64_t size, int64_t in_gap = 0, int64_t out_gap = 0) {
  const int64_t in = size + in_gap;
  const int64_t out = size + out_gap;
  return {name, size, 1, 1, {{outer, inner * in, inner * out, 0, true}, {inner, in, out, 0, false}}};
}

std::vector<Layout> layouts() {
  std::vector<Layout> all = {
      nchw("rows", 2, 64, 81),
      nchw("rows, tail", 3, 33, 37),
      nchw("3x3 maps", 3, 70, 9),
      nchw("3x3 maps, many", 40, 97, 9),
      nchw("2x2 maps", 5, 64, 4),
      nchw("1x3 maps", 5, 63, 3),
      nchw("1x31 maps", 2, 67, 31),
      lines("groups", 1, 2, 4100),
      lines("groups, tail", 3, 9, 301),
      lines("short lines", 3, 50, 26),
      lines("short lines, many", 5, 400, 23),
      lines("short lines with gaps", 3, 50, 26, 3, 1),
      lines("lines shorter than a group", 2, 70, 5),
      lines("one group", 1, 1, 7),
  };
  all.push_back({"every other of the input", 40, 2, 1, {{50, 80, 40, 0, true}}});
  all.push_back({"input along the other dimension", 40, 50, 1, {{50, 1, 40, 0, true}}});
  all.push_back({"output along the other dimension", 40, 1, 50, {{50, 40, 1, 0, true}}});
  all.push_back({"maps with gaps", 33, 40, 40, {{3, 1320, 1320, 0, true}, {5, 7, 8, 0, false}, {5, 1, 1, 0, false}}});
  all.push_back({"expanded", 40, 1, 1, {{50, 0, 40, 0, true}}});
  return all;
}

// Layouts with rows so long that several threads share one row.
std::vector<Layout> long_layouts() { return {nchw("long rows", 2, 5, 9001), lines("long lines", 1, 4, 33005)}; }

PruneArgs make_args(const Layout& layout, DType dtype, Method method, int n, int m, int64_t row_steps = 1) {
  PruneArgs args{};
  args.dtype = dtype;
  args.pruning = {.method = method, .n = n, .m = m, .seed = 0x0123456789abcdefu, .scale = false};
  args.size = layout.size;
  args.in_stride = layout.in_stride;
  args.out_stride = layout.out_stride;
  args.dim_per_factor = true;
  for (const sdgp::Dim& dim : layout.dims) args.dims[args.ndim++] = dim;
  for (int d = args.ndim; d-- > 0;) {
    args.dims[d].row_step = row_steps;
    row_steps *= args.dims[d].size;
  }
  return args;
}

void run(PruneArgs args, const void* in, void* out, int64_t pieces) {
  args.in = in;
  args.out = out;
  const sdgp::Kernels& table = sdgp::kernels();
  const int64_t units = table.prune_nm_units(args);
  for (int64_t p = 0; p < pieces; ++p) table.prune_nm(args, units * p / pieces, units * (p + 1) / pieces);
}

// Fills with normal values or with special values. 16-bit types get the upper half of a float.
template <class T>
void fill(T* x, int64_t size, bool special) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) {
    float value = normal(generator);
    if (special) {
      value = std::round(value);  // makes ties and zeros of both signs
      if (generator() % 97 == 0) value = std::numeric_limits<float>::quiet_NaN();
      if (generator() % 89 == 0) value = -std::numeric_limits<float>::infinity();
    }
    if constexpr (sizeof(T) == 2) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      x[i] = static_cast<T>(bits >> 16);  // float16 reads the bits as another number; inf and NaN become finite
    } else {
      x[i] = value;
    }
  }
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <class T>
T one_of(DType dtype) {
  if constexpr (sizeof(T) > 2) return 1;
  return static_cast<T>(dtype == DType::kFloat16 ? 0x3c00 : 0x3f80);
}

template <class T>
std::vector<T> expected_group(const PruneArgs& args, const std::vector<T>& group, uint64_t index) {
  if (args.pruning.scale) {  // expect multipliers instead of values
    const std::vector<bool> keep = scalar::largest_magnitudes(group, args.pruning.n);
    return scalar::masked(std::vector<T>(group.size(), one_of<T>(args.dtype)), keep);
  }
  if (args.pruning.method == Method::kMagnitude)
    return scalar::masked(group, scalar::largest_magnitudes(group, args.pruning.n));
  if (args.pruning.method == Method::kRandom) return scalar::random(group, args.pruning.n, args.pruning.seed, index);
  if constexpr (sizeof(T) > 2) return scalar::mvue(group, args.pruning.n, args.pruning.seed, index);
  std::abort();
}

// The groups must agree bit for bit, and the gaps between the rows of the output must stay unchanged.
template <class T>
void test_equals_scalar(const PruneArgs& args, bool special, const std::string& what) {
  if (skip()) return;
  const Guarded<T> in(extent(args, false), true);
  fill(in.data, extent(args, false), special);
  std::vector<T> expected(static_cast<size_t>(extent(args, true)), T{77});
  const int64_t groups = (args.size + args.pruning.m - 1) / args.pruning.m;
  for_each_row(args, [&](int64_t in_at, int64_t out_at, uint64_t row, int64_t) {
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<T> group;
      const int64_t length = std::min<int64_t>(args.pruning.m, args.size - g * args.pruning.m);
      for (int64_t j = 0; j < length; ++j) group.push_back(in.data[in_at + (g * args.pruning.m + j) * args.in_stride]);
      group = expected_group(args, group, row * static_cast<uint64_t>(groups) + static_cast<uint64_t>(g));
      for (int64_t j = 0; j < length; ++j) {
        expected[static_cast<size_t>(out_at + (g * args.pruning.m + j) * args.out_stride)] =
            group[static_cast<size_t>(j)];
      }
    }
  });
  for (const bool at_end : {false, true}) {
    const Guarded<T> shifted(extent(args, false), at_end);
    const Guarded<T> out(extent(args, true), at_end);
    std::copy_n(in.data, extent(args, false), shifted.data);
    std::fill_n(out.data, extent(args, true), T{77});
    run(args, shifted.data, out.data, at_end ? 3 : 1);
    for (int64_t i = 0; i < extent(args, true); ++i) expect(same(out.data[i], expected[static_cast<size_t>(i)]), what);
  }
}

// Each piece must write only its own elements, and all pieces together must write every element.
template <class T>
void test_pieces_are_disjoint(PruneArgs args, const std::string& what) {
  if (skip()) return;
  const int64_t size = extent(args, true);
  const Guarded<T> in(extent(args, false), true);
  fill(in.data, extent(args, false), false);
  args.in = in.data;
  std::vector<int> wanted(static_cast<size_t>(size));
  for_each_row(args, [&](int64_t, int64_t out_at, uint64_t, int64_t) {
    for (int64_t k = 0; k < args.size; ++k) wanted[static_cast<size_t>(out_at + k * args.out_stride)] = 1;
  });
  std::vector<int> written(wanted.size());
  in_pieces(sdgp::kernels().prune_nm_units(args), 3, [&](int64_t begin, int64_t end) {
    const Guarded<T> out(size, true);
    std::fill_n(out.data, size, T{77});
    args.out = out.data;
    sdgp::kernels().prune_nm(args, begin, end);
    for (int64_t i = 0; i < size; ++i) written[static_cast<size_t>(i)] += out.data[i] != T{77};
    return true;
  });
  expect(written == wanted, what);
}

// rescale and rescale_group must give the result of magnitude times sum |x| / sum |kept|.
template <class T>
void test_scaled(PruneArgs args, const std::string& what) {
  if (skip()) return;
  const Guarded<T> in(extent(args, false), true);
  const Guarded<T> out(extent(args, true), false);
  const Guarded<T> pruned(extent(args, true), true);
  fill(in.data, extent(args, false), false);
  std::fill_n(out.data, extent(args, true), T{77});
  run(args, in.data, out.data, 3);
  const bool by_group = args.pruning.method == Method::kRescaleGroup;
  args.pruning.method = Method::kMagnitude;
  run(args, in.data, pruned.data, 1);
  std::map<std::pair<int64_t, uint64_t>, std::pair<double, double>> sums;
  const auto factor_of = [&](int64_t sample, uint64_t row, int64_t k) {
    return by_group ? std::pair(k / args.pruning.m, row) : std::pair(k, static_cast<uint64_t>(sample));
  };
  for_each_row(args, [&](int64_t in_at, int64_t out_at, uint64_t row, int64_t sample) {
    for (int64_t k = 0; k < args.size; ++k) {
      auto& [all, kept] = sums[factor_of(sample, row, k)];
      all += std::abs(in.data[in_at + k * args.in_stride]);
      kept += std::abs(pruned.data[out_at + k * args.out_stride]);
    }
  });
  for_each_row(args, [&](int64_t, int64_t out_at, uint64_t row, int64_t sample) {
    for (int64_t k = 0; k < args.size; ++k) {
      const auto [all, kept] = sums[factor_of(sample, row, k)];
      const double x = pruned.data[out_at + k * args.out_stride];
      const double y = out.data[out_at + k * args.out_stride];
      expect(std::abs(y - (kept == 0 ? x : x * (all / kept))) <= 1e-5 * std::abs(y), what);
    }
  });
}

// Mutation testing runs this version first: only float32 with magnitude and random, which compiles and runs in seconds.
#if defined(SDGP_FEW)
constexpr bool kFew = true;
#else
constexpr bool kFew = false;
#endif
// Values of m on either side of every compiled group size, and powers of two, whose groups fill the lanes without a
// gap.
const int kPatterns[][2] = {{1, 2}, {2, 3},  {2, 4},  {1, 4},   {3, 5},  {4, 8},
                            {2, 9}, {8, 16}, {5, 17}, {16, 32}, {9, 33}, {31, 64}};

void test_layout(const Layout& layout, int n, int m) {
  const auto args = [&](DType dtype, Method method) { return make_args(layout, dtype, method, n, m); };
  const std::string what = std::to_string(n) + ":" + std::to_string(m) + ", " + layout.name;
  test_equals_scalar<float>(args(DType::kFloat32, Method::kRandom), false, "random " + what);
  test_pieces_are_disjoint<float>(args(DType::kFloat32, Method::kRandom), "disjoint " + what);
  for (const bool special : {false, true}) {
    test_equals_scalar<float>(args(DType::kFloat32, Method::kMagnitude), special, "magnitude " + what);
    if (kFew) continue;
    test_equals_scalar<double>(args(DType::kFloat64, Method::kMagnitude), special, "magnitude of float64 " + what);
    test_equals_scalar<uint16_t>(args(DType::kBFloat16, Method::kMagnitude), special, "magnitude of bfloat16 " + what);
    test_equals_scalar<uint16_t>(args(DType::kFloat16, Method::kMagnitude), special, "magnitude of float16 " + what);
    test_equals_scalar<float>(args(DType::kFloat32, Method::kMvue), special, "mvue " + what);
    test_equals_scalar<double>(args(DType::kFloat64, Method::kMvue), special, "mvue of float64 " + what);
  }
  if (kFew) return;
  const auto multipliers = [&](DType dtype) {
    PruneArgs scaled = args(dtype, Method::kMagnitude);
    scaled.pruning.scale = true;
    return scaled;
  };
  test_equals_scalar<float>(multipliers(DType::kFloat32), true, "multipliers " + what);
  test_equals_scalar<uint16_t>(multipliers(DType::kBFloat16), true, "multipliers of bfloat16 " + what);
  test_equals_scalar<uint16_t>(multipliers(DType::kFloat16), true, "multipliers of float16 " + what);
  test_pieces_are_disjoint<uint16_t>(args(DType::kBFloat16, Method::kMagnitude), "disjoint bfloat16 " + what);
  test_equals_scalar<double>(args(DType::kFloat64, Method::kRandom), false, "random of float64 " + what);
  test_equals_scalar<uint16_t>(args(DType::kBFloat16, Method::kRandom), false, "random of bfloat16 " + what);
  test_equals_scalar<uint16_t>(args(DType::kFloat16, Method::kRandom), false, "random of float16 " + what);
  for (const Method method : {Method::kRescale, Method::kRescaleGroup}) {
    test_scaled<float>(args(DType::kFloat32, method), "rescale " + what);
    test_scaled<double>(args(DType::kFloat64, method), "rescale of float64 " + what);
  }
  // The row indices are so far apart that group indices pass 2^32, also between the lanes of a tile.
  const int64_t groups = (layout.size + m - 1) / m;
  for (const int64_t row_steps : {(int64_t{1} << 32) / groups, (int64_t{1} << 32) / (10 * groups) + 1}) {
    const auto far = [&](DType dtype, Method method) { return make_args(layout, dtype, method, n, m, row_steps); };
    test_equals_scalar<float>(far(DType::kFloat32, Method::kRandom), false, "random, far rows " + what);
    test_equals_scalar<double>(far(DType::kFloat64, Method::kRandom), false, "random of float64, far rows " + what);
    test_equals_scalar<float>(far(DType::kFloat32, Method::kMvue), false, "mvue, far rows " + what);
    test_equals_scalar<double>(far(DType::kFloat64, Method::kMvue), false, "mvue of float64, far rows " + what);
  }
}

void test_long_layout(const Layout& layout, int n, int m) {
  const PruneArgs args = make_args(layout, DType::kFloat32, Method::kRandom, n, m);
  const std::string what = std::to_string(n) + ":" + std::to_string(m) + ", " + layout.name;
  test_equals_scalar<float>(args, false, "random " + what);
  test_pieces_are_disjoint<float>(args, "disjoint " + what);
}

void test_all() {
  for (const Layout& layout : long_layouts()) {
    for (const auto& [n, m] : {std::pair(2, 4), std::pair(5, 8)}) test_long_layout(layout, n, m);
  }
  for (const Layout& layout : layouts()) {
    for (const auto& [n, m] : kPatterns) test_layout(layout, n, m);
  }
}

}  // namespace

int main() { return sdgp::test::run(&test_all); }
