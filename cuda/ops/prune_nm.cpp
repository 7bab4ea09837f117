// SPDX-License-Identifier: BSD-3-Clause
//
// prune_nm and _prune_nm_scale on CUDA.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels.h"
#include "../plan.cuh"
#include "prune_cuda.h"

namespace sdgp {

void* current_stream(const Tensor& input) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(input).index, &stream));
  return stream;
}

const int64_t* seed_pointer(const Tensor& input, const PruneCall& call, const std::optional<Tensor>& seed,
                            std::optional<Tensor>& drawn) {
  if (!is_random(call.method)) return nullptr;
  if (seed) return seed->const_data_ptr<int64_t>();
  drawn = draw_seed(input);
  return drawn->const_data_ptr<int64_t>();
}

void prune_into_cuda(const Tensor& input, Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                     const std::optional<Tensor>& seed, bool scale) {
  if (nothing_to_choose(input, output, n, m, scale)) return;
  PruneArgs args = describe_prune(input, output, call, n, m);
  if (args.ndim >= cuda::kMaxAxes) {  // this many dimensions, and no two of them merge
    const Tensor source = torch::stable::contiguous(input);
    Tensor result = torch::stable::empty_like(source);
    prune_into_cuda(source, result, call, n, m, seed, scale);
    torch::stable::copy_(output, result);
    return;
  }
  args.out = output.mutable_data_ptr();
  args.scale = scale;
  void* const stream = current_stream(input);
  std::optional<Tensor> drawn;
  const int64_t* const seed_on_device = seed_pointer(input, call, seed, drawn);
  if (call.method != Method::kRescale) return cuda::prune_nm(args, seed_on_device, nullptr, stream);

  const auto dtype = call.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const auto [factors_size, partial_size] = cuda::rescale_sizes(args);
  const Tensor factors = torch::stable::new_empty(input, {&factors_size, 1}, dtype);
  const Tensor partial = torch::stable::new_empty(input, {&partial_size, 1}, dtype);
  cuda::rescale_factors(args, partial.mutable_data_ptr(), factors.mutable_data_ptr(), stream);
  cuda::prune_nm(args, seed_on_device, factors.const_data_ptr(), stream);
}

namespace {

template <bool kScale>
Tensor prune_nm_cuda(const Tensor& input, int64_t n, int64_t m, int64_t dim, std::string_view method,
                     const std::optional<Tensor>& seed) {
  const PruneCall call = validate_prune(kScale ? "_prune_nm_scale" : "prune_nm", input, n, m, dim, method, seed);
  const torch::stable::accelerator::DeviceGuard guard(device_of(input).index);
  Tensor output = torch::stable::empty_like(input);
  prune_into_cuda(input, output, call, n, m, seed, kScale);
  return output;
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CUDA, library) {
  library.impl("prune_nm", TORCH_BOX(&sdgp::prune_nm_cuda<false>));
  library.impl("_prune_nm_scale", TORCH_BOX(&sdgp::prune_nm_cuda<true>));
}
