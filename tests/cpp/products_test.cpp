// SPDX-License-Identifier: BSD-3-Clause
//
// The compressing kernels without torch: compress_nm, decompress_nm, pack and spmm_nm of one instruction set against
// scalar code. Every buffer is exactly as large as its contents, so that AddressSanitizer sees a read outside.
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "harness.h"
#include "kernels/kernels.h"

namespace {

using sdgp::test::expect;

std::mt19937 generator(7);

int64_t below(int64_t end) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(end)); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs [0, units) in so many pieces, as threads would; whether all of them were valid.
template <class Run>
bool in_pieces(int64_t units, int64_t pieces, Run run) {
  bool valid = true;
  for (int64_t p = 0; p < pieces; ++p) valid &= run(units * p / pieces, units * (p + 1) / pieces);
  return valid;
}

// --- element types: random ones, and what they are worth ----------------------------------------------------------

template <class T>
struct Real {
  using Type = T;
  static constexpr sdgp::DType kDType = sizeof(T) == 4 ? sdgp::DType::kFloat32 : sdgp::DType::kFloat64;
  static constexpr double kRounding = 0;
  static T draw() { return static_cast<T>(std::normal_distribution<double>()(generator)); }
  static double value(T x) { return x; }
};

// One sign bit, so many exponent bits, the rest mantissa.
template <sdgp::DType dtype, int kExponent>
struct Short {
  using Type = uint16_t;
  static constexpr sdgp::DType kDType = dtype;
  static constexpr int kMantissa = 15 - kExponent;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr double kRounding = 1.0 / (1 << kMantissa);
  static uint16_t draw() {  // magnitudes from 1/8 to 8
    const auto exponent = static_cast<uint32_t>(kBias - 3 + below(6));
    return static_cast<uint16_t>((generator() & 1) << 15 | exponent << kMantissa |
                                 (generator() & ((1u << kMantissa) - 1)));
  }
  static double value(uint16_t x) {
    const int exponent = x >> kMantissa & ((1 << kExponent) - 1);
    const int mantissa = x & ((1 << kMantissa) - 1);
    const int whole = exponent ? mantissa + (1 << kMantissa) : mantissa;
    return (x >> 15 ? -1 : 1) * std::ldexp(whole, (exponent ? exponent : 1) - kBias - kMantissa);
  }
};
using Half = Short<sdgp::DType::kFloat16, 5>;
using BFloat16 = Short<sdgp::DType::kBFloat16, 8>;

template <class F>
std::vector<typename F::Type> draw(int64_t count, double zeros = 0) {
  std::vector<typename F::Type> x(static_cast<size_t>(count));
  for (auto& value : x) value = static_cast<double>(generator() % 1000) < 1000 * zeros ? 0 : F::draw();
  return x;
}

// --- compress_nm --------------------------------------------------------------------------------------------------

// (outer, size, inner), compressed along its middle: contiguous, or with the middle innermost.
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
  args.method = method;
  args.n = n;
  args.m = m;
  args.seed = 0x0123456789abcdefu;
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
struct Compressed {
  std::vector<T> values;
  std::vector<uint8_t> indices;
  bool operator==(const Compressed& other) const {
    return indices == other.indices && std::memcmp(values.data(), other.values.data(), values.size() * sizeof(T)) == 0;
  }
};

// Of a row of bits: those that are not +0, then the lowest indices; a short group ends with 0 at 0.
template <class T>
void pack_group(const T* x, int64_t length, int n, Compressed<T>& to) {
  const T zero{};
  const auto kept = [&](int64_t j) { return std::memcmp(&x[j], &zero, sizeof zero) != 0; };
  int64_t fill = n < length ? n : length;
  for (int64_t j = 0; j < length; ++j) fill -= kept(j);
  int slots = 0;
  for (int64_t j = 0; j < length; ++j) {
    if (!kept(j) && fill-- <= 0) continue;
    to.values.push_back(x[j]);
    to.indices.push_back(static_cast<uint8_t>(j));
    ++slots;
  }
  for (; slots < n; ++slots) {
    to.values.push_back(zero);
    to.indices.push_back(0);
  }
}

