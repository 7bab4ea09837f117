// SPDX-License-Identifier: BSD-3-Clause
//
// Cases for weight_grad_nm: convolutions and matrix products, in any layout.
#pragma once

#include "../cpp/weight_grad.h"
#include "spmm_nm.h"

namespace sdgp::test {

// Draws an axis whose output size follows from its other fields.
inline sdgp::Axis2d draw_whole_axis(Bytes& bytes, int64_t most) {
  if (bytes.flag()) {
    const int64_t size = 1 + bytes.below(most);
    return {size, size, 1, 1, 0, 1};
  }
  sdgp::Axis2d axis{
      0, 1 + bytes.below(most), 1 + bytes.below(7), 1 + bytes.below(3), bytes.below(9), 1 + bytes.below(3)};
  const int64_t reach = (axis.out - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
  while (reach - 2 * axis.padding < 1) --axis.padding;
  axis.in = reach - 2 * axis.padding + bytes.below(axis.stride);
  return axis;
}

inline WeightProduct draw_weight_product(Bytes& bytes) {
  const int64_t limit = draw_limit(bytes);
  WeightProduct p{};
  p.height = draw_whole_axis(bytes, 12);
  p.width = draw_whole_axis(bytes, bytes.below(8) == 0 ? 150 : 12);
  p.groups = 1 + (bytes.byte() >= 192) * bytes.below(3);
  const int64_t pixels = std::max(p.pixels(), p.height.in * p.width.in);
  p.rows = 1 + bytes.below(std::clamp<int64_t>(limit * 8 / pixels, 1, 900));
  p.cols = 1 + bytes.below(std::clamp<int64_t>(limit * 4 / pixels, 1, 300));
  p.samples = 1 + bytes.below(std::clamp<int64_t>(limit * 4 / (p.rows + p.cols) / pixels, 1, 60));
  p.gradient = static_cast<Layout>(bytes.below(3));
  p.input = static_cast<Layout>(bytes.below(3));
  p.channels_last = bytes.flag();
  return p;
}

template <class F>
void check_sums(const WeightProduct& p, const sdgp::WeightGradArgs& args, const Array<typename F::Type>& gradient,
                const Array<typename F::Type>& out) {
  const Array<typename F::Type> pruned(gradient.size);
  std::copy(gradient.data, gradient.data + gradient.size, pruned.data);
  if (!args.pruning.keeps_all()) prune(*kTables[0], describe_rows(p, args), gradient, pruned, 1);
  const Sums sums = weight_sums<F>(p, args, pruned.data);
  for (int64_t i = 0; i < out.size; ++i) {
    const auto at = static_cast<size_t>(i);
    if (F::kDType == sdgp::DType::kFloat16 && std::fabs(sums.exact[at]) > 65000) continue;  // may round to infinity
    require(std::fabs(F::value(out[i]) - sums.exact[at]) <= error_bound<F>(p, sums, at),
            "weight_grad_nm: as scalar code");
  }
}

template <class F>
void fuzz_weight_grad(Bytes& bytes) {
  using T = typename F::Type;
  const WeightProduct p = draw_weight_product(bytes);
  const int m = static_cast<int>(bytes.flag() ? int64_t{1} << bytes.below(7) : 1 + bytes.below(64));
  const int n = static_cast<int>(1 + bytes.below(m));
  const Method methods[] = {Method::kMagnitude, Method::kRandom, Method::kMvue, Method::kUnstructured};
  const sdgp::Pruning pruning{.method = methods[bytes.below(4)],
                              .n = n,
                              .m = m,
                              .seed = bytes.byte(),
                              .scale = false,
                              .step = std::ldexp(1, static_cast<int>(bytes.below(8)) - 4)};
  sdgp::WeightGradArgs args = describe(p, F::kDType, pruning);
  const int64_t pieces = 1 + bytes.below(5);
  const int64_t skew = bytes.below(4);
  const int64_t threads = 1 + bytes.below(8);
  const auto values = static_cast<Values>(bytes.below(5));
  const Array<T> gradient(p.gradient_size(), skew);
  const Array<T> input(p.input_size(), skew);
  fill<F>(gradient, values, bytes);
  fill<F>(input, bytes.below(4) == 0 ? values : kTame, bytes);
  args.gradient.data = gradient.data;
  args.input = input.data;
  for (const Kernels* table : kTables) {
    const Array<T> whole(p.result_size(), skew);
    const Array<T> cut(p.result_size(), skew);
    args.out = whole.data;
    args.threads = 1;
    multiply(*table, args, 1);
    args.out = cut.data;
    args.threads = threads;
    multiply(*table, args, pieces);
    calls += 1 + pieces;
    require(same<F>(whole, cut), "weight_grad_nm: in pieces");
    if (values == kTame) check_sums<F>(p, args, gradient, whole);
  }
}

}  // namespace sdgp::test
