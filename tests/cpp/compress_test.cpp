// SPDX-License-Identifier: BSD-3-Clause
//
// Tests compress_nm and decompress_nm of one instruction set without torch, against scalar code. Every buffer is
// exactly as large as its contents, so that AddressSanitizer detects a read outside it.
#include <cstring>
#include <string>
#include <vector>

#include "harness.h"
#include "kernels/table.h"
#include "products.h"
#include "rows.h"

namespace {

using namespace sdgp::test;

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

void test_all() { test_all_compress(); }

}  // namespace

int main() { return sdgp::test::run(&test_all); }
