// SPDX-License-Identifier: BSD-3-Clause
//
// _conv2d_weight_grad_nm computes the weight gradient of a convolution. It prunes the output gradient on the way, along
// the pixels of each sample, and does not unfold the input.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "conv2d.h"
#include "prune_cpu.h"
#include "views.h"
#include "weight_grad.h"

namespace sdgp {
namespace {

constexpr const char* kOp = "_conv2d_weight_grad_nm";

PruneCall validate(const Tensor& grad_output, const Tensor& input, const SettingsAlong<1>& settings,
                   const std::vector<int64_t>& kernel_size, const Window& window) {
  check(grad_output.dim() == 4, kOp, ": expected grad_output (N, C, H, W), got ", name_of_shape(grad_output));
  const PruneCall call = validate_product(kOp, {"the gradient is", "input"}, grad_output, input, settings);
  check(input.dim() == 4, kOp, ": expected input (N, C, H, W), got ", name_of_shape(input));
  check(input.size(0) == grad_output.size(0), kOp, ": expected input (", grad_output.size(0), ", C, H, W), got ",
        name_of_shape(input));
  check_pair(kOp, "kernel_size", kernel_size, 1);
  check_window(kOp, window, grad_output.size(1));
  check(input.size(1) % window.groups == 0, kOp, ": expected groups that divide ", input.size(1),
        " input channels, got ", window.groups);
  for (size_t at = 0; at < 2; ++at) {
    const auto d = static_cast<int64_t>(2 + at);
    const int64_t spare = input.size(d) + 2 * window.padding[at] - window.dilation[at] * (kernel_size[at] - 1) - 1;
    const int64_t expected = spare < 0 ? 0 : spare / window.stride[at] + 1;
    check(grad_output.size(d) == expected, kOp, ": expected grad_output of size ", expected, " in dimension ", d,
          ", got ", name_of_shape(grad_output));
  }
  return call;
}

Tensor conv2d_weight_grad_nm_cpu(const Tensor& grad_output, const Tensor& input, const SettingsAlong<1>& settings,
                                 const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                 int64_t groups, bool channels_last) {
  const PruneCall call = validate(grad_output, input, settings, kernel_size, {stride, padding, dilation, groups});
  const int64_t rows = grad_output.size(1), cols = input.size(1) / groups;
  const std::vector<int64_t> sizes = channels_last ? std::vector{rows, kernel_size[0], kernel_size[1], cols}
                                                   : std::vector{rows, cols, kernel_size[0], kernel_size[1]};
  Tensor output = torch::stable::new_empty(grad_output, sizes);
  if (channels_last) output = movedim(output, -1, 1);
  if (!prepare_output(output, grad_output.numel() > 0)) return output;
  const Tensor source = with_pixel_stride(grad_output);
  const auto axis = [&](size_t at) {
    const auto d = static_cast<int64_t>(2 + at);
    return Axis2d{input.size(d), grad_output.size(d), kernel_size[at], stride[at], padding[at], dilation[at]};
  };
  multiply(WeightProduct{.dtype = call.dtype,
                         .pruning = complete(grad_output, call),
                         .rows = rows / groups,
                         .cols = cols,
                         .samples = grad_output.size(0),
                         .groups = groups,
                         .height = axis(0),
                         .width = axis(1)},
           describe_gradient(source), input, output);
  return output;
}

Tensor conv2d_weight_grad_nm_unsupported(const Tensor& grad_output, const Tensor& input,
                                         const SettingsAlong<1>& settings, const std::vector<int64_t>& kernel_size,
                                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                         const std::vector<int64_t>& dilation, int64_t groups, bool) {
  validate(grad_output, input, settings, kernel_size, {stride, padding, dilation, groups});
  refuse_device(kOp, grad_output);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("_conv2d_weight_grad_nm", SDGP_BOX(&sdgp::conv2d_weight_grad_nm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_conv2d_weight_grad_nm", SDGP_BOX(&sdgp::conv2d_weight_grad_nm_unsupported));
}
