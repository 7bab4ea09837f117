// SPDX-License-Identifier: BSD-3-Clause
//
// Tests compress_nm, decompress_nm, pack, spmm_nm and weight_grad_nm of one instruction set without torch, against
// scalar code. Every buffer is exactly as large as its contents, so that AddressSanitizer detects a read outside it.
#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "guarded.h"
#include "harness.h"
#include "kernels/table.h"
#include "rows.h"
#include "weight_grad.h"

namespace {

using namespace sdgp::test;

// --- compress_nm --------------------------------------------------------------------------------------------------

// An (outer, size, inner) tensor, compressed along its middle: contiguous, or with the middle innermost.
struct Shape {
  int64_t outer;
  int64_t size;
  int64_t inner;
  bool middle_last;

  int64_t rows() const { return outer * inner; }
  int64_t offset(int64_t row, int64_t k) const {
    return middle_last ? row * size + k : (row / inner * size + k) * inner + row % inner;
  }
};

const Shape kShapes[] = {{2, 64, 81, false}, {3, 33, 17, false}, {1, 40, 1, false}, {5, 1, 3, false},
                         {2, 512, 5, true},  {3, 70, 9, true},   {1, 7, 2, true},   {2, 16400, 2, true}};
const int kPatterns[][2] = {{1, 2}, {2, 4},  {3, 4},  {1, 4},   {4, 4},  {3, 5},   {2, 8},
                            {8, 8}, {2, 16}, {4, 32}, {16, 32}, {9, 60}, {31, 64}, {64, 64}};

template <class F>
sdgp::PruneArgs describe(const Shape& shape, const std::vector<typename F::Type>& in, sdgp::Method method, int n,
                         int m) {
  sdgp::PruneArgs args{};
  args.in = in.data();
  args.dtype = F::kDType;
  args.pruning = {.method = method, .n = n, .m = m, .seed = 0x0123456789abcdefu, .scale = false};
  args.size = shape.size;
  args.in_stride = args.out_stride = shape.middle_last ? 1 : shape.inner;
  args.ndim = 2;
  const int64_t outer_stride = shape.size * shape.inner;
  const int64_t inner_stride = shape.middle_last ? shape.size : 1;
  args.dims[0] = {shape.outer, outer_stride, outer_stride, shape.inner, false};
  args.dims[1] = {shape.inner, inner_stride, inner_stride, 1, false};
  return args;
}

template <class T>
void test_decompress(const Compressed<T>& from, const std::vector<T>& pruned, sdgp::DType dtype, int64_t rows,
                     int64_t size, int n, int m, const std::string& what) {
  const sdgp::Kernels& table = sdgp::kernels();
  std::vector<T> out(pruned.size());
  Compressed<T> corrupt = from;
  const sdgp::DecompressArgs args{.values = corrupt.values.data(),
                                  .indices = corrupt.indices.data(),
                                  .out = out.data(),
                                  .dtype = dtype,
                                  .n = n,
                                  .m = m,
                                  .size = size,
                                  .rows = rows};
  const auto run = [&](int64_t begin, int64_t end) { return table.decompress_nm(args, begin, end); };
  expect(in_pieces(rows, 3, run), what + ", decompress: valid");
  expect(std::memcmp(out.data(), pruned.data(), out.size() * sizeof(T)) == 0, what + ", decompress");
  for (const int wrong : {m, 255}) {
    if (wrong > 255) continue;
    corrupt.indices.back() = static_cast<uint8_t>(wrong);
    expect(!in_pieces(rows, 1, run), what + ", decompress: an index of " + std::to_string(wrong));
  }
}

template <class F>
void test_compress(const Shape& shape, int n, int m, sdgp::Method method, double zeros, const std::string& what) {
  if (skip()) return;
  using T = typename F::Type;
  const sdgp::Kernels& table = sdgp::kernels();
  const std::vector<T> in = draw<F>(shape.rows() * shape.size, zeros);
  std::vector<T> pruned = in;
  const sdgp::PruneArgs args = describe<F>(shape, in, method, n, m);
  if (n != m) {
    sdgp::PruneArgs whole = args;
    whole.out = pruned.data();
    table.prune_nm(whole, 0, table.prune_nm_units(whole));
  }
  Compressed<T> expected;
  std::vector<T> rows;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t k = 0; k < shape.size; ++k) rows.push_back(pruned[static_cast<size_t>(shape.offset(row, k))]);
    for (int64_t k = 0; k < shape.size; k += m) {
      const int64_t length = shape.size - k < m ? shape.size - k : m;
      pack_group(rows.data() + row * shape.size + k, length, n, expected);
    }
  }
  for (const int64_t pieces : {1, 4}) {
    Compressed<T> actual{std::vector<T>(expected.values.size()), std::vector<uint8_t>(expected.indices.size(), 99)};
    const sdgp::CompressArgs call{args, false, actual.values.data(), actual.indices.data()};
    in_pieces(table.compress_nm_units(call), pieces, [&](int64_t begin, int64_t end) {
      table.compress_nm(call, begin, end);
      return true;
    });
    expect(actual == expected, what + ", compress in " + std::to_string(pieces));
  }
  test_decompress(expected, rows, F::kDType, shape.rows(), shape.size, n, m, what);
}

