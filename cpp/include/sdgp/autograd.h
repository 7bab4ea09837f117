// SPDX-License-Identifier: BSD-3-Clause
//
// linear and conv2d for C++ programs that train, their data gradient pruned to N:M; modules.h makes layers of them. The
// formulas are those of the Python package:
//
//   y = x W^T + b                  forward, exact
//   dx = prune_nm(dy, n, m) W      data gradient: at most n of every m output features stay
//   dW = dy^T x, db = sum dy       weight and bias gradient, exact
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/autograd.h>
#include <torch/nn/functional/conv.h>
#include <torch/nn/functional/padding.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "sdgp/options.h"

namespace sdgp {

namespace detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The identity on a gradient, hung on a tensor that requires one; its own gradient is refused.
struct Once : torch::autograd::Function<Once> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor&, const std::string& op) {
    ctx->saved_data["op"] = op;
    return grad.view_as(grad);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(),
                ": expected one differentiation, got a second (create_graph=true); the pruned data gradient has no "
                "gradient of its own: use backend=\"exact\" for this forward");
  }
};

// What `gradients` returns. Where it was `pruned` it is computed without recording, and differentiating it, through any
// of `sources`, is an error; else its own gradient is the exact one.
template <class Gradients>
variable_list once_if(bool pruned, const char* op, const variable_list& sources, const Gradients& gradients) {
  if (!pruned) return gradients();
  variable_list found;
  {
    const at::NoGradGuard exact;
    found = gradients();
  }
  if (!at::GradMode::is_enabled()) return found;
  for (const auto& anchor : sources) {
    if (!anchor.defined() || !anchor.requires_grad()) continue;
    for (auto& grad : found) grad = grad.defined() ? Once::apply(grad, anchor, std::string(op)) : grad;
    break;
  }
  return found;
}

inline void save(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const Settings& settings) {
  // Frozen weights keep no input.
  ctx->save_for_backward({weight.requires_grad() ? input : at::Tensor(), weight});
  ctx->saved_data["n"] = settings.n;
  ctx->saved_data["m"] = settings.m;
  ctx->saved_data["method"] = settings.method;
  ctx->saved_data["backend"] = settings.backend;
}

inline Settings saved_settings(AutogradContext* ctx) {
  return {ctx->saved_data["n"].toInt(), ctx->saved_data["m"].toInt(), ctx->saved_data["method"].toStringRef(),
          ctx->saved_data["backend"].toStringRef()};
}

// What a sparse product prunes, and by what: rescale's sums want all of the gradient, so it comes first, and of what it
// leaves magnitude keeps everything.
inline std::pair<at::Tensor, std::string> rescaled(const at::Tensor& grad, int64_t dim, const Settings& settings) {
  if (settings.method != "rescale") return {grad, settings.method};
  return {prune_nm(grad, settings.n, settings.m, dim, settings.method), "magnitude"};
}

inline at::Tensor linear_input_grad(const at::Tensor& grad, const at::Tensor& weight, const Settings& settings) {
  static const auto op = find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                                         const std::optional<at::Tensor>&)>("sdgp::_prune_nm_matmul");
  if (!settings.prunes()) return grad.matmul(weight);
  if (!takes_sparse_product("linear", settings, grad)) {
    return prune_nm(grad, settings.n, settings.m, -1, settings.method).matmul(weight);
  }
  const auto [rest, method] = rescaled(grad, -1, settings);
  return op.call(rest, weight, settings.n, settings.m, method, std::nullopt);
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Settings& settings) {
    save(ctx, input, weight, settings);
    ctx->saved_data["has_bias"] = bias.has_value();
    return at::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &grad = grads[0], &input = saved[0], &weight = saved[1];
    const Settings settings = saved_settings(ctx);
    const bool needs_input = ctx->needs_input_grad(0);
    return once_if(needs_input && settings.prunes(), "linear", {grad, weight, input}, [&] {
      const auto rows = [](const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); };
      variable_list found(4);
      if (needs_input) found[0] = linear_input_grad(grad, weight, settings);
      if (ctx->needs_input_grad(1)) {  // laid out as the weight, and by the product that ATen takes
        found[1] = weight.is_contiguous() ? rows(grad).t().matmul(rows(input)) : rows(input).t().matmul(rows(grad)).t();
      }
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) found[2] = rows(grad).sum(0);
      return found;
    });
  }
};

