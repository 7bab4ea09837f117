// SPDX-License-Identifier: BSD-3-Clause
//
// Layers for C++ programs that train: linear and conv2d whose data gradient is pruned to N:M, and the modules Linear
// and Conv2d. The formulas are those of the Python package:
//
//   y = x W^T + b                  forward, exact
//   dx = prune_nm(dy, n, m) W      data gradient: at most n of every m output features stay
//   dW = dy^T x, db = sum dy       weight and bias gradient, exact
//
//   sdgp::Linear layer(torch::nn::LinearOptions(512, 2048), sdgp::PruningOptions("2:4").backend("pruned"));
//   layer->forward(x).sum().backward();
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/autograd.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/functional/conv.h>
#include <torch/nn/functional/padding.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include "sdgp/backends.h"

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
                "gradient of its own: use torch::nn::functional for this forward");
  }
};

// Calls `gradients` without recording; differentiating what it returns, through any of `sources`, is an error.
template <class Gradients>
variable_list once(const char* op, const variable_list& sources, const Gradients& gradients) {
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

inline void save(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const Pruning& pruning) {
  // Frozen weights keep no input.
  ctx->save_for_backward({weight.requires_grad() ? input : at::Tensor(), weight});
  ctx->saved_data["n"] = pruning.n;
  ctx->saved_data["m"] = pruning.m;
  ctx->saved_data["method"] = pruning.method;
  ctx->saved_data["backend"] = pruning.backend;
}

inline Pruning saved_pruning(AutogradContext* ctx) {
  return {ctx->saved_data["n"].toInt(), ctx->saved_data["m"].toInt(), ctx->saved_data["method"].toStringRef(),
          ctx->saved_data["backend"].toStringRef()};
}

// What a sparse product prunes, and by what: rescale's sums want all of the gradient, so it comes first, and of what it
// leaves magnitude keeps everything.
inline std::pair<at::Tensor, std::string> rescaled(const at::Tensor& grad, int64_t dim, const Pruning& pruning) {
  if (pruning.method != "rescale") return {grad, pruning.method};
  return {prune_nm(grad, pruning.n, pruning.m, dim, pruning.method), "magnitude"};
}

inline at::Tensor linear_input_grad(const at::Tensor& grad, const at::Tensor& weight, const Pruning& pruning) {
  static const auto op = find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                                         const std::optional<at::Tensor>&)>("sdgp::_prune_nm_matmul");
  const auto dense = [&] { return grad.matmul(weight); };
  const auto pruned = [&](const std::optional<at::Tensor>& seed) {
    return prune_nm(grad, pruning.n, pruning.m, -1, pruning.method, seed).matmul(weight);
  };
  const auto sparse = [&](const std::optional<at::Tensor>& seed) {
    const auto [rest, method] = rescaled(grad, -1, pruning);
    return op.call(rest, weight, pruning.n, pruning.m, method, seed_for(rest, method, seed));
  };
  Key key{"", {grad.numel(), weight.size(0), weight.size(1), weight.is_contiguous()}};
  return data_gradient("linear", pruning, grad, grad.numel() * weight.size(1), std::move(key), dense, pruned, sparse);
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Pruning& pruning) {
    save(ctx, input, weight, pruning);
    ctx->saved_data["has_bias"] = bias.has_value();
    return at::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &grad = grads[0], &input = saved[0], &weight = saved[1];
    return once("linear", {grad, weight, input}, [&] {
      const auto rows = [](const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); };
      variable_list found(4);
      if (ctx->needs_input_grad(0)) found[0] = linear_input_grad(grad, weight, saved_pruning(ctx));
      if (ctx->needs_input_grad(1)) found[1] = rows(grad).t().matmul(rows(input));
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

// Of `input`, shape and memory format count.
inline at::Tensor conv2d_input_grad(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                    const Window& window, const Pruning& pruning) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                      const std::optional<at::Tensor>&, c10::SymIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                      at::IntArrayRef, int64_t, bool)>("sdgp::_conv2d_input_grad_nm");
  // No pruning group crosses a group of the convolution.
  const int64_t channels = grad.size(1) / window.groups;
  const bool whole = window.groups == 1 || channels % pruning.m == 0;
  const at::Tensor by_group =
      whole ? grad : grad.reshape({grad.size(0) * window.groups, channels, grad.size(2), grad.size(3)});
  const auto multiply = [&](const at::Tensor& grad) {
    return convolution_backward(grad, input, weight, window, {true, false, false})[0];
  };
  const auto is_channels_last = [](const at::Tensor& x) {
    return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  };
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);  // as ATen decides
  const auto dense = [&] { return multiply(grad); };
  const auto pruned = [&](const std::optional<at::Tensor>& seed) {
    return multiply(prune_nm(by_group, pruning.n, pruning.m, 1, pruning.method, seed).reshape(grad.sizes()));
  };
  const auto sparse = [&](const std::optional<at::Tensor>& seed) {
    const auto [rest, method] = rescaled(by_group, 1, pruning);
    return op.call(rest.reshape(grad.sizes()), weight, pruning.n, pruning.m, method, seed_for(grad, method, seed),
                   c10::fromIntArrayRefSlow(input.sizes().slice(2)), window.stride, window.padding, window.dilation,
                   window.groups, channels_last);
  };
  const int64_t work = grad.numel() / window.groups * (input.size(1) * weight.size(2) * weight.size(3));
  Key key{"", {channels_last}};
  for (const at::IntArrayRef part : {input.sizes(), weight.sizes(), at::IntArrayRef(window.stride),
                                     at::IntArrayRef(window.padding), at::IntArrayRef(window.dilation)}) {
    key.second.insert(key.second.end(), part.begin(), part.end());
  }
  return data_gradient("conv2d", pruning, grad, work, std::move(key), dense, pruned, sparse);
}

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Window& window, const Pruning& pruning) {
    save(ctx, input, weight, pruning);
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
    return once("conv2d", {grad, weight, saved[0]}, [&] {
      at::Tensor input = saved[0];
      if (!input.defined()) {  // ATen reads its shape and memory format, not its values
        const bool last = data["channels_last"].toBool();
        input = at::empty(data["input_size"].toIntVector(), grad.options(),
                          last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
      }
      const bool needs_weight = ctx->needs_input_grad(1);
      const bool needs_bias = data["has_bias"].toBool() && ctx->needs_input_grad(2);
      variable_list found(5);
      if (needs_weight || needs_bias) {
        const auto exact = convolution_backward(grad, input, weight, window, {false, needs_weight, needs_bias});
        found[1] = exact[1];
        found[2] = exact[2];
      }
      if (ctx->needs_input_grad(0)) found[0] = conv2d_input_grad(grad, input, weight, window, saved_pruning(ctx));
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

inline bool has_data_gradient(const at::Tensor& input, const Pruning& pruning) {
  return input.requires_grad() && at::GradMode::is_enabled() && pruning.prunes();
}

inline at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                         const Pruning& pruning) {
  if (!has_data_gradient(input, pruning)) return at::linear(input, weight, if_defined(bias));
  const auto device = input.device().type();
  return LinearFunction::apply(autocast(input, device), autocast(weight, device), if_defined(autocast(bias, device)),
                               pruning);
}

inline at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const torch::nn::functional::Conv2dFuncOptions& options, const Pruning& pruning) {
  namespace F = torch::nn::functional;
  if (!has_data_gradient(input, pruning)) return F::conv2d(input, weight, options);
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

inline void print(std::ostream& stream, const PruningOptions& options) {
  stream << ", pattern=" << options.pattern() << ", method=" << options.method() << ", backend=" << options.backend();
}

}  // namespace detail

// torch::nn::functional::linear whose data gradient is taken from a pruned output gradient.
//
//   input (..., in), weight (out, in), bias (out) or undefined; returns (..., out), exactly what LibTorch returns
//
// Throws std::exception, "linear: requirement, got actual", and at a second differentiation.
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

// torch::nn::Linear through sdgp::linear: same parameters, names and initialization, so that an archive of the one is
// read by the other.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features, const PruningOptions& pruning = {})
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features), pruning) {}
  explicit LinearImpl(const torch::nn::LinearOptions& options, const PruningOptions& pruning = {})
      : options(options), pruning_(pruning), parsed_(detail::parse("Linear", pruning)) {
    LinearImpl::reset();
  }

  void reset() override {
    const torch::nn::LinearImpl dense(options);
    weight = register_parameter("weight", dense.weight);
    bias = register_parameter("bias", dense.bias, options.bias());
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "sdgp::Linear(in_features=" << options.in_features() << ", out_features=" << options.out_features()
           << ", bias=" << std::boolalpha << options.bias();
    detail::print(stream, pruning_);
    stream << ')';
  }

  at::Tensor forward(const at::Tensor& input) { return detail::linear(input, weight, bias, parsed_); }

  const PruningOptions& pruning() const { return pruning_; }

  torch::nn::LinearOptions options;
  at::Tensor weight;
  at::Tensor bias;

 private:
  PruningOptions pruning_;
  detail::Pruning parsed_;
};
TORCH_MODULE(Linear);

