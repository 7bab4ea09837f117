// SPDX-License-Identifier: BSD-3-Clause
#include "prune_args.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace sdgp {
namespace {

// The dimensions other than the pruned one, by descending output stride, those that step through memory together
// merged.
void describe_dims(const Tensor& input, const Tensor& output, int64_t pruned, PruneArgs& args) {
  const int64_t ndim = input.dim();
  // rescale: one factor per (sample, channel), where the sample is the first other dimension; with no further
  // dimension to sum over, the sums run along the pruned one.
  args.dim_per_factor = ndim > 2;
  const int64_t sample = pruned == 0 ? 1 : 0;
  std::vector<Dim> dims;
  int64_t row_step = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    if (d == pruned) continue;
    if (input.size(d) != 1) {
      dims.push_back({input.size(d), input.stride(d), output.stride(d), row_step, d == sample});
    }
    row_step *= input.size(d);
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.out_stride > b.out_stride; });
  args.ndim = 0;
  for (const Dim& inner : dims) {
    Dim* const outer = args.ndim ? &args.dims[args.ndim - 1] : nullptr;
    if (outer && outer->in_stride == inner.size * inner.in_stride &&
        outer->out_stride == inner.size * inner.out_stride && outer->row_step == inner.size * inner.row_step &&
        outer->per_factor == inner.per_factor) {
      *outer = {outer->size * inner.size, inner.in_stride, inner.out_stride, inner.row_step, inner.per_factor};
    } else {
      args.dims[args.ndim++] = inner;
    }
  }
}

}  // namespace

PruneCall validate_prune(const char* op, const Tensor& input, int64_t n, int64_t m, int64_t dim,
                         std::string_view method, const std::optional<Tensor>& seed) {
  check_pattern(op, n, m);
  const Method known = check_method(op, method);
  check_strided(op, input);
  const DType dtype = check_dtype(op, input);
  const int64_t front_dim = check_dim(op, input, dim);
  check_seed(op, input, seed);
  return {dtype, known, front_dim};
}

PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call, int64_t n, int64_t m) {
  PruneArgs args{};
  args.in = input.const_data_ptr();
  args.dtype = call.dtype;
  args.method = call.method;
  args.n = static_cast<int>(n);
  args.m = static_cast<int>(m);
  args.size = input.size(call.dim);
  args.in_stride = input.stride(call.dim);
  args.out_stride = output.stride(call.dim);
  describe_dims(input, output, call.dim, args);
  return args;
}

bool nothing_to_choose(const Tensor& input, Tensor& output, int64_t n, int64_t m, bool scale) {
  if (input.numel() == 0) return true;
  if (n != m) return false;
  if (scale) {
    torch::stable::fill_(output, 1.0);
  } else {
    torch::stable::copy_(output, input);
  }
  return true;
}

Tensor draw_seed(const Tensor& input) {
  const int64_t one = 1;
  const Tensor drawn = torch::stable::new_empty(input, {&one, 1}, ScalarType::Long);
  StableIValue stack[2] = {torch::stable::detail::from(drawn), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sdgp
