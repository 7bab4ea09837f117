// SPDX-License-Identifier: BSD-3-Clause
//
// Calls C++ layers for the Python tests: `layers CASE.pt...`. A case is a dictionary that torch.save wrote, with what
// to call and its arguments. Writes the output and gradients, or the error, to CASE.pt.result. Without arguments, shows
// the other features of the modules.
#include <sdgp/modules.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

using Dict = c10::Dict<c10::IValue, c10::IValue>;
using Result = std::vector<c10::IValue>;  // names and tensors alternate; Python can load a tuple as untrusted data

namespace {

c10::IValue load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
}

void save(const std::string& path, const c10::IValue& value) {
  const std::vector<char> bytes = torch::pickle_save(value);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

at::Tensor tensor(const Dict& of, const char* key) { return of.contains(key) ? of.at(key).toTensor() : at::Tensor(); }

sdgp::PruningOptions pruning(const Dict& of) {
  return sdgp::PruningOptions(of.at("pattern").toStringRef())
      .method(of.at("method").toStringRef())
      .backend(of.at("backend").toStringRef())
      .weight_grad(of.at("weight_grad").toStringRef())
      .weight_grad_method(of.at("weight_grad_method").toStringRef());
}

template <class Options>
Options window(Options options, const Dict& of) {
  const auto pair = [&](const char* key) {
    const at::Tensor numbers = of.at(key).toTensor();
    return std::vector<int64_t>{numbers[0].item<int64_t>(), numbers[1].item<int64_t>()};
  };
  options.stride(torch::ExpandingArray<2>(pair("stride"))).dilation(torch::ExpandingArray<2>(pair("dilation")));
  options.groups(of.at("groups").toInt());
  if (of.at("padding").isString()) {
    return of.at("padding").toStringRef() == "same" ? options.padding(torch::kSame) : options.padding(torch::kValid);
  }
  return options.padding(torch::ExpandingArray<2>(pair("padding")));
}

at::Tensor call(const Dict& of, const at::Tensor& weight, const at::Tensor& bias) {
  const std::string op = of.at("op").toStringRef();
  const at::Tensor input = of.at("input").toTensor();
  if (op == "linear") return sdgp::linear(input, weight, bias, pruning(of));
  namespace F = torch::nn::functional;
  return sdgp::conv2d(input, weight, window(F::Conv2dFuncOptions().bias(bias), of), pruning(of));
}

Result run(const Dict& of) {
  at::Tensor input = tensor(of, "input").requires_grad_();
  at::Tensor weight = tensor(of, "weight"), bias = tensor(of, "bias");
  weight.requires_grad_(!of.at("frozen").toBool());
  if (bias.defined()) bias.requires_grad_();
  if (of.at("autocast").toBool()) at::autocast::set_autocast_enabled(at::kCPU, true);
  torch::manual_seed(0);
  const at::Tensor output = call(of, weight, bias);
  output.mul_(1);  // as torch::nn, layers allow changes in place
  at::autocast::set_autocast_enabled(at::kCPU, false);
  const std::string twice = of.at("twice").toStringRef();  // the gradient to differentiate again, or empty
  output.backward(tensor(of, "grad_output"), /*retain_graph=*/{}, !twice.empty());
  if (!twice.empty()) (twice == "input" ? input : weight).grad().sum().backward();
  Result result = {"output", output.detach()};
  for (const auto& [name, leaf] : {std::pair("input", input), std::pair("weight", weight), std::pair("bias", bias)}) {
    if (leaf.defined() && leaf.grad().defined()) result.insert(result.end(), {name, leaf.grad().detach()});
  }
  return result;
}

// The identity, whose backward gives no gradient.
struct NoGradient : torch::autograd::Function<NoGradient> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x) { return x.clone(); }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
    return {at::Tensor()};
  }
};

// Says whether a backward without an output gradient leaves the leaves of a layer without gradients.
template <class Module>
void show_undefined(Module module, const at::Tensor& input) {
  const at::Tensor leaf = input.clone().requires_grad_();
  NoGradient::apply(module->forward(leaf)).sum().backward();
  const bool any = leaf.grad().defined() || module->weight.grad().defined() || module->bias.grad().defined();
  std::cout << (any ? "zeros" : "no gradients") << '\n';
}

