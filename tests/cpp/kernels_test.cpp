// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels without torch: prune_nm of one instruction set against scalar code that follows the specification group
// by group, over layouts that take each path (rows, groups, gather), sizes with tails, and values with ties and NaN.
#include "kernels/kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "harness.h"

namespace {

using sdgp::test::expect;

// A (outer, size, inner) tensor pruned along its middle: contiguous, or with the middle dimension innermost.
struct Shape {
  int64_t outer;
  int64_t size;
  int64_t inner;
  bool middle_last;

  int64_t numel() const { return outer * size * inner; }
  int64_t offset(int64_t o, int64_t k, int64_t i) const {
    return middle_last ? (o * inner + i) * size + k : (o * size + k) * inner + i;
  }
};

template <class T>
sdgp::PruneArgs make_args(const Shape& shape, const std::vector<T>& in, std::vector<T>& out, sdgp::DType dtype,
                          sdgp::Method method, int n, int m) {
  sdgp::PruneArgs args{};
  args.in = in.data();
  args.out = out.data();
  args.dtype = dtype;
  args.method = method;
  args.n = n;
  args.m = m;
  args.seed = 0x0123456789abcdefu;
  args.size = shape.size;
  args.in_stride = args.out_stride = shape.middle_last ? 1 : shape.inner;
  args.dim_per_factor = true;
  args.ndim = 2;
  const int64_t outer_stride = shape.size * shape.inner;
  const int64_t inner_stride = shape.middle_last ? shape.size : 1;
  args.dims[0] = {shape.outer, outer_stride, outer_stride, shape.inner, true};
  args.dims[1] = {shape.inner, inner_stride, inner_stride, 1, false};
  return args;
}

void run(const sdgp::PruneArgs& args, int64_t pieces) {
  const sdgp::Kernels& table = sdgp::kernels();
  const int64_t units = table.prune_nm_units(args);
  for (int64_t p = 0; p < pieces; ++p) table.prune_nm(args, units * p / pieces, units * (p + 1) / pieces);
}

// Bits without the sign, as the order of magnitudes.
uint32_t key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

std::vector<bool> largest(const std::vector<float>& group, int n) {
  std::vector<bool> keep(group.size());
  for (size_t i = 0; i < group.size(); ++i) {
    int ahead = 0;
    for (size_t j = 0; j < group.size(); ++j) {
      ahead += key(group[j]) > key(group[i]) || (key(group[j]) == key(group[i]) && j < i);
    }
    keep[i] = ahead < n;
  }
  return keep;
}

const char* name_of(sdgp::Method method) {
  for (const auto& known : sdgp::kMethods) {
    if (known.method == method) return known.name;
  }
  return "?";
}

const Shape kShapes[] = {{2, 64, 81, false}, {3, 33, 17, false}, {2, 64, 3, false},  {1, 40, 1, false},
                         {2, 512, 5, true},  {3, 70, 9, true},   {1, 4100, 2, true}, {2, 7, 2, true}};
const int kPatterns[][2] = {{1, 2},  {2, 4},  {1, 4},   {3, 5},  {4, 8},  {2, 16},
                            {8, 16}, {4, 32}, {16, 32}, {9, 60}, {31, 64}};

template <class Check>
void for_each_group(const Shape& shape, int m, Check check) {
  for (int64_t o = 0; o < shape.outer; ++o) {
    for (int64_t i = 0; i < shape.inner; ++i) {
      for (int64_t k = 0; k < shape.size; k += m) {
        std::vector<int64_t> at;
        for (int64_t j = k; j < k + m && j < shape.size; ++j) at.push_back(shape.offset(o, j, i));
        check(at);
      }
    }
  }
}

std::vector<float> gather(const std::vector<float>& x, const std::vector<int64_t>& at) {
  std::vector<float> group;
  for (const int64_t i : at) group.push_back(x[static_cast<size_t>(i)]);
  return group;
}

std::vector<float> sample(int64_t numel, bool special) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(numel));
  for (float& value : x) {
    value = special ? std::round(normal(generator)) : normal(generator);  // rounded: ties, zeros of both signs
    if (special && generator() % 97 == 0) value = std::numeric_limits<float>::quiet_NaN();
    if (special && generator() % 89 == 0) value = -std::numeric_limits<float>::infinity();
  }
  return x;
}

bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

void test_magnitude(const Shape& shape, int n, int m, const std::string& what) {
  for (const bool special : {false, true}) {
    const std::vector<float> in = sample(shape.numel(), special);
    std::vector<float> out(in.size(), 77.0f);
    run(make_args(shape, in, out, sdgp::DType::kFloat32, sdgp::Method::kMagnitude, n, m), 3);
    for_each_group(shape, m, [&](const std::vector<int64_t>& at) {
      const std::vector<float> group = gather(in, at);
      const std::vector<bool> keep = largest(group, n);
      const std::vector<float> got = gather(out, at);
      for (size_t j = 0; j < at.size(); ++j) expect(same(got[j], keep[j] ? group[j] : 0.0f), what);
    });
  }
}

// Every method: at most n kept, a kept value has its own sign, and the pieces of work do not change the result.
void test_structure(const Shape& shape, int n, int m, sdgp::Method method, const std::string& what) {
  const std::vector<float> in = sample(shape.numel(), false);
  std::vector<float> out(in.size(), 77.0f);
  std::vector<float> again(in.size(), 78.0f);
  run(make_args(shape, in, out, sdgp::DType::kFloat32, method, n, m), 1);
  run(make_args(shape, in, again, sdgp::DType::kFloat32, method, n, m), 5);
  expect(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0, what + ", in pieces");
  for_each_group(shape, m, [&](const std::vector<int64_t>& at) {
    int kept = 0;
    for (const int64_t i : at) {
      const float x = in[static_cast<size_t>(i)];
      const float y = out[static_cast<size_t>(i)];
      kept += y != 0;
      expect(y == 0 || std::signbit(x) == std::signbit(y), what + ", sign");
      if (method == sdgp::Method::kRandom) expect(y == 0 || same(x, y), what + ", value");
    }
    const int most = n < static_cast<int>(at.size()) ? n : static_cast<int>(at.size());
    expect(kept <= most, what + ", count");
    if (method != sdgp::Method::kMvue) expect(kept == most, what + ", exact count");
  });
}

// The selection of 16-bit and 64-bit types equals that of the same values in float32.
void test_dtypes(const Shape& shape, int n, int m, const std::string& what) {
  std::vector<float> in = sample(shape.numel(), true);
  std::vector<double> in64(in.begin(), in.end());
  std::vector<uint16_t> in16(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &in[i], sizeof bits);
    in16[i] = static_cast<uint16_t>(bits >> 16);  // small integers, inf and NaN are exact in bfloat16
  }
  std::vector<float> out(in.size());
  std::vector<double> out64(in.size());
  std::vector<uint16_t> out16(in.size());
  for (const auto method : {sdgp::Method::kMagnitude, sdgp::Method::kRandom}) {
    run(make_args(shape, in, out, sdgp::DType::kFloat32, method, n, m), 1);
    run(make_args(shape, in64, out64, sdgp::DType::kFloat64, method, n, m), 1);
    run(make_args(shape, in16, out16, sdgp::DType::kBFloat16, method, n, m), 1);
    for (size_t i = 0; i < in.size(); ++i) {
      expect((out[i] != 0) == (out64[i] != 0), what + ", float64");
      expect((out[i] != 0) == ((out16[i] & 0x7fff) != 0), what + ", bfloat16");
    }
  }
}

void test_all() {
  for (const Shape& shape : kShapes) {
    for (const auto& [n, m] : kPatterns) {
      const std::string what = std::to_string(n) + ":" + std::to_string(m) + " of (" + std::to_string(shape.outer) +
                               ", " + std::to_string(shape.size) + ", " + std::to_string(shape.inner) + ")" +
                               (shape.middle_last ? " middle last" : "");
      test_magnitude(shape, n, m, "magnitude " + what);
      test_dtypes(shape, n, m, "dtypes " + what);
      for (const auto& known : sdgp::kMethods) {
        test_structure(shape, n, m, known.method, std::string(name_of(known.method)) + " " + what);
      }
    }
  }
}

}  // namespace

int main() { return sdgp::test::run(&test_all); }
