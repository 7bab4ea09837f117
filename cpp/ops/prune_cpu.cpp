// SPDX-License-Identifier: BSD-3-Clause
#include "prune_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../kernels/table.h"

namespace sdgp {

namespace {

constexpr int64_t kStepSample = 8192;  // elements: the density is then within a few percent

// Collects the magnitudes of finite elements, evenly spaced in row-major order. So equal tensors give equal samples,
// whatever their strides.
template <class T>
std::vector<double> sample_magnitudes(const Tensor& input) {
  const T* const data = static_cast<const T*>(input.const_data_ptr());
  const int64_t ndim = input.dim(), numel = input.numel();
  if (numel == 0) return {};
  int64_t spacing = (numel + kStepSample - 1) / kStepSample;
  while (std::gcd(spacing, numel) > 1) ++spacing;  // so the samples do not repeat the same columns
  std::vector<int64_t> index(static_cast<size_t>(ndim)), hop(index);
  for (int64_t d = ndim - 1, rest = spacing; d >= 0; rest /= input.size(d), --d) {
    hop[static_cast<size_t>(d)] = rest % input.size(d);
  }
  std::vector<double> magnitudes;
  for (int64_t at = 0; at < numel; at += spacing) {
    int64_t offset = 0, carry = 0;
    for (int64_t d = 0; d < ndim; ++d) offset += index[static_cast<size_t>(d)] * input.stride(d);
    const double magnitude = std::abs(static_cast<double>(data[offset]));
    if (std::isfinite(magnitude)) magnitudes.push_back(magnitude);
    for (int64_t d = ndim - 1; d >= 0; --d) {
      int64_t& i = index[static_cast<size_t>(d)];
      i += hop[static_cast<size_t>(d)] + carry;
      carry = i >= input.size(d);
      if (carry) i -= input.size(d);
    }
  }
  return magnitudes;
}

// Finds the step with which n of m elements stay in the mean: the probabilities min(1, |x| / step) add up to n / m of
// the elements. As in Note [mvue] of mvue-inl.h, over a sample. The result is a finite number of type T, because
// kept elements get this value, and so large that 2^24 / step is finite, too.
template <class T>
double find_step(const Tensor& input, const Pruning& pruning) {
  const std::vector<double> magnitudes = sample_magnitudes<T>(input);
  const double wanted = static_cast<double>(magnitudes.size()) * pruning.n / pruning.m;
  double step = std::numeric_limits<double>::infinity();
  while (true) {
    double rest = 0, places = wanted;
    for (const double magnitude : magnitudes) magnitude < step ? rest += magnitude : places -= 1;
    if (places <= 0 || !(rest / places < step)) break;
    step = rest / places;
  }
  using Limits = std::numeric_limits<T>;
  const double least = std::ldexp(1, sizeof(T) == 8 ? -999 : -103);
  step =
      std::clamp(step, std::max(least, static_cast<double>(Limits::denorm_min())), static_cast<double>(Limits::max()));
  if constexpr (sizeof(T) == 8) return step;
  return static_cast<double>(static_cast<T>(static_cast<float>(step)));
}

double find_step(const Tensor& input, const PruneCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return find_step<float>(input, call.pruning);
    case DType::kFloat64: return find_step<double>(input, call.pruning);
    case DType::kFloat16: return find_step<c10::Half>(input, call.pruning);
    case DType::kBFloat16: return find_step<c10::BFloat16>(input, call.pruning);
  }
  return 0;
}

}  // namespace

Pruning complete(const Tensor& input, const PruneCall& call) {
  Pruning pruning = call.pruning;
  if (call.draws()) pruning.seed = static_cast<uint64_t>(*seed_of(input, call).const_data_ptr<int64_t>());
  if (!pruning.fixed()) pruning.step = find_step(input, call);
  return pruning;
}

void prune_into_cpu(const Tensor& input, Tensor& output, const PruneCall& call) {
  if (prune_trivially(input, output, call.pruning)) return;
  PruneArgs args = describe_prune(input, output, call);
  args.pruning = complete(input, call);
  args.out = output.mutable_data_ptr();
  const Kernels& table = kernels();
  const int64_t units = table.prune_nm_units(args);
  torch::stable::parallel_for(0, units, grain_of(units, input.numel()),
                              [&](int64_t begin, int64_t end) { table.prune_nm(args, begin, end); });
}

}  // namespace sdgp
