// SPDX-License-Identifier: BSD-3-Clause
//
// Tests weight_grad_nm of one instruction set without torch, against scalar code. Buffers are guarded: a read or write
// outside of them ends the test.
#include "weight_grad.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "guarded.h"
#include "harness.h"
#include "kernels/table.h"

namespace {

using namespace sdgp::test;

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

void test_all() { test_all_weight_grads(); }

}  // namespace

int main() { return sdgp::test::run(&test_all); }
