// SPDX-License-Identifier: BSD-3-Clause
//
// Loads a TorchScript model that calls torch.ops.sdgp.prune_nm, and runs it on the input that was saved with it.
#include <sdgp/build_info.h>
#include <torch/script.h>

#include <iostream>

int main(int, char** argv) {
  torch::jit::Module model = torch::jit::load(argv[1]);
  const at::Tensor output = model.forward({model.attr("input")}).toTensor();
  const at::Tensor expected = model.attr("expected").toTensor();
  std::cout << sdgp_version() << '\n';
  if (at::equal(output, expected)) return 0;
  std::cerr << "expected\n" << expected << "\ngot\n" << output << '\n';
  return 1;
}