// What torch::nn::Linear allows, too.
void show_unusual(const sdgp::PruningOptions& settings) {
  sdgp::Linear layer(torch::nn::LinearOptions(8, 8), settings);
  const at::Tensor x = torch::randn({8, 8}), grad = torch::eye(8).to_sparse();
  layer(x).backward(grad);
  const at::Tensor from_sparse = layer->weight.grad().clone();
  layer->zero_grad();
  layer(x).backward(grad.to_dense());
  std::cout << (from_sparse.equal(layer->weight.grad()) ? "sparse output gradient" : "another gradient") << '\n';

  const at::Tensor sum = layer(x).sum();
  {
    const at::NoGradGuard unrecorded;
    layer->weight.mul_(2);  // the input needs no gradient, so the backward does not read the weight
  }
  layer->zero_grad();
  sum.backward();
  const bool right = layer->weight.grad().allclose(x.sum(0).expand({8, 8}));
  const at::Tensor leaf = torch::randn({8, 8}, at::requires_grad());
  torch::autograd::grad({layer(leaf).sum()}, {leaf}, {}, true, true)[0].mul_(2);
  std::cout << (right ? "changed in place" : "another gradient") << '\n';

  try {
    sdgp::Conv2d(torch::nn::Conv2dOptions(1, 4, 3), settings)(torch::randn({6, 6}));
    std::cout << "took (6, 6)\n";
  } catch (const c10::ValueError&) {
    std::cout << "refused (6, 6)\n";
  }
  try {
    layer(x.to_sparse());
    std::cout << "took a sparse input\n";
  } catch (const c10::ValueError&) {
    std::cout << "refused a sparse input\n";
  }

  torch::manual_seed(0);
  const sdgp::Linear fresh(torch::nn::LinearOptions(8, 8), settings);
  torch::manual_seed(0);
  layer->reset_parameters();
  const bool alike = layer->weight.equal(fresh->weight) && layer->bias.equal(fresh->bias);
  std::cout << (alike ? "reset like a new layer" : "other parameters") << '\n';
}

// Shows the features of a module besides its forward: its text, its clone, and an archive that torch::nn reads.
template <class Module, class Dense>
void show(const Module& module, Dense dense) {
  const auto clone = std::dynamic_pointer_cast<typename Module::Impl>(module->clone());
  torch::serialize::OutputArchive out;
  module->save(out);
  std::stringstream bytes;
  out.save_to(bytes);
  torch::serialize::InputArchive in;
  in.load_from(bytes);
  dense->load(in);
  const bool same = dense->weight.equal(module->weight) && !clone->weight.is_same(module->weight) &&
                    clone->weight.equal(module->weight) && clone->pruning().method() == module->pruning().method();
  std::cout << module << (same ? " ok" : " differs") << '\n';
}

void show_modules() {
  const auto settings = sdgp::PruningOptions("1:4").method("rescale").backend("pruned");
  const auto linear = torch::nn::LinearOptions(8, 16).bias(false);
  const auto conv2d = torch::nn::Conv2dOptions(4, 8, 3).padding(1).padding_mode(torch::kReflect);
  show(sdgp::Linear(linear, settings), torch::nn::Linear(linear));
  show(sdgp::Conv2d(conv2d, sdgp::PruningOptions(settings).weight_grad("4:16").weight_grad_method("rescale")),
       torch::nn::Conv2d(conv2d));
  const at::Tensor x = torch::randn({2, 4, 6, 6});
  torch::manual_seed(0);
  sdgp::Conv2d pruned(conv2d, settings);
  torch::manual_seed(0);
  std::cout << (pruned(x).equal(torch::nn::Conv2d(conv2d)(x)) ? "reflected alike" : "reflected otherwise") << '\n';
  show_undefined(sdgp::Linear(torch::nn::LinearOptions(8, 16), settings), torch::randn({4, 8}));
  show_undefined(pruned, x);
  show_unusual(settings);
}

}  // namespace

int main(int count, char** paths) {
  if (count == 1) show_modules();
  for (int at = 1; at < count; ++at) {
    const std::string path = paths[at];
    try {
      save(path + ".result", c10::ivalue::Tuple::create(run(load(path).toGenericDict())));
    } catch (const c10::Error& error) {
      save(path + ".result", std::string(error.what_without_backtrace()));
    } catch (const std::exception& error) {
      save(path + ".result", std::string(error.what()));
    }
  }
}