struct Window {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

inline std::array<at::Tensor, 3> convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                                                      const at::Tensor& weight, const Window& window,
                                                      std::array<bool, 3> mask) {
  const auto [grad_input, grad_weight, grad_bias] =
      at::convolution_backward(grad, input, weight, at::IntArrayRef{weight.size(0)}, window.stride, window.padding,
                               window.dilation, false, at::IntArrayRef{0, 0}, window.groups, mask);
  return {grad_input, grad_weight, grad_bias};
}

// The pruned one. Of `input`, shape and memory format count.
inline at::Tensor conv2d_input_grad(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                    const Window& window, const Settings& settings) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                      const std::optional<at::Tensor>&, c10::SymIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                      at::IntArrayRef, int64_t, bool)>("sdgp::_conv2d_input_grad_nm");
  const auto multiply = [&](const at::Tensor& pruned) {
    return convolution_backward(pruned, input, weight, window, {true, false, false})[0];
  };
  // No pruning group crosses a group of the convolution.
  const int64_t channels = grad.size(1) / window.groups;
  const bool whole = window.groups == 1 || channels % settings.m == 0;
  const at::Tensor by_group =
      whole ? grad : grad.reshape({grad.size(0) * window.groups, channels, grad.size(2), grad.size(3)});
  if (!takes_sparse_product("conv2d", settings, grad)) {
    return multiply(prune_nm(by_group, settings.n, settings.m, 1, settings.method).reshape(grad.sizes()));
  }
  const auto [rest, method] = rescaled(by_group, 1, settings);
  const auto is_channels_last = [](const at::Tensor& x) {
    return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  };
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);  // as ATen decides
  return op.call(rest.reshape(grad.sizes()), weight, settings.n, settings.m, method, std::nullopt,
                 c10::fromIntArrayRefSlow(input.sizes().slice(2)), window.stride, window.padding, window.dilation,
                 window.groups, channels_last);
}

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Window& window, const Settings& settings) {
    save(ctx, input, weight, settings);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["stride"] = window.stride;
    ctx->saved_data["padding"] = window.padding;
    ctx->saved_data["dilation"] = window.dilation;
    ctx->saved_data["groups"] = window.groups;
    ctx->saved_data["input_size"] = input.sizes().vec();
    ctx->saved_data["channels_last"] = input.is_contiguous(at::MemoryFormat::ChannelsLast);
    return at::conv2d(input, weight, bias, window.stride, window.padding, window.dilation, window.groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &grad = grads[0], &weight = saved[1];
    auto& data = ctx->saved_data;
    const Window window{data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
                        data["groups"].toInt()};
    const Settings settings = saved_settings(ctx);
    const bool needs_input = ctx->needs_input_grad(0), prunes = needs_input && settings.prunes();
    return once_if(prunes, "conv2d", {grad, weight, saved[0]}, [&] {
      at::Tensor input = saved[0];
      if (!input.defined()) {  // ATen reads its shape and memory format, not its values
        const bool last = data["channels_last"].toBool();
        input = at::empty(data["input_size"].toIntVector(), grad.options(),
                          last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
      }
      const bool needs_weight = ctx->needs_input_grad(1);
      const bool needs_bias = data["has_bias"].toBool() && ctx->needs_input_grad(2);
      variable_list found(5);
      const std::array exact = {needs_input && !prunes, needs_weight, needs_bias};
      if (exact[0] || exact[1] || exact[2]) {
        auto gradients = convolution_backward(grad, input, weight, window, exact);
        std::move(gradients.begin(), gradients.end(), found.begin());
      }
      if (prunes) found[0] = conv2d_input_grad(grad, input, weight, window, settings);
      return found;
    });
  }
};

// Casts as autocast would inside the operator: outside it, so that autograd casts the gradients back.
inline at::Tensor autocast(const at::Tensor& tensor, c10::DeviceType device) {
  const bool casts = device != at::kMeta && at::autocast::is_autocast_enabled(device) && tensor.defined() &&
                     tensor.is_floating_point() && tensor.scalar_type() != at::kDouble;
  return casts ? tensor.to(at::autocast::get_autocast_dtype(device)) : tensor;
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                         const Settings& settings) {
  const auto device = input.device().type();
  return LinearFunction::apply(autocast(input, device), autocast(weight, device), if_defined(autocast(bias, device)),
                               settings);
}

inline at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const torch::nn::functional::Conv2dFuncOptions& options, const Settings& settings) {
  namespace F = torch::nn::functional;
  at::Tensor batched = input.dim() == 4 ? input : input.unsqueeze(0);
  const auto numbers = [](const torch::ExpandingArray<2>& x) { return std::vector<int64_t>(x->begin(), x->end()); };
  Window window{numbers(options.stride()), {0, 0}, numbers(options.dilation()), options.groups()};
  if (const auto* padding = std::get_if<torch::ExpandingArray<2>>(&options.padding())) {
    window.padding = numbers(*padding);
  } else if (std::holds_alternative<torch::enumtype::kSame>(options.padding())) {
    TORCH_CHECK_VALUE(window.stride == std::vector<int64_t>({1, 1}),
                      "conv2d: expected stride 1 with padding=\"same\", got ", options.stride());
    const int64_t height = window.dilation[0] * (weight.size(2) - 1), width = window.dilation[1] * (weight.size(3) - 1);
    window.padding = {height / 2, width / 2};
    if (height % 2 || width % 2) batched = F::pad(batched, F::PadFuncOptions({0, width % 2, 0, height % 2}));
  }
  const auto device = input.device().type();
  const at::Tensor output = Conv2dFunction::apply(autocast(batched, device), autocast(weight, device),
                                                  if_defined(autocast(options.bias(), device)), window, settings);
  return input.dim() == 4 ? output : output.squeeze(0);
}

}  // namespace detail

