// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm and _prune_nm_scale: validate, allocate, describe the tensor to the kernels. One host function serves every
// device; what differs is who fills the output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../kernels/kernels.h"

namespace sdgp {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it gains (as in ATen)

struct Call {
  DType dtype;
  Method method;
  int64_t dim;
};

constexpr const char* op_name(bool scale) { return scale ? "_prune_nm_scale" : "prune_nm"; }

Call validate(bool scale, const Tensor& input, int64_t n, int64_t m, int64_t dim, std::string_view method,
              const std::optional<Tensor>& seed) {
  const char* const op = op_name(scale);
  check_pattern(op, n, m);
  const Method known = check_method(op, method);
  check_strided(op, input);
  const DType dtype = check_dtype(op, input);
  const int64_t front_dim = check_dim(op, input, dim);
  check_seed(op, input, seed);
  return {dtype, known, front_dim};
}

// The output has the input's strides where those leave no holes and do not overlap, else those that clone() would give.
Tensor allocate(const Tensor& input) { return torch::stable::empty_like(input); }

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

uint64_t read_seed(const Tensor& input, const std::optional<Tensor>& seed) {
  if (seed) return static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  const int64_t one = 1;
  const Tensor drawn = torch::stable::new_empty(input, {&one, 1}, ScalarType::Long);
  StableIValue stack[2] = {torch::stable::detail::from(drawn), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "", stack, TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  return static_cast<uint64_t>(*result.const_data_ptr<int64_t>());
}

template <bool kScale>
Tensor prune_nm_cpu(const Tensor& input, int64_t n, int64_t m, int64_t dim, std::string_view method,
                    const std::optional<Tensor>& seed) {
  const Call call = validate(kScale, input, n, m, dim, method, seed);
  Tensor output = allocate(input);
  if (input.numel() == 0) return output;
  if (n == m) {
    if (kScale) return torch::stable::fill_(output, 1.0);
    return torch::stable::copy_(output, input);
  }
  PruneArgs args{};
  args.in = input.const_data_ptr();
  args.out = output.mutable_data_ptr();
  args.dtype = call.dtype;
  args.method = call.method;
  args.scale = kScale;
  args.n = static_cast<int>(n);
  args.m = static_cast<int>(m);
  args.seed = is_random(call.method) ? read_seed(input, seed) : 0;
  args.size = input.size(call.dim);
  args.in_stride = input.stride(call.dim);
  args.out_stride = output.stride(call.dim);
  describe_dims(input, output, call.dim, args);
  const Kernels& table = kernels();
  const int64_t units = table.prune_nm_units(args);
  const int64_t grain = 1 + units * kGrainElements / input.numel();
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { table.prune_nm(args, begin, end); });
  return output;
}

template <bool kScale>
Tensor prune_nm_meta(const Tensor& input, int64_t n, int64_t m, int64_t dim, std::string_view method,
                     const std::optional<Tensor>& seed) {
  validate(kScale, input, n, m, dim, method, seed);
  return allocate(input);
}

// Whatever has no kernel: quantized and sparse tensors fail the checks, a device without one is named.
template <bool kScale>
Tensor prune_nm_unsupported(const Tensor& input, int64_t n, int64_t m, int64_t dim, std::string_view method,
                            const std::optional<Tensor>& seed) {
  validate(kScale, input, n, m, dim, method, seed);
  check(false, op_name(kScale), ": expected a tensor on a device with an sdgp kernel (cpu), got ",
        name_of(device_of(input)));
  __builtin_unreachable();
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("prune_nm", TORCH_BOX(&sdgp::prune_nm_cpu<false>));
  library.impl("_prune_nm_scale", TORCH_BOX(&sdgp::prune_nm_cpu<true>));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, Meta, library) {
  library.impl("prune_nm", TORCH_BOX(&sdgp::prune_nm_meta<false>));
  library.impl("_prune_nm_scale", TORCH_BOX(&sdgp::prune_nm_meta<true>));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("prune_nm", TORCH_BOX(&sdgp::prune_nm_unsupported<false>));
  library.impl("_prune_nm_scale", TORCH_BOX(&sdgp::prune_nm_unsupported<true>));
}