template <class T>
void test_decompress(const Compressed<T>& from, const std::vector<T>& pruned, int64_t rows, int64_t size, int n, int m,
                     const std::string& what) {
  const sdgp::Kernels& table = sdgp::kernels();
  std::vector<T> out(pruned.size());
  Compressed<T> corrupt = from;
  const sdgp::DecompressArgs args{.values = corrupt.values.data(),
                                  .indices = corrupt.indices.data(),
                                  .out = out.data(),
                                  .element_size = sizeof(T),
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
  test_decompress(expected, rows, shape.rows(), shape.size, n, m, what);
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

enum class Weight { kContiguous, kChannelsLast, kTransposed };

struct Product {
  const char* name;
  int64_t samples;
  int64_t groups;
  int64_t size;
  int64_t cols;
  sdgp::Axis2d height;
  sdgp::Axis2d width;
  Weight weight;
  bool channels_first;
};

constexpr sdgp::Axis2d kPoint{1, 1, 1, 1, 0, 1};

// in, out, kernel, stride, padding, dilation.
const Product kProducts[] = {
    {"one value", 1, 1, 1, 1, kPoint, kPoint, Weight::kContiguous, false},
    {"one row", 1, 1, 70, 17, kPoint, kPoint, Weight::kContiguous, false},
    {"rows", 37, 1, 64, 33, kPoint, kPoint, Weight::kContiguous, false},
    {"transposed", 5, 1, 130, 129, kPoint, kPoint, Weight::kTransposed, false},
    {"two chunks", 300, 1, 96, 40, kPoint, kPoint, Weight::kContiguous, false},
    {"many slabs", 260, 1, 1500, 24, kPoint, kPoint, Weight::kContiguous, false},
    {"wide", 3, 1, 40, 1000, kPoint, kPoint, Weight::kContiguous, false},
    {"3 x 3", 2, 1, 24, 20, {7, 7, 3, 1, 1, 1}, {5, 5, 3, 1, 1, 1}, Weight::kContiguous, true},
    {"3 x 3, last", 2, 1, 24, 20, {7, 7, 3, 1, 1, 1}, {5, 5, 3, 1, 1, 1}, Weight::kChannelsLast, false},
    {"stride", 3, 1, 16, 9, {9, 5, 3, 2, 1, 1}, {8, 3, 2, 3, 0, 1}, Weight::kContiguous, true},
    {"dilation", 1, 1, 16, 40, {11, 7, 3, 1, 0, 2}, {6, 10, 1, 1, 2, 3}, Weight::kContiguous, false},
    {"groups", 2, 3, 64, 5, {6, 6, 3, 1, 1, 1}, {6, 6, 3, 1, 1, 1}, Weight::kContiguous, true},
    {"groups apart", 2, 2, 33, 6, {6, 3, 3, 2, 1, 1}, {6, 6, 3, 1, 1, 1}, Weight::kContiguous, false},
    {"7 x 7", 1, 1, 64, 3, {13, 7, 7, 2, 3, 1}, {13, 7, 7, 2, 3, 1}, Weight::kContiguous, true},
};

// Strides of the weight by row, column, height and width.
void set_weight_strides(const Product& p, sdgp::SpmmArgs& args) {
  const int64_t h = p.height.kernel;
  const int64_t w = p.width.kernel;
  const int64_t rows = p.groups * p.size;
  const int64_t strides[][4] = {{p.cols * h * w, h * w, w, 1},            // (rows, cols, h, w)
                                {p.cols * h * w, 1, w * p.cols, p.cols},  // (rows, h, w, cols)
                                {1, h * w * rows, w * rows, rows}};       // (cols, h, w, rows)
  const int64_t* chosen = strides[static_cast<int>(p.weight)];
  args.dense_row_stride = chosen[0];
  args.dense_col_stride = chosen[1];
  args.dense_height_stride = chosen[2];
  args.dense_width_stride = chosen[3];
}

sdgp::SpmmArgs describe(const Product& p, sdgp::DType dtype, int n, int m) {
  const bool apart = p.groups > 1 && p.size % m != 0;
  const int64_t kept = (apart ? ceil_div(p.size, m) : ceil_div(p.size * p.groups, m)) * n;
  const int64_t pixels = p.height.out * p.width.out;
  sdgp::SpmmArgs args{};
  args.row_stride = kept;
  args.sample_stride = pixels * kept * (apart ? p.groups : 1);
  args.group_stride = apart ? pixels * kept : kept / p.groups;
  args.out_channels_first = p.channels_first;
  args.dtype = dtype;
  args.n = n;
  args.m = m;
  args.size = p.size;
  args.cols = p.cols;
  args.groups = p.groups;
  args.samples = p.samples;
  args.height = p.height;
  args.width = p.width;
  set_weight_strides(p, args);
  return args;
}

struct Sums {
  std::vector<double> exact;
  std::vector<double> magnitude;
};

int64_t result_offset(const sdgp::SpmmArgs& args, int64_t sample, int64_t y, int64_t x, int64_t channel) {
  const int64_t channels = args.cols * args.groups;
  if (!args.out_channels_first) return ((sample * args.height.in + y) * args.width.in + x) * channels + channel;
  return ((sample * channels + channel) * args.height.in + y) * args.width.in + x;
}

// Adds what one kept value gives to the result's pixel (y, x), all columns.
template <class F>
void add_slot(const sdgp::SpmmArgs& args, int64_t group, int64_t at, int64_t slot, int64_t dense, int64_t sample,
              int64_t y, int64_t x, Sums& sums) {
  using T = typename F::Type;
  const double value = F::value(static_cast<const T*>(args.values)[at + slot]);
  const int64_t k = slot / args.n * args.m + args.indices[at + slot];
  for (int64_t c = 0; c < args.cols; ++c) {
    const int64_t from = dense + (group * args.size + k) * args.dense_row_stride + c * args.dense_col_stride;
    const double term = value * F::value(static_cast<const T*>(args.dense)[from]);
    const auto to = static_cast<size_t>(result_offset(args, sample, y, x, group * args.cols + c));
    sums.exact[to] += term;
    sums.magnitude[to] += std::fabs(term);
  }
}

template <class F>
Sums scalar(const sdgp::SpmmArgs& args) {
  const sdgp::Axis2d& h = args.height;
  const sdgp::Axis2d& w = args.width;
  const auto count = static_cast<size_t>(args.samples * args.groups * args.cols * h.in * w.in);
  Sums sums{std::vector<double>(count), std::vector<double>(count)};
  const int64_t slots = ceil_div(args.size, args.m) * args.n;
  for (int64_t i = 0; i < args.samples * args.groups * h.out * w.out * h.kernel * w.kernel; ++i) {
    const int64_t kx = i % w.kernel;
    const int64_t ky = i / w.kernel % h.kernel;
    const int64_t pixel = i / (w.kernel * h.kernel) % (h.out * w.out);
    const int64_t group = i / (w.kernel * h.kernel * h.out * w.out) % args.groups;
    const int64_t sample = i / (w.kernel * h.kernel * h.out * w.out * args.groups);
    const int64_t y = pixel / w.out * h.stride - h.padding + ky * h.dilation;
    const int64_t x = pixel % w.out * w.stride - w.padding + kx * w.dilation;
    if (y < 0 || y >= h.in || x < 0 || x >= w.in) continue;
    const int64_t at = sample * args.sample_stride + group * args.group_stride + pixel * args.row_stride;
    const int64_t dense = ky * args.dense_height_stride + kx * args.dense_width_stride;
    for (int64_t slot = 0; slot < slots; ++slot) add_slot<F>(args, group, at, slot, dense, sample, y, x, sums);
  }
  return sums;
}

// Aligned as the op aligns it, and not one byte longer than the kernel asks for.
struct Packed {
  explicit Packed(int64_t bytes) : data(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  ~Packed() { ::operator delete(data, std::align_val_t{64}); }
  void* data;
};

template <class T>
bool multiply(sdgp::SpmmArgs args, std::vector<T>& out, int64_t pieces) {
  const sdgp::Kernels& table = sdgp::kernels();
  const Packed packed(table.packed_size(args) * static_cast<int64_t>(sizeof(T) == 8 ? 8 : 4));
  args.packed = packed.data;
  args.out = out.data();
  in_pieces(table.pack_units(args), pieces, [&](int64_t begin, int64_t end) {
    table.pack(args, begin, end);
    return true;
  });
  return in_pieces(table.spmm_nm_units(args), pieces,
                   [&](int64_t begin, int64_t end) { return table.spmm_nm(args, begin, end); });
}

std::vector<uint8_t> draw_indices(const sdgp::SpmmArgs& args, int64_t count) {
  std::vector<uint8_t> indices(static_cast<size_t>(count));
  const int64_t slots = args.size % args.m == 0 ? args.row_stride : ceil_div(args.size, args.m) * args.n;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t left = (args.size % args.m == 0 ? args.m : args.size - i % slots / args.n * args.m);
    indices[static_cast<size_t>(i)] = static_cast<uint8_t>(below(left < args.m ? left : args.m));
  }
  return indices;
}

template <class F>
void test_product(const Product& p, int n, int m, const std::string& what) {
  using T = typename F::Type;
  sdgp::SpmmArgs args = describe(p, F::kDType, n, m);
  const auto values = draw<F>(p.samples * args.sample_stride);
  std::vector<uint8_t> indices = draw_indices(args, p.samples * args.sample_stride);
  const auto dense = draw<F>(p.groups * p.size * p.cols * p.height.kernel * p.width.kernel);
  args.values = values.data();
  args.indices = indices.data();
  args.dense = dense.data();
  const Sums sums = scalar<F>(args);
  std::vector<T> out(sums.exact.size());
  std::vector<T> again(sums.exact.size());
  expect(multiply(args, out, 1), what + ", valid");
  expect(multiply(args, again, 5), what + ", valid in pieces");
  expect(std::memcmp(out.data(), again.data(), out.size() * sizeof(T)) == 0, what + ", in pieces");
  const double terms = static_cast<double>(args.row_stride * p.height.kernel * p.width.kernel + 2);
  const double epsilon = sizeof(T) == 8 ? std::ldexp(1, -52) : std::ldexp(1, -23);
  for (size_t i = 0; i < out.size(); ++i) {
    const double error = std::fabs(F::value(out[i]) - sums.exact[i]);
    const double bound = terms * epsilon * sums.magnitude[i] + 0.51 * F::kRounding * std::fabs(sums.exact[i]) +
                         (F::kRounding > 0 ? std::ldexp(1, -14) : 0);
    expect(error <= bound, what + ", element " + std::to_string(i));
  }
  for (const int wrong : {m, 255}) {
    indices[static_cast<size_t>(below(static_cast<int64_t>(indices.size())))] = static_cast<uint8_t>(wrong);
    multiply(args, again, 2);  // nothing outside is read; whether it is told depends on whether that value is used
    if (p.height.kernel == 1 && p.width.kernel == 1 && p.height.in == 1) {
      expect(!multiply(args, again, 1), what + ", an index of " + std::to_string(wrong));
    }
  }
}

// A gradient that is pruned on the way gives, bit for bit, what its compressed form gives.
template <class F>
void test_gradient(const Product& p, int n, int m, sdgp::Method method, bool channels_first, const std::string& what) {
  using T = typename F::Type;
  sdgp::SpmmArgs args = describe(p, F::kDType, n, m);
  const bool apart = p.groups > 1 && p.size % m != 0;
  const int64_t pixels = p.height.out * p.width.out;
  const int64_t channels = p.groups * p.size;
  const auto data = draw<F>(p.samples * channels * pixels);
  const auto dense = draw<F>(channels * p.cols * p.height.kernel * p.width.kernel);
  args.dense = dense.data();
  const int64_t channel_stride = channels_first ? pixels : 1;
  const int64_t pixel_stride = channels_first ? 1 : channels;

  sdgp::CompressArgs compress{};
  sdgp::PruneArgs& prune = compress.prune;
  prune.in = data.data();
  prune.dtype = F::kDType;
  prune.method = method;
  prune.n = n;
  prune.m = m;
  prune.seed = 7;
  prune.size = apart ? p.size : channels;
  prune.in_stride = prune.out_stride = channel_stride;
  const int64_t rows = apart ? p.groups * pixels : pixels;  // of a sample
  if (p.samples > 1) {
    prune.dims[prune.ndim++] = {p.samples, channels * pixels, channels * pixels, rows, false};
  }
  if (apart) prune.dims[prune.ndim++] = {p.groups, p.size * channel_stride, p.size * channel_stride, pixels, false};
  if (pixels > 1) prune.dims[prune.ndim++] = {pixels, pixel_stride, pixel_stride, 1, false};
  std::vector<T> values(static_cast<size_t>(p.samples * args.sample_stride));
  std::vector<uint8_t> indices(values.size());
  compress.values = values.data();
  compress.indices = indices.data();
  const sdgp::Kernels& table = sdgp::kernels();
  table.compress_nm(compress, 0, table.compress_nm_units(compress));

  args.values = values.data();
  args.indices = indices.data();
  std::vector<T> expected(static_cast<size_t>(p.samples * p.height.in * p.width.in * p.groups * p.cols));
  std::vector<T> actual(expected.size());
  multiply(args, expected, 1);
  const sdgp::Gradient gradient{data.data(), method, 7, channels * pixels, pixel_stride, channel_stride, apart};
  args.gradient = &gradient;
  for (const int64_t threads : {1, 3}) {
    args.threads = threads;
    expect(multiply(args, actual, 2 * threads - 1), what + ", valid");
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
  test_all_compress();
  test_all_products();
  test_all_gradients();
}

}  // namespace

int main() { return sdgp::test::run(&test_all); }
