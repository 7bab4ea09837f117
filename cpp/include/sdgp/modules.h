// SPDX-License-Identifier: BSD-3-Clause
//
// torch::nn::Linear and torch::nn::Conv2d with a pruned data gradient and, on request, a pruned weight gradient.
//
//   sdgp::Linear layer(torch::nn::LinearOptions(512, 2048), sdgp::PruningOptions("2:4").method("mvue"));
//   layer->forward(x).sum().backward();
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <ostream>
#include <sstream>
#include <string>

#include "sdgp/autograd.h"

namespace sdgp {

namespace detail {

inline void print(std::ostream& stream, const PruningOptions& options) {
  stream << ", pattern=" << options.pattern() << ", method=" << options.method() << ", backend=" << options.backend();
  if (options.weight_grad() == PruningOptions().weight_grad()) return;
  stream << ", weight_grad=" << options.weight_grad() << ' ' << options.weight_grad_method();
}

}  // namespace detail

// Like torch::nn::Linear, but computes with sdgp::linear. Parameters, names and initialization are the same, so each of
// the two can read an archive of the other.
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

  void reset_parameters() {
    const at::NoGradGuard unrecorded;
    const torch::nn::LinearImpl plain(options);
    weight.copy_(plain.weight);
    if (bias.defined()) bias.copy_(plain.bias);
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

// Like torch::nn::Conv2d, but computes with sdgp::conv2d. Supports every padding mode.
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
    detail::check_conv2d(input, weight, options.groups());
    F::Conv2dFuncOptions call;
    call.bias(bias).stride(options.stride()).dilation(options.dilation()).groups(options.groups());
    if (std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode())) {
      return detail::conv2d(input, weight, call.padding(options.padding()), parsed_);
    }
    // The convolution pads only with zeros, so other padding modes are applied before it.
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
