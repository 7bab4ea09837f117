// SPDX-License-Identifier: BSD-3-Clause
//
// _conv2d_input_grad_nm computes the data gradient of a convolution. It prunes the output gradient on the way and does
// not unfold it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "conv2d.h"
#include "prune_cpu.h"
#include "views.h"

namespace sdgp {
namespace {

constexpr const char* kOp = "_conv2d_input_grad_nm";

PruneCall validate(const Tensor& grad_output, const Tensor& weight, const SettingsAlong<1>& settings,
                   const std::vector<int64_t>& input_size, const Window& window) {
  check(grad_output.dim() == 4, kOp, ": expected grad_output (N, C, H, W), got ", name_of_shape(grad_output));
  const PruneCall call = validate_product(kOp, {"the gradient is", "weight"}, grad_output, weight, settings);
  check(weight.dim() == 4, kOp, ": expected weight (out, in / groups, kH, kW), got ", name_of_shape(weight));
  check(grad_output.size(1) == weight.size(0), kOp, ": expected grad_output (N, ", weight.size(0), ", H, W), got ",
        name_of_shape(grad_output));
  check_pair(kOp, "input_size", input_size, 0);
  check_window(kOp, window, weight.size(0));
  return call;
}

Tensor conv2d_input_grad_nm_cpu(const Tensor& grad_output, const Tensor& weight, const SettingsAlong<1>& settings,
                                const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                int64_t groups, bool channels_last) {
  const PruneCall call = validate(grad_output, weight, settings, input_size, {stride, padding, dilation, groups});
  const int64_t samples = grad_output.size(0);
  const int64_t channels = weight.size(1) * groups;
  const std::vector<int64_t> sizes = channels_last ? std::vector{samples, input_size[0], input_size[1], channels}
                                                   : std::vector{samples, channels, input_size[0], input_size[1]};
  Tensor output = torch::stable::new_empty(grad_output, sizes);
  if (channels_last) output = movedim(output, -1, 1);
  if (!prepare_output(output, grad_output.numel() > 0 && weight.numel() > 0)) return output;
  const Tensor source = with_pixel_stride(grad_output);
  const auto axis = [&](size_t at) {
    const auto d = static_cast<int64_t>(2 + at);
    return Axis2d{input_size[at], grad_output.size(d), weight.size(d), stride[at], padding[at], dilation[at]};
  };
  multiply({.op = kOp,
            .dtype = call.dtype,
            .pruning = complete(grad_output, call),
            .samples = samples,
            .groups = groups,
            .height = axis(0),
            .width = axis(1),
            .channels_first = !channels_last},
           describe_gradient(source, groups > 1 && weight.size(0) / groups % call.pruning.m != 0), weight, output);
  return output;
}

Tensor conv2d_input_grad_nm_unsupported(const Tensor& grad_output, const Tensor& weight,
                                        const SettingsAlong<1>& settings, const std::vector<int64_t>& input_size,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, bool) {
  validate(grad_output, weight, settings, input_size, {stride, padding, dilation, groups});
  refuse_device(kOp, grad_output);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("_conv2d_input_grad_nm", SDGP_BOX(&sdgp::conv2d_input_grad_nm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_conv2d_input_grad_nm", SDGP_BOX(&sdgp::conv2d_input_grad_nm_unsupported));
}
