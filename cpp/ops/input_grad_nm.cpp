// SPDX-License-Identifier: BSD-3-Clause
//
// _linear_input_grad_nm and _conv2d_input_grad_nm: the data gradient of a layer, its output gradient pruned on the way.
// Both describe themselves to the kernel as a convolution; a linear layer has 1 x 1 pixels and one tap.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "memory.h"
#include "multiply.h"
#include "prune_cpu.h"
#include "views.h"

namespace sdgp {
namespace {

PruneCall validate_gradient(const char* op, const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                            int64_t dim, std::string_view method, const std::optional<Tensor>& seed) {
  const PruneCall call = validate_prune(op, grad_output, n, m, dim, method, seed);
  check(call.method != Method::kRescale, op,
        ": expected a method that needs one group at a time, got rescale; prune by it, then call this by magnitude");
  check_strided(op, weight);
  check_same_dtype(op, grad_output, "weight", weight, "the gradient is");
  check_same_device(op, grad_output, "weight", weight);
  return call;
}

PruneCall validate_linear(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                          std::string_view method, const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "_linear_input_grad_nm";
  const PruneCall call = validate_gradient(kOp, grad_output, weight, n, m, -1, method, seed);
  check(weight.dim() == 2, kOp, ": expected weight (out, in), got ", name_of_shape(weight));
  check(grad_output.size(call.dim) == weight.size(0), kOp, ": expected grad_output (..., ", weight.size(0), "), got ",
        name_of_shape(grad_output));
  return call;
}

// What both share.
SpmmArgs describe(const PruneCall& call, int64_t n, int64_t m, const Tensor& weight, const Gradient& gradient) {
  SpmmArgs args{};
  args.gradient = &gradient;
  args.dtype = call.dtype;
  args.n = static_cast<int>(n);
  args.m = static_cast<int>(m);
  args.dense = weight.const_data_ptr();
  args.dense_row_stride = weight.stride(0);
  args.dense_col_stride = weight.stride(1);
  args.cols = weight.size(1);
  return args;
}

Tensor linear_input_grad_nm_cpu(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                                std::string_view method, const std::optional<Tensor>& seed) {
  const PruneCall call = validate_linear(grad_output, weight, n, m, method, seed);
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t d = 0; d < call.dim; ++d) {
    sizes.push_back(grad_output.size(d));
    rows *= grad_output.size(d);
  }
  sizes.push_back(weight.size(1));
  Tensor output = torch::stable::new_empty(grad_output, sizes);
  if (output.numel() == 0) return output;
  prefer_huge_pages(output);
  if (weight.size(0) == 0) return torch::stable::fill_(output, 0.0);
  const Tensor source = torch::stable::contiguous(grad_output);
  const Gradient gradient{.data = source.const_data_ptr(),
                          .method = call.method,
                          .seed = seed_on_cpu(source, call, n, m, seed),
                          .sample_stride = weight.size(0),
                          .pixel_stride = weight.size(0),
                          .channel_stride = 1,
                          .by_group = false};
  SpmmArgs args = describe(call, n, m, weight, gradient);
  args.out = output.mutable_data_ptr();
  args.size = weight.size(0);
  args.groups = 1;
  args.samples = rows;
  args.height = args.width = {1, 1, 1, 1, 0, 1};
  multiply("_linear_input_grad_nm", source, args);
  return output;
}

Tensor linear_input_grad_nm_unsupported(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                                        std::string_view method, const std::optional<Tensor>& seed) {
  validate_linear(grad_output, weight, n, m, method, seed);
  refuse_device("_linear_input_grad_nm", grad_output);
}

constexpr const char* kConvOp = "_conv2d_input_grad_nm";

int64_t pair_at(const char* name, const std::vector<int64_t>& pair, size_t at, int64_t least) {
  check(pair.size() == 2, kConvOp, ": expected ", name, " to be a pair, got ", pair.size(), " numbers");
  check(pair[at] >= least, kConvOp, ": expected ", name, " >= ", least, ", got ", pair[at]);
  return pair[at];
}

struct Window {
  const std::vector<int64_t>& input_size;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

PruneCall validate_conv2d(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                          std::string_view method, const std::optional<Tensor>& seed, const Window& window) {
  check(grad_output.dim() == 4, kConvOp, ": expected grad_output (N, C, H, W), got ", name_of_shape(grad_output));
  const PruneCall call = validate_gradient(kConvOp, grad_output, weight, n, m, 1, method, seed);
  check(weight.dim() == 4, kConvOp, ": expected weight (out, in / groups, kH, kW), got ", name_of_shape(weight));
  check(grad_output.size(1) == weight.size(0), kConvOp, ": expected grad_output (N, ", weight.size(0), ", H, W), got ",
        name_of_shape(grad_output));
  check(window.groups >= 1 && weight.size(0) % window.groups == 0, kConvOp, ": expected groups that divide ",
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

Tensor conv2d_input_grad_nm_cpu(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                                std::string_view method, const std::optional<Tensor>& seed,
                                const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                int64_t groups, bool channels_last) {
  const PruneCall call =
      validate_conv2d(grad_output, weight, n, m, method, seed, {input_size, stride, padding, dilation, groups});
  const int64_t samples = grad_output.size(0);
  const int64_t channels = weight.size(1) * groups;
  const std::vector<int64_t> sizes = channels_last ? std::vector{samples, input_size[0], input_size[1], channels}
                                                   : std::vector{samples, channels, input_size[0], input_size[1]};
  Tensor output = torch::stable::new_empty(grad_output, sizes);
  if (channels_last) output = movedim(output, -1, 1);
  if (output.numel() == 0) return output;
  prefer_huge_pages(output);
  if (grad_output.numel() == 0 || weight.numel() == 0) return torch::stable::fill_(output, 0.0);
  const Tensor source = has_pixel_stride(grad_output) ? grad_output : torch::stable::contiguous(grad_output);
  const int64_t size = weight.size(0) / groups;
  const Gradient gradient{.data = source.const_data_ptr(),
                          .method = call.method,
                          .seed = seed_on_cpu(source, call, n, m, seed),
                          .sample_stride = source.stride(0),
                          .pixel_stride = source.size(3) == 1 ? source.stride(2) : source.stride(3),
                          .channel_stride = source.stride(1),
                          .by_group = groups > 1 && size % m != 0};
  SpmmArgs args = describe(call, n, m, weight, gradient);
  args.dense_height_stride = weight.stride(2);
  args.dense_width_stride = weight.stride(3);
  args.out = output.mutable_data_ptr();
  args.out_channels_first = !channels_last;
  args.size = size;
  args.groups = groups;
  args.samples = samples;
  const auto axis = [&](size_t at) {
    const auto d = static_cast<int64_t>(2 + at);
    return Axis2d{input_size[at], grad_output.size(d), weight.size(d), stride[at], padding[at], dilation[at]};
  };
  args.height = axis(0);
  args.width = axis(1);
  multiply(kConvOp, source, args);
  return output;
}

Tensor conv2d_input_grad_nm_unsupported(const Tensor& grad_output, const Tensor& weight, int64_t n, int64_t m,
                                        std::string_view method, const std::optional<Tensor>& seed,
                                        const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        int64_t groups, bool) {
  validate_conv2d(grad_output, weight, n, m, method, seed, {input_size, stride, padding, dilation, groups});
  refuse_device(kConvOp, grad_output);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("_linear_input_grad_nm", TORCH_BOX(&sdgp::linear_input_grad_nm_cpu));
  library.impl("_conv2d_input_grad_nm", TORCH_BOX(&sdgp::conv2d_input_grad_nm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("_linear_input_grad_nm", TORCH_BOX(&sdgp::linear_input_grad_nm_unsupported));
  library.impl("_conv2d_input_grad_nm", TORCH_BOX(&sdgp::conv2d_input_grad_nm_unsupported));
}