// torch::nn::Conv2d through sdgp::conv2d, every padding mode included.
class Conv2dImpl : public torch::nn::ConvNdImpl<2, Conv2dImpl> {
 public:
  Conv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size,
             const PruningOptions& pruning = {})
      : Conv2dImpl(torch::nn::Conv2dOptions(in_channels, out_channels, kernel_size), pruning) {}
  explicit Conv2dImpl(const torch::nn::Conv2dOptions& options, const PruningOptions& pruning = {})
      : ConvNdImpl(
            torch::nn::detail::ConvNdOptions<2>(options.in_channels(), options.out_channels(), options.kernel_size())
                .stride(options.stride())
                .padding(options.padding())
                .dilation(options.dilation())
                .groups(options.groups())
                .bias(options.bias())
                .padding_mode(options.padding_mode())),
        pruning_(pruning),
        parsed_(detail::parse("Conv2d", pruning)) {}

  void pretty_print(std::ostream& stream) const override {
    std::ostringstream dense;
    ConvNdImpl::pretty_print(dense);
    const std::string text = dense.str();  // torch::nn::Conv2d(...)
    stream << "sdgp" << text.substr(text.find("::Conv"), text.size() - text.find("::Conv") - 1);
    detail::print(stream, pruning_);
    stream << ')';
  }

  at::Tensor forward(const at::Tensor& input) {
    namespace F = torch::nn::functional;
    F::Conv2dFuncOptions call;
    call.bias(bias).stride(options.stride()).dilation(options.dilation()).groups(options.groups());
    if (std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode())) {
      return detail::conv2d(input, weight, call.padding(options.padding()), parsed_);
    }
    // What is not padded with zeros is padded beforehand.
    F::PadFuncOptions pad(_reversed_padding_repeated_twice);
    std::visit(c10::overloaded([](torch::enumtype::kZeros) {}, [&](auto mode) { pad.mode(mode); }),
               options.padding_mode());
    return detail::conv2d(F::pad(input, pad), weight, call, parsed_);
  }

  const PruningOptions& pruning() const { return pruning_; }

 private:
  PruningOptions pruning_;
  detail::Pruning parsed_;
};
TORCH_MODULE(Conv2d);

}  // namespace sdgp
