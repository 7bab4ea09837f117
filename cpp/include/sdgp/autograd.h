// SPDX-License-Identifier: BSD-3-Clause
//
// linear and conv2d for C++ programs that train. They prune the data gradient to N:M and, on request, the weight
// gradient. The layers in modules.h use them. The formulas are those of the Python package:
//
//   y = x W^T + b                  forward: exact
//   dx = prune_nm(dy, n, m) W      data gradient: at most n of every m output features stay
//   dW = dy^T x                    weight gradient: exact by default
//   dW = prune_nm(dy^T, n, m) x    weight gradient on request: at most n of every m rows stay, for each output feature
//   db = sum dy                    bias gradient: exact
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

// Returns a pruned gradient and ties it to the tensors that it was computed from. A second differentiation throws.
struct Once : torch::autograd::Function<Once> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& pruned, const at::Tensor&, const at::Tensor&,
                            const std::string& op) {
    ctx->saved_data["op"] = op;
    return at::_unsafe_view(pruned, pruned.sizes());  // no view, so that callers may change it in place
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(),
                ": expected one differentiation, got a second (create_graph=true); a pruned gradient has no gradient "
                "of its own: use backend=\"exact\" for this forward");
  }
};

// Returns the pruned gradient that `product` computes from `grad` and `factor`. Autograd does not record the
// computation, and differentiating the result is an error.
template <class Product>
at::Tensor once(const char* op, const at::Tensor& grad, const at::Tensor& factor, const Product& product) {
  at::Tensor pruned;
  {
    const at::NoGradGuard unrecorded;
    pruned = product();
  }
  return at::GradMode::is_enabled() ? Once::apply(pruned, grad, factor, std::string(op)) : pruned;
}

inline c10::IValue to_ivalue(const Settings& settings) {
  return std::tuple(settings.n, settings.m, settings.method, settings.backend);
}

inline Settings to_settings(const c10::IValue& saved) {
  const auto& parts = saved.toTupleRef().elements();
  return {parts[0].toInt(), parts[1].toInt(), parts[2].toStringRef(), parts[3].toStringRef()};
}

inline void check_real(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor.is_complex(), op,
                    ": expected strided tensors of real numbers, got ", tensor.toString());
}

// Saves what the backward reads: an undefined `input` or `weight` is not read.
inline void save(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const Pruning& pruning) {
  ctx->save_for_backward({input, weight});
  ctx->saved_data["data"] = to_ivalue(pruning.data);
  ctx->saved_data["weight"] = to_ivalue(pruning.weight);
  ctx->set_materialize_grads(false);  // without an output gradient, the backward must give none, not zeros
}

// Returns an output gradient in the layout that kernels read.
inline at::Tensor strided(const at::Tensor& grad) { return grad.is_sparse() ? grad.to_dense() : grad; }

inline Pruning saved_pruning(AutogradContext* ctx) {
  return {to_settings(ctx->saved_data["data"]), to_settings(ctx->saved_data["weight"])};
}

// Returns the gradient that a sparse product prunes, and the method. The sums of rescale need the whole gradient, so
// rescale prunes first. The product then prunes by magnitude, which keeps everything that rescale kept.
inline std::pair<at::Tensor, std::string> rescaled(const at::Tensor& grad, int64_t dim, const Settings& settings) {
  if (settings.method != "rescale") return {grad, settings.method};
  return {prune_nm(grad, settings.n, settings.m, dim, settings.method), "magnitude"};
}

