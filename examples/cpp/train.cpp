// SPDX-License-Identifier: BSD-3-Clause
//
// Trains a small network with pruned data and weight gradients: train DATA.pt METHOD WEIGHT_GRAD. WEIGHT_GRAD is the
// pattern of the weight gradients; 1:1 leaves them exact. DATA.pt is a dictionary that Python's torch.save wrote. It
// holds "images" (steps, batch, 3, 8, 8), "labels" (steps, batch) and the initial weights by name. The program prints
// the loss of each step. Finally it writes the weights as a tuple to DATA.pt.trained, for torch.load.
#include <sdgp/modules.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>

namespace nn = torch::nn;

struct Net : nn::Module {
  explicit Net(const sdgp::PruningOptions& pruning)
      : conv1(register_module("conv1", sdgp::Conv2d(nn::Conv2dOptions(3, 8, 3).padding(1), pruning))),
        conv2(register_module("conv2", sdgp::Conv2d(nn::Conv2dOptions(8, 16, 3).stride(2), pruning))),
        hidden(register_module("hidden", sdgp::Linear(16 * 3 * 3, 32, pruning))),
        head(register_module("head", nn::Linear(32, 10))) {}

  at::Tensor forward(const at::Tensor& images) {
    const at::Tensor features = conv2(conv1(images).relu()).relu();
    return head(hidden(features.flatten(1)).relu());
  }

  sdgp::Conv2d conv1, conv2;
  sdgp::Linear hidden;
  nn::Linear head;
};

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: train DATA.pt METHOD WEIGHT_GRAD\n";
    return 2;
  }
  const std::string path = argv[1];
  std::ifstream file(path, std::ios::binary);
  const auto data = torch::pickle_load({std::istreambuf_iterator<char>(file), {}}).toGenericDict();
  const at::Tensor images = data.at("images").toTensor(), labels = data.at("labels").toTensor();

  Net net(sdgp::PruningOptions("2:4").method(argv[2]).weight_grad(argv[3]).weight_grad_method(argv[2]));
  for (auto& weight : net.named_parameters()) weight.value().set_data(data.at(weight.key()).toTensor().clone());

  torch::optim::SGD optimizer(net.parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  torch::manual_seed(0);
  for (int64_t step = 0; step < images.size(0); ++step) {
    const at::Tensor loss = nn::functional::cross_entropy(net.forward(images[step]), labels[step]);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    std::cout << "step " << step << ": loss " << loss.item<float>() << '\n';
  }

  std::vector<c10::IValue> trained;
  for (const at::Tensor& weight : net.parameters()) trained.emplace_back(weight.detach());
  const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(trained));
  std::ofstream(path + ".trained", std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