void test_all_compress() {
  for (const Shape& shape : kShapes) {
    for (const auto& [n, m] : kPatterns) {
      const std::string what = std::to_string(n) + ":" + std::to_string(m) + " of (" + std::to_string(shape.outer) +
                               ", " + std::to_string(shape.size) + ", " + std::to_string(shape.inner) + ")" +
                               (shape.middle_last ? " middle last" : "");
      for (const double zeros : {0.0, 0.8}) {
        test_compress<Real<float>>(shape, n, m, sdgp::Method::kMagnitude, zeros, what + " float32");
        test_compress<Real<float>>(shape, n, m, sdgp::Method::kMvue, zeros, what + " mvue");
        test_compress<Real<double>>(shape, n, m, sdgp::Method::kMagnitude, zeros, what + " float64");
        test_compress<BFloat16>(shape, n, m, sdgp::Method::kMagnitude, zeros, what + " bfloat16");
      }
    }
  }
}

// --- spmm_nm ------------------------------------------------------------------------------------------------------

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

// --- weight_grad_nm -----------------------------------------------------------------------------------------------

constexpr Layout kFirst = Layout::kContiguous, kLast = Layout::kChannelsLast, kOther = Layout::kTransposed;

const WeightProduct kWeightProducts[] = {
    {"one value", 1, 1, 1, 1, kPoint, kPoint, kFirst, kFirst, false},
    {"rows side by side", 1, 1, 70, 33, kPoint, {150, 150, 1, 1, 0, 1}, kLast, kLast, false},
    {"two chunks", 2, 1, 800, 5, kPoint, {40, 40, 1, 1, 0, 1}, kFirst, kFirst, false},
    {"several slabs", 2, 1, 400, 24, {20, 20, 1, 1, 0, 1}, {25, 25, 1, 1, 0, 1}, kFirst, kLast, true},
    {"slabs of windows", 4, 1, 600, 5, {10, 20, 1, 2, 0, 1}, {25, 25, 1, 1, 0, 1}, kLast, kLast, true},
    {"panels", 2, 1, 9, 300, {5, 5, 1, 1, 0, 1}, {7, 7, 3, 1, 1, 1}, kLast, kFirst, false},
    {"3 x 3", 2, 1, 40, 17, {9, 9, 3, 1, 1, 1}, {11, 11, 3, 1, 1, 1}, kFirst, kFirst, false},
    {"stride", 3, 1, 12, 20, {9, 5, 3, 2, 1, 1}, {12, 4, 1, 3, 0, 1}, kLast, kLast, true},
    {"small images", 40, 1, 20, 9, {3, 3, 3, 1, 1, 1}, {2, 2, 3, 1, 1, 1}, kFirst, kFirst, false},
    {"dilation, padding beyond the kernel", 2, 2, 5, 3, {6, 14, 3, 1, 6, 2}, {7, 6, 2, 2, 4, 3}, kFirst, kLast, true},
    {"7 x 7", 1, 1, 6, 3, {33, 17, 7, 2, 3, 1}, {40, 20, 7, 2, 3, 1}, kFirst, kFirst, false},
    {"any strides", 3, 3, 4, 5, {8, 8, 3, 1, 1, 1}, {5, 4, 2, 1, 0, 1}, kOther, kOther, false},
};

