// SPDX-License-Identifier: BSD-3-Clause
#include "prune_args.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace sdgp {
namespace {

// Describes the dimensions other than the pruned one, by descending output stride. Merges dimensions that step through
// memory together.
void describe_dims(const Tensor& input, const Tensor& output, int64_t pruned, PruneArgs& args) {
  const int64_t ndim = input.dim();
  // rescale has one factor per (sample, channel). The sample is the first dimension other than the pruned one. If no
  // dimension is left to sum over, the sums run along the pruned one.
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

PruneCall validate_prune(const char* op, const Tensor& input, const Settings& settings) {
  check_pattern(op, settings.n, settings.m);
  const Method method = check_method(op, settings.method);
  check_strided(op, input);
  const DType dtype = check_dtype(op, input);
  const int64_t front_dim = check_dim(op, input, settings.dim);
  check_seed(op, input, settings.seed);
  const Pruning pruning{.method = method,
                        .n = static_cast<int>(settings.n),
                        .m = static_cast<int>(settings.m),
                        .seed = 0,
                        .scale = false};
  check(pruning.fixed() || !input.is_cuda(), op, ": expected a tensor on the CPU for ", traits(method).name,
        ", got one on cuda");
  return {dtype, front_dim, pruning, settings.seed};
}

PruneArgs describe_prune(const Tensor& input, const Tensor& output, const PruneCall& call) {
  PruneArgs args{};
  args.in = input.const_data_ptr();
  args.dtype = call.dtype;
  args.pruning = call.pruning;
  args.size = input.size(call.dim);
  args.in_stride = input.stride(call.dim);
  args.out_stride = output.stride(call.dim);
  describe_dims(input, output, call.dim, args);
  return args;
}

bool prune_trivially(const Tensor& input, Tensor& output, const Pruning& pruning) {
  if (input.numel() == 0) return true;
  if (!pruning.keeps_all()) return false;
  if (pruning.scale) {
    torch::stable::fill_(output, 1.0);
  } else {
    torch::stable::copy_(output, input);
  }
  return true;
}

Tensor seed_of(const Tensor& input, const PruneCall& call) {
  if (call.seed) return *call.seed;
  using torch::stable::detail::from;
  constexpr auto low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
  const int64_t one = 1;
  const Tensor drawn = torch::stable::new_empty(input, {&one, 1}, ScalarType::Long);
  StableIValue stack[4] = {from(drawn), from(low), from(std::optional<int64_t>(high)), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "from", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sdgp