// torch::nn::functional::linear whose data gradient is taken from a pruned output gradient.
//
//   input (..., in), weight (out, in), bias (out) or undefined; returns (..., out), exactly what LibTorch returns
//
// Throws std::exception, "linear: requirement, got actual", and at a second differentiation of what was pruned.
inline at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias = {},
                         const PruningOptions& pruning = {}) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && input.dim() >= 1 && input.size(-1) == weight.size(1),
                    "linear: expected input (..., in) and weight (out, in), got input ", input.sizes(), " and weight ",
                    weight.sizes());
  return detail::linear(input, weight, bias, detail::parse("linear", pruning));
}

// torch::nn::functional::conv2d whose data gradient is taken from a pruned output gradient. Groups of m are consecutive
// output channels of one pixel and never cross a group of the convolution.
//
//   input (N, C, H, W) or (C, H, W), weight (out, C / groups, kH, kW)
inline at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const torch::nn::functional::Conv2dFuncOptions& options = {},
                         const PruningOptions& pruning = {}) {
  TORCH_CHECK_VALUE((input.dim() == 3 || input.dim() == 4) && weight.dim() == 4 &&
                        input.size(-3) == weight.size(1) * options.groups(),
                    "conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / ", options.groups(),
                    ", kH, kW), got input ", input.sizes(), " and weight ", weight.sizes());
  return detail::conv2d(input, weight, options, detail::parse("conv2d", pruning));
}

}  // namespace sdgp