// The kernel must not read outside the gradient or the input, or write outside the result.
template <class F>
void test_weight_grad(const WeightProduct& p, int n, int m, sdgp::Method method, bool at_end, const std::string& what) {
  if (skip()) return;
  using T = typename F::Type;
  const sdgp::Kernels& table = sdgp::kernels();
  const Guarded<T> gradient(p.gradient_size(), at_end), input(p.input_size(), at_end);
  const auto drawn = draw<F>(p.gradient_size(), 0.2), image = draw<F>(p.input_size());
  std::copy(drawn.begin(), drawn.end(), gradient.data);
  std::copy(image.begin(), image.end(), input.data);
  const sdgp::Pruning pruning{
      .method = method, .n = n, .m = m, .seed = 0x0123456789abcdefu, .scale = false, .step = 0.5 * m / n};
  sdgp::WeightGradArgs args = describe(p, F::kDType, pruning);
  args.gradient.data = gradient.data;
  args.input = input.data;

  std::vector<T> pruned = drawn;
  if (n != m) {
    sdgp::PruneArgs rows = describe_rows(p, args);
    rows.in = drawn.data();
    rows.out = pruned.data();
    table.prune_nm(rows, 0, table.prune_nm_units(rows));
  }
  const Sums sums = weight_sums<F>(p, args, pruned.data());
  const size_t bytes = static_cast<size_t>(p.result_size()) * sizeof(T);
  const Guarded<T> first(p.result_size(), at_end);
  for (const int64_t threads : {1, 3, 16}) {
    const Guarded<T> out(p.result_size(), at_end);
    std::memset(out.data, 77, bytes);
    args.out = out.data;
    args.threads = threads;
    multiply(table, args, 2 * threads - 1);
    if (threads == 1) std::memcpy(first.data, out.data, bytes);
    expect(std::memcmp(first.data, out.data, bytes) == 0, what + ", threads");
  }
  for (int64_t i = 0; i < p.result_size(); ++i) {
    const auto at = static_cast<size_t>(i);
    const double error = std::fabs(F::value(first.data[i]) - sums.exact[at]);
    expect(error <= error_bound<F>(p, sums, at), what + ", element " + std::to_string(i));
  }
}

void test_all_weight_grads() {
  const int patterns[][2] = {{2, 4}, {1, 2}, {3, 7}, {4, 4}, {8, 32}, {31, 64}, {1, 1}};
  bool at_end = false;
  for (const WeightProduct& product : kWeightProducts) {
    for (const auto& [n, m] : patterns) {
      for (const auto method : {sdgp::Method::kMagnitude, sdgp::Method::kMvue, sdgp::Method::kUnstructured}) {
        at_end = !at_end;
        const std::string what = std::string(product.name) + " weight " + std::to_string(n) + ":" + std::to_string(m) +
                                 " " + sdgp::traits(method).name;
        test_weight_grad<Real<float>>(product, n, m, method, at_end, what + " float32");
        test_weight_grad<Real<double>>(product, n, m, method, at_end, what + " float64");
        test_weight_grad<Half>(product, n, m, method, at_end, what + " float16");
        test_weight_grad<BFloat16>(product, n, m, method, at_end, what + " bfloat16");
      }
    }
  }
}

void test_all() {
  test_all_compress();
  test_all_products();
  test_all_gradients();
  test_all_weight_grads();
}

}  // namespace

int main() { return sdgp::test::run(&test_all); }
