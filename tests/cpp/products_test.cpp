// SPDX-License-Identifier: BSD-3-Clause
//
// Tests pack and spmm_nm of one instruction set without torch, against scalar code. Every buffer is exactly as large
// as its contents, so that AddressSanitizer detects a read outside it.
#include "products.h"

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"
#include "kernels/table.h"
#include "rows.h"

namespace {

using namespace sdgp::test;

constexpr int64_t kFar = int64_t{1} << 32;

// Axis fields: in, out, kernel, stride, padding, dilation.
const Product kProducts[] = {
    {"one value", 1, 1, 1, 1, kPoint, kPoint, Weight::kContiguous, false},
    {"one row", 1, 1, 70, 17, kPoint, kPoint, Weight::kContiguous, false},
    {"rows", 37, 1, 64, 33, kPoint, kPoint, Weight::kContiguous, false},
    {"transposed", 5, 1, 130, 129, kPoint, kPoint, Weight::kTransposed, false},
    {"two chunks", 300, 1, 96, 40, kPoint, kPoint, Weight::kContiguous, false},
    {"many slabs", 260, 1, 1500, 24, kPoint, kPoint, Weight::kContiguous, false},
    {"pixels", 1, 1, 70, 37, {9, 9, 1, 1, 0, 1}, {31, 31, 1, 1, 0, 1}, Weight::kContiguous, false},
    {"samples of pixels", 3, 1, 40, 16, {4, 4, 1, 1, 0, 1}, {8, 8, 1, 1, 0, 1}, Weight::kTransposed, false},
    {"far taps", 1, 1, 40, 2, {1, 1, 3, 1, kFar, kFar}, kPoint, Weight::kContiguous, false},
    {"wide", 3, 1, 40, 1000, kPoint, kPoint, Weight::kContiguous, false},
    {"3 x 3", 2, 1, 24, 20, {7, 7, 3, 1, 1, 1}, {5, 5, 3, 1, 1, 1}, Weight::kContiguous, true},
    {"3 x 3, last", 2, 1, 24, 20, {7, 7, 3, 1, 1, 1}, {5, 5, 3, 1, 1, 1}, Weight::kChannelsLast, false},
    {"stride", 3, 1, 16, 9, {9, 5, 3, 2, 1, 1}, {8, 3, 2, 3, 0, 1}, Weight::kContiguous, true},
    {"dilation", 1, 1, 16, 40, {11, 7, 3, 1, 0, 2}, {6, 10, 1, 1, 2, 3}, Weight::kContiguous, false},
    {"groups", 2, 3, 64, 5, {6, 6, 3, 1, 1, 1}, {6, 6, 3, 1, 1, 1}, Weight::kContiguous, true},
    {"groups apart", 2, 2, 33, 6, {6, 3, 3, 2, 1, 1}, {6, 6, 3, 1, 1, 1}, Weight::kContiguous, false},
    {"7 x 7", 1, 1, 64, 3, {13, 7, 7, 2, 3, 1}, {13, 7, 7, 2, 3, 1}, Weight::kContiguous, true},
};

std::vector<uint8_t> draw_indices(const sdgp::SpmmArgs& args, int64_t count) {
  std::vector<uint8_t> indices(static_cast<size_t>(count));
  const auto [n, m] = std::pair(args.pruning.n, args.pruning.m);
  const int64_t slots = args.size % m == 0 ? args.compressed.row_stride : ceil_div(args.size, m) * n;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t left = (args.size % m == 0 ? m : args.size - i % slots / n * m);
    indices[static_cast<size_t>(i)] = static_cast<uint8_t>(below(left < m ? left : m));
  }
  return indices;
}

// Each element must equal the exact sum, up to the rounding of its additions and of the result.
template <class F>
void expect_sums(const Product& p, const sdgp::SpmmArgs& args, const std::vector<typename F::Type>& out,
                 const std::string& what) {
  const Sums sums = product_sums<F>(args);
  const double terms = static_cast<double>(args.compressed.row_stride * p.height.kernel * p.width.kernel + 2);
  const double epsilon = sizeof(out[0]) == 8 ? std::ldexp(1, -52) : std::ldexp(1, -23);
  for (size_t i = 0; i < out.size(); ++i) {
    const double error = std::fabs(F::value(out[i]) - sums.exact[i]);
    const double bound = terms * epsilon * sums.magnitude[i] + 0.51 * F::kRounding * std::fabs(sums.exact[i]) +
                         (F::kRounding > 0 ? std::ldexp(1, -14) : 0);
    expect(error <= bound, what + ", element " + std::to_string(i));
  }
}

