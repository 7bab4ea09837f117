// SPDX-License-Identifier: BSD-3-Clause
//
// _prune_nm_matmul computes prune_nm(input, n, m, -1) @ dense and prunes the input on the way. This is a linear layer's
// data gradient or, with a transposed input, its weight gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "multiply.h"
#include "prune_cpu.h"
#include "weight_grad.h"

namespace sdgp {
namespace {

constexpr const char* kOp = "_prune_nm_matmul";

PruneCall validate(const Tensor& input, const Tensor& dense, const SettingsAlong<-1>& settings) {
  const PruneCall call = validate_product(kOp, {"the input is", "dense"}, input, dense, settings);
  check(dense.dim() == 2, kOp, ": expected dense (size, cols), got ", name_of_shape(dense));
  check(input.size(call.dim) == dense.size(0), kOp, ": expected input (..., ", dense.size(0), "), got ",
        name_of_shape(input));
  return call;
}

// Returns the stride from row to row if one stride leads through all rows and each row is contiguous.
std::optional<int64_t> find_row_stride(const Tensor& input) {
  if (input.stride(input.dim() - 1) != 1) return std::nullopt;
  std::optional<int64_t> step;
  int64_t next = 0;  // the stride that the next outer dimension must have
  for (int64_t d = input.dim() - 2; d >= 0; --d) {
    if (input.size(d) == 1) continue;
    if (step && input.stride(d) != next) return std::nullopt;
    if (!step) step = input.stride(d);
    next = input.stride(d) * input.size(d);
  }
  return step.value_or(input.size(input.dim() - 1));
}

// Returns whether the rows of a matrix lie side by side in memory, like the transposed output gradient of a linear
// layer's weight gradient.
bool is_transposed(const Tensor& input) {
  return input.dim() == 2 && input.size(0) > 1 && input.stride(0) == 1 && input.stride(1) != 1;
}

Tensor prune_nm_matmul_cpu(const Tensor& input, const Tensor& dense, const SettingsAlong<-1>& settings) {
  const PruneCall call = validate(input, dense, settings);
  Tensor output = empty_rows(input, dense.size(1));
  if (!prepare_output(output, dense.size(0) > 0)) return output;
  const Product product{.op = kOp, .dtype = call.dtype, .pruning = complete(input, call), .samples = count_rows(input)};
  if (is_transposed(input)) {
    const Gradient columns{.data = input.const_data_ptr(),
                           .sample_stride = 1,
                           .pixel_stride = 1,
                           .channel_stride = input.stride(1),
                           .by_conv_group = false};
    if (permutes(product, columns, dense, output)) {
      multiply(product, columns, dense, output);
    } else {
      multiply(
          WeightProduct{
              .dtype = call.dtype,
              .pruning = product.pruning,
              .rows = input.size(0),
              .cols = dense.size(1),
              .width =
                  {.in = dense.size(0), .out = dense.size(0), .kernel = 1, .stride = 1, .padding = 0, .dilation = 1}},
          Gradient{.data = input.const_data_ptr(),
                   .sample_stride = 0,
                   .pixel_stride = input.stride(1),
                   .channel_stride = 1,
                   .by_conv_group = false},
          dense, output);
    }
    return output;
  }
  const std::optional<int64_t> row_stride = find_row_stride(input);
  const Tensor source = row_stride ? input : torch::stable::contiguous(input);
  const int64_t step = row_stride.value_or(dense.size(0));
  multiply(product,
           Gradient{.data = source.const_data_ptr(),
                    .sample_stride = step,
                    .pixel_stride = step,
                    .channel_stride = 1,
                    .by_conv_group = false},
           dense, output);
  return output;
}

Tensor prune_nm_matmul_unsupported(const Tensor& input, const Tensor& dense, const SettingsAlong<-1>& settings) {
  validate(input, dense, settings);
  refuse_device(kOp, input);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("_prune_nm_matmul", SDGP_BOX(&sdgp::prune_nm_matmul_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_prune_nm_matmul", SDGP_BOX(&sdgp::prune_nm_matmul_unsupported));
}
