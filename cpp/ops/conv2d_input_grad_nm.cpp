// SPDX-License-Identifier: BSD-3-Clause
//
// _conv2d_input_grad_nm: the data gradient of a convolution, its output gradient pruned on the way, nothing unfolded.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "multiply.h"
#include "prune_cpu.h"
#include "views.h"

namespace sdgp {
namespace {

constexpr const char* kOp = "_conv2d_input_grad_nm";

int64_t pair_at(const char* name, const std::vector<int64_t>& pair, size_t at, int64_t least) {
  check(pair.size() == 2, kOp, ": expected ", name, " to be a pair, got ", pair.size(), " numbers");
  check(pair[at] >= least, kOp, ": expected ", name, " >= ", least, ", got ", pair[at]);
  return pair[at];
}

struct Window {
  const std::vector<int64_t>& input_size;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

PruneCall validate(const Tensor& grad_output, const Tensor& weight, const SettingsAlong<1>& settings,
                   const Window& window) {
  check(grad_output.dim() == 4, kOp, ": expected grad_output (N, C, H, W), got ", name_of_shape(grad_output));
  const PruneCall call = validate_product(kOp, {"the gradient is", "weight"}, grad_output, weight, settings);
  check(weight.dim() == 4, kOp, ": expected weight (out, in / groups, kH, kW), got ", name_of_shape(weight));
  check(grad_output.size(1) == weight.size(0), kOp, ": expected grad_output (N, ", weight.size(0), ", H, W), got ",
        name_of_shape(grad_output));
  check(window.groups >= 1 && weight.size(0) % window.groups == 0, kOp, ": expected groups that divide ",
        weight.size(0), " output channels, got ", window.groups);
  for (size_t at = 0; at < 2; ++at) {
    pair_at("input_size", window.input_size, at, 0);
    pair_at("stride", window.stride, at, 1);
    pair_at("padding", window.padding, at, 0);
    pair_at("dilation", window.dilation, at, 1);
  }
  return call;
}

// Pixels of a sample are one step apart from each other.
bool has_pixel_stride(const Tensor& grad_output) {
  return grad_output.size(2) == 1 || grad_output.size(3) == 1 ||
         grad_output.stride(2) == grad_output.size(3) * grad_output.stride(3);
}

Tensor conv2d_input_grad_nm_cpu(const Tensor& grad_output, const Tensor& weight, const SettingsAlong<1>& settings,
                                const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                int64_t groups, bool channels_last) {
  const PruneCall call = validate(grad_output, weight, settings, {input_size, stride, padding, dilation, groups});
  const int64_t samples = grad_output.size(0);
  const int64_t channels = weight.size(1) * groups;
  const std::vector<int64_t> sizes = channels_last ? std::vector{samples, input_size[0], input_size[1], channels}
                                                   : std::vector{samples, channels, input_size[0], input_size[1]};
  Tensor output = torch::stable::new_empty(grad_output, sizes);
  if (channels_last) output = movedim(output, -1, 1);
  if (!begin_output(output, grad_output.numel() > 0 && weight.numel() > 0)) return output;
  const Tensor source = has_pixel_stride(grad_output) ? grad_output : torch::stable::contiguous(grad_output);
  const auto axis = [&](size_t at) {
    const auto d = static_cast<int64_t>(2 + at);
    return Axis2d{input_size[at], grad_output.size(d), weight.size(d), stride[at], padding[at], dilation[at]};
  };
  multiply({.op = kOp,
            .dtype = call.dtype,
            .pruning = read_seed(grad_output, call),
            .samples = samples,
            .groups = groups,
            .height = axis(0),
            .width = axis(1),
            .channels_first = !channels_last},
           Gradient{.data = source.const_data_ptr(),
                    .sample_stride = source.stride(0),
                    .pixel_stride = source.size(3) == 1 ? source.stride(2) : source.stride(3),
                    .channel_stride = source.stride(1),
                    .by_group = groups > 1 && weight.size(0) / groups % call.pruning.m != 0},
           weight, output);
  return output;
}

Tensor conv2d_input_grad_nm_unsupported(const Tensor& grad_output, const Tensor& weight,
                                        const SettingsAlong<1>& settings, const std::vector<int64_t>& input_size,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, bool) {
  validate(grad_output, weight, settings, {input_size, stride, padding, dilation, groups});
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