// Computes prune_nm(grad) factor. Pruning runs along the dimension that the product sums over.
inline at::Tensor prune_and_multiply(const at::Tensor& grad, const at::Tensor& factor, const Settings& settings) {
  static const auto op = find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                                         const std::optional<at::Tensor>&)>("sdgp::_prune_nm_matmul");
  if (!takes_sparse_product("linear", settings, grad)) {
    return prune_nm(grad, settings.n, settings.m, -1, settings.method).matmul(factor);
  }
  const auto [rest, method] = rescaled(grad, -1, settings);
  return op.call(rest, factor, settings.n, settings.m, method, std::nullopt);
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Pruning& pruning) {
    save(ctx, weight.requires_grad() ? input : at::Tensor(), input.requires_grad() ? weight : at::Tensor(), pruning);
    ctx->saved_data["contiguous"] = weight.is_contiguous();
    ctx->saved_data["bias_size"] = bias ? bias->sizes().vec() : std::vector<int64_t>{};
    const at::Tensor output = at::linear(input, weight, bias);
    // Autograd does not allow changes in place to a view of a tensor that a Function made.
    return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = strided(grads[0]), &input = saved[0], &weight = saved[1];
    const Pruning pruning = saved_pruning(ctx);
    const auto rows = [](const at::Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); };
    variable_list found(4);
    if (ctx->needs_input_grad(0)) {
      found[0] = !pruning.data.prunes()
                     ? grad.matmul(weight)
                     : once("linear", grad, weight, [&] { return prune_and_multiply(grad, weight, pruning.data); });
    }
    if (ctx->needs_input_grad(1)) {  // in the weight's memory layout
      const bool contiguous = ctx->saved_data["contiguous"].toBool();
      if (pruning.weight.prunes() && rows(grad).size(0) >= pruning.weight.m) {
        found[1] = once("linear", grad, input, [&] {
          const at::Tensor product = prune_and_multiply(rows(grad).t(), rows(input), pruning.weight);
          return contiguous ? product.contiguous() : product.t().contiguous().t();
        });
      } else {  // the same product as in ATen
        found[1] = contiguous ? rows(grad).t().matmul(rows(input)) : rows(input).t().matmul(rows(grad)).t();
      }
    }
    const std::vector<int64_t> bias_size = ctx->saved_data["bias_size"].toIntVector();
    if (!bias_size.empty() && ctx->needs_input_grad(2)) {  // at::linear broadcasts a bias of any shape
      found[2] = bias_size.size() == 1 ? rows(grad).sum(0) : grad.sum_to_size(bias_size);
    }
    return found;
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

enum Gradient : size_t { kData, kWeight };

// Returns the pruned data gradient or weight gradient. Only one of `input` and `weight` is multiplied. The other one
// gives only its shape and memory format.
inline at::Tensor conv2d_grad(Gradient which, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                              const Window& window, const Settings& settings) {
  using Op = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                        const std::optional<at::Tensor>&, c10::SymIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                        at::IntArrayRef, int64_t, bool);
  static const std::array ops = {find<Op>("sdgp::_conv2d_input_grad_nm"), find<Op>("sdgp::_conv2d_weight_grad_nm")};
  const int64_t dim = which == kData ? 1 : 2;
  at::Tensor by_group = grad;
  if (which == kWeight) {
    by_group = grad.flatten(2);  // groups run along the pixels
  } else if (const int64_t channels = grad.size(1) / window.groups; window.groups > 1 && channels % settings.m != 0) {
    // A pruning group must not cross a group of the convolution.
    by_group = grad.reshape({grad.size(0) * window.groups, channels, grad.size(2), grad.size(3)});
  }
  if (!takes_sparse_product("conv2d", settings, grad)) {
    const at::Tensor pruned = prune_nm(by_group, settings.n, settings.m, dim, settings.method).reshape(grad.sizes());
    return convolution_backward(pruned, input, weight, window, {which == kData, which == kWeight, false})[which];
  }
  const auto [rest, method] = rescaled(by_group, dim, settings);
  const auto is_channels_last = [](const at::Tensor& x) {
    return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  };
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);  // as in ATen, except for slices
  const auto& [factor, shaped] = which == kData ? std::tie(weight, input) : std::tie(input, weight);
  return ops[which].call(rest.reshape(grad.sizes()), factor, settings.n, settings.m, method, std::nullopt,
                         c10::fromIntArrayRefSlow(shaped.sizes().slice(2)), window.stride, window.padding,
                         window.dilation, window.groups, channels_last);
}

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Window& window, const Pruning& pruning) {
    save(ctx, weight.requires_grad() ? input : at::Tensor(), weight, pruning);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["stride"] = window.stride;
    ctx->saved_data["padding"] = window.padding;
    ctx->saved_data["dilation"] = window.dilation;
    ctx->saved_data["groups"] = window.groups;
    ctx->saved_data["input_size"] = input.sizes().vec();
    ctx->saved_data["input_stride"] = input.strides().vec();
    return at::conv2d(input, weight, bias, window.stride, window.padding, window.dilation, window.groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = strided(grads[0]), &weight = saved[1];
    auto& data = ctx->saved_data;
    const Window window{data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
                        data["groups"].toInt()};
    at::Tensor input = saved[0];
    if (!input.defined()) {  // ATen reads only its shape and memory format
      input = at::empty_strided(data["input_size"].toIntVector(), data["input_stride"].toIntVector(), grad.options());
    }
    const Pruning pruning = saved_pruning(ctx);
    const int64_t pixels = grad.size(2) * grad.size(3);
    const bool needs_input = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
    const bool needs_bias = data["has_bias"].toBool() && ctx->needs_input_grad(2);
    const bool prunes_data = needs_input && pruning.data.prunes();
    const bool prunes_weight = needs_weight && pruning.weight.prunes() && pixels >= pruning.weight.m;
    variable_list found(5);
    if (prunes_data) {
      found[0] =
          once("conv2d", grad, weight, [&] { return conv2d_grad(kData, grad, input, weight, window, pruning.data); });
    }
    if (prunes_weight) {
      found[1] = once("conv2d", grad, input,
                      [&] { return conv2d_grad(kWeight, grad, input, weight, window, pruning.weight); });
    }
    // One call computes all exact gradients. If it needs no weight gradient and another gradient is pruned, a sum gives
    // the bias gradient: oneDNN would compute the weight gradient too.
    std::array exact = {needs_input && !prunes_data, needs_weight && !prunes_weight, needs_bias};
    if (needs_bias && !exact[1] && (prunes_data || prunes_weight)) {
      found[2] = grad.sum(at::IntArrayRef{0, 2, 3});
      exact[2] = false;
    }
    if (exact[0] || exact[1] || exact[2]) {
      const auto gradients = convolution_backward(grad, input, weight, window, exact);
      for (size_t i = 0; i < exact.size(); ++i) {
        if (exact[i]) found[i] = gradients[i];
      }
    }
    return found;
  }
};