template <class F>
void test_product(const Product& p, int n, int m, const std::string& what) {
  if (skip()) return;
  using T = typename F::Type;
  sdgp::SpmmArgs args = describe(p, F::kDType, {.method = {}, .n = n, .m = m, .seed = 0, .scale = false});
  const auto values = draw<F>(p.samples * args.compressed.sample_stride);
  std::vector<uint8_t> indices = draw_indices(args, p.samples * args.compressed.sample_stride);
  const auto dense = draw<F>(p.groups * p.size * p.cols * p.height.kernel * p.width.kernel);
  args.compressed.values = values.data();
  args.compressed.indices = indices.data();
  args.dense.data = dense.data();
  std::vector<T> out(static_cast<size_t>(p.samples * p.height.in * p.width.in * p.groups * p.cols));
  std::vector<T> again(out.size());
  expect(multiply(sdgp::kernels(), args, out, 1), what + ", valid");
  expect(multiply(sdgp::kernels(), args, again, 5), what + ", valid in pieces");
  expect(std::memcmp(out.data(), again.data(), out.size() * sizeof(T)) == 0, what + ", in pieces");
  expect_sums<F>(p, args, out, what);
  for (const int wrong : {m, 255}) {
    indices[static_cast<size_t>(below(static_cast<int64_t>(indices.size())))] = static_cast<uint8_t>(wrong);
    // The kernel must not read outside its buffers. It reports the bad index only if it uses that value.
    multiply(sdgp::kernels(), args, again, 2);
    if (p.height.kernel == 1 && p.width.kernel == 1 && p.height.in == 1) {
      expect(!multiply(sdgp::kernels(), args, again, 1), what + ", an index of " + std::to_string(wrong));
    }
  }
}

// A gradient whose groups keep different numbers of values is pruned inside the kernel only. The result must be the
// product of the gradient that prune_nm prunes.
template <class F>
void test_unstructured(const Product& p, int n, int m, bool channels_first, const std::string& what) {
  if (skip()) return;
  using T = typename F::Type;
  const sdgp::Pruning pruning{
      .method = sdgp::Method::kUnstructured, .n = n, .m = m, .seed = 7, .scale = false, .step = 0.5 * m / n};
  const int64_t channels = p.groups * p.size;
  const auto data = draw<F>(p.samples * channels * p.height.out * p.width.out);
  const auto dense = draw<F>(channels * p.cols * p.height.kernel * p.width.kernel);
  const sdgp::Kernels& table = sdgp::kernels();
  sdgp::PruneArgs prune = describe_rows(p, F::kDType, pruning, channels_first);
  prune.in = data.data();
  auto pruned = data;
  prune.out = pruned.data();
  if (n != m) table.prune_nm(prune, 0, table.prune_nm_units(prune));

  sdgp::Pruning keep_all = pruning;
  keep_all.n = m;
  sdgp::SpmmArgs all = describe(p, F::kDType, keep_all);
  prune.pruning = keep_all;
  prune.in = pruned.data();
  std::vector<T> values(static_cast<size_t>(p.samples * all.compressed.sample_stride));
  std::vector<uint8_t> indices(values.size());
  const sdgp::CompressArgs compress{prune, true, values.data(), indices.data()};
  table.compress_nm(compress, 0, table.compress_nm_units(compress));
  all.compressed.values = values.data();
  all.compressed.indices = indices.data();
  all.dense.data = dense.data();

  prune.in = data.data();
  sdgp::SpmmArgs args = describe(p, F::kDType, pruning);
  args.dense.data = dense.data();
  const sdgp::Gradient gradient = describe_gradient(p, prune);
  args.gradient = &gradient;
  std::vector<T> first(static_cast<size_t>(p.samples * p.height.in * p.width.in * p.groups * p.cols));
  std::vector<T> actual(first.size());
  multiply(table, args, first, 1);
  expect_sums<F>(p, all, first, what);
  for (const int64_t threads : {1, 3}) {
    args.threads = threads;
    expect(multiply(table, args, actual, 2 * threads - 1), what + ", valid");
    expect(std::memcmp(actual.data(), first.data(), first.size() * sizeof(T)) == 0, what + ", threads");
  }
}

