// SPDX-License-Identifier: BSD-3-Clause
#include "prune_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/cuda_kernels.h"
#include "../kernels/plan.cuh"

namespace sdgp {

void* current_stream(const Tensor& input) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(input).index, &stream));
  return stream;
}

const int64_t* seed_on_device(const Tensor& input, const PruneCall& call, std::optional<Tensor>& held) {
  if (!traits(call.pruning.method).draws) return nullptr;
  held = seed_of(input, call);
  return held->const_data_ptr<int64_t>();
}

void prune_into_cuda(const Tensor& input, Tensor& output, const PruneCall& call) {
  if (prune_trivially(input, output, call.pruning)) return;
  PruneArgs args = describe_prune(input, output, call);
  if (args.ndim >= cuda::kMaxAxes) {  // too many dimensions that do not merge
    const Tensor source = torch::stable::contiguous(input);
    Tensor result = torch::stable::empty_like(source);
    prune_into_cuda(source, result, call);
    torch::stable::copy_(output, result);
    return;
  }
  args.out = output.mutable_data_ptr();
  void* const stream = current_stream(input);
  std::optional<Tensor> held;
  const int64_t* const seed = seed_on_device(input, call, held);
  if (traits(call.pruning.method).by_group) return cuda::launch_prune_nm(args, seed, nullptr, stream);

  const auto [factors_bytes, partial_bytes] = cuda::rescale_bytes(args);
  const Tensor factors = torch::stable::new_empty(input, {&factors_bytes, 1}, ScalarType::Byte);
  const Tensor partial = torch::stable::new_empty(input, {&partial_bytes, 1}, ScalarType::Byte);
  cuda::launch_rescale_factors(args, partial.mutable_data_ptr(), factors.mutable_data_ptr(), stream);
  cuda::launch_prune_nm(args, seed, factors.const_data_ptr(), stream);
}

}  // namespace sdgp