// Casts like autocast inside an operator. The cast happens outside it, so that autograd casts the gradients back.
inline at::Tensor autocast(const at::Tensor& tensor, c10::DeviceType device) {
  const bool casts = device != at::kMeta && at::autocast::is_autocast_enabled(device) && tensor.defined() &&
                     tensor.is_floating_point() && tensor.scalar_type() != at::kDouble;
  return casts ? tensor.to(at::autocast::get_autocast_dtype(device)) : tensor;
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                         const Pruning& pruning) {
  check_real("linear", input);
  check_real("linear", weight);
  const auto device = input.device().type();
  return LinearFunction::apply(autocast(input, device), autocast(weight, device), if_defined(autocast(bias, device)),
                               pruning);
}

inline void check_conv2d(const at::Tensor& input, const at::Tensor& weight, int64_t groups) {
  check_real("conv2d", input);
  check_real("conv2d", weight);
  TORCH_CHECK_VALUE(groups >= 1, "conv2d: expected groups >= 1, got ", groups);
  TORCH_CHECK_VALUE(
      (input.dim() == 3 || input.dim() == 4) && weight.dim() == 4 && input.size(-3) == weight.size(1) * groups,
      "conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / ", groups, ", kH, kW), got input ",
      input.sizes(), " and weight ", weight.sizes());
}

inline at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const torch::nn::functional::Conv2dFuncOptions& options, const Pruning& pruning) {
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
                                                  if_defined(autocast(options.bias(), device)), window, pruning);
  return input.dim() == 4 ? output : output.squeeze(0);
}

}  // namespace detail

// Computes torch::nn::functional::linear. The backward pass computes the data gradient and, on request, the weight
// gradient from a pruned output gradient.
//
//   input (..., in), weight (out, in), bias (out) or undefined
//
// Returns (..., out), exactly what LibTorch returns. Throws a std::exception ("linear: requirement, got actual") if an
// argument is wrong or if a pruned gradient is differentiated again.
inline at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias = {},
                         const PruningOptions& pruning = {}) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && input.dim() >= 1 && input.size(-1) == weight.size(1),
                    "linear: expected input (..., in) and weight (out, in), got input ", input.sizes(), " and weight ",
                    weight.sizes());
  return detail::linear(input, weight, bias, detail::parse("linear", pruning));
}

// Computes torch::nn::functional::conv2d. The backward pass computes the data gradient and, on request, the weight
// gradient from a pruned output gradient. For the data gradient, a group is m consecutive output channels of one pixel
// and never crosses a group of the convolution. For the weight gradient, a group is m consecutive output pixels, row by
// row, of one channel of one sample.
//
//   input (N, C, H, W) or (C, H, W), weight (out, C / groups, kH, kW)
//
// Returns (N, out, H', W') or (out, H', W'). Throws as linear does.
inline at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const torch::nn::functional::Conv2dFuncOptions& options = {},
                         const PruningOptions& pruning = {}) {
  detail::check_conv2d(input, weight, options.groups());
  return detail::conv2d(input, weight, options, detail::parse("conv2d", pruning));
}

}  // namespace sdgp