// Pruning inside the kernel must give the same result as the compressed gradient: bit for bit if one kernel multiplies
// both, else up to rounding.
template <class F>
void test_gradient(const Product& p, int n, int m, sdgp::Method method, bool channels_first, const std::string& what) {
  if (skip()) return;
  using T = typename F::Type;
  const sdgp::Pruning pruning{.method = method, .n = n, .m = m, .seed = 7, .scale = false};
  sdgp::SpmmArgs args = describe(p, F::kDType, pruning);
  const int64_t channels = p.groups * p.size;
  const auto data = draw<F>(p.samples * channels * p.height.out * p.width.out);
  const auto dense = draw<F>(channels * p.cols * p.height.kernel * p.width.kernel);
  args.dense.data = dense.data();

  sdgp::CompressArgs compress{};
  sdgp::PruneArgs& prune = compress.prune;
  prune = describe_rows(p, F::kDType, pruning, channels_first);
  prune.in = data.data();
  std::vector<T> values(static_cast<size_t>(p.samples * args.compressed.sample_stride));
  std::vector<uint8_t> indices(values.size());
  compress.values = values.data();
  compress.indices = indices.data();
  const sdgp::Kernels& table = sdgp::kernels();
  table.compress_nm(compress, 0, table.compress_nm_units(compress));

  args.compressed.values = values.data();
  args.compressed.indices = indices.data();
  std::vector<T> expected(static_cast<size_t>(p.samples * p.height.in * p.width.in * p.groups * p.cols));
  std::vector<T> actual(expected.size());
  multiply(sdgp::kernels(), args, expected, 1);
  const sdgp::Gradient gradient = describe_gradient(p, prune);
  args.gradient = &gradient;
  if (table.permutes(args)) {
    multiply(table, args, expected, 1);
    expect_sums<F>(p, args, expected, what + ", permuted");
  }
  for (const int64_t threads : {1, 3}) {
    args.threads = threads;
    expect(multiply(table, args, actual, 2 * threads - 1), what + ", valid");
    expect(std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(T)) == 0, what);
  }
}

void test_all_gradients() {
  const int patterns[][2] = {{2, 4}, {1, 2}, {3, 7}, {4, 4}, {8, 32}, {5, 24}, {31, 64}};
  for (const Product& product : kProducts) {
    for (const auto& [n, m] : patterns) {
      for (const bool channels_first : {false, true}) {
        for (const auto method : {sdgp::Method::kMagnitude, sdgp::Method::kMvue}) {
          const std::string what = std::string(product.name) + " gradient " + std::to_string(n) + ":" +
                                   std::to_string(m) + (channels_first ? " first" : " last");
          test_gradient<Real<float>>(product, n, m, method, channels_first, what + " float32");
          test_gradient<Real<double>>(product, n, m, method, channels_first, what + " float64");
          test_gradient<BFloat16>(product, n, m, method, channels_first, what + " bfloat16");
        }
        const std::string what = std::string(product.name) + " unstructured " + std::to_string(n) + ":" +
                                 std::to_string(m) + (channels_first ? " first" : " last");
        test_unstructured<Real<float>>(product, n, m, channels_first, what + " float32");
        test_unstructured<Real<double>>(product, n, m, channels_first, what + " float64");
        test_unstructured<BFloat16>(product, n, m, channels_first, what + " bfloat16");
      }
    }
  }
}

void test_all_products() {
  const int patterns[][2] = {{2, 4}, {1, 2}, {3, 7}, {4, 4}, {8, 32}, {31, 64}, {1, 1}};
  for (const Product& product : kProducts) {
    for (const auto& [n, m] : patterns) {
      const std::string what = std::string(product.name) + " " + std::to_string(n) + ":" + std::to_string(m);
      test_product<Real<float>>(product, n, m, what + " float32");
      test_product<Real<double>>(product, n, m, what + " float64");
      test_product<Half>(product, n, m, what + " float16");
      test_product<BFloat16>(product, n, m, what + " bfloat16");
    }
  }
}

void test_all() {
  test_all_products();
  test_all_gradients();
}

}  // namespace

int main() { return sdgp::test::run(&test_all); }
