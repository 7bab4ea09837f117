// SPDX-License-Identifier: BSD-3-Clause
//
// Runs a model that torch.export and AOTInductor compiled and that calls torch.ops.sdgp.prune_nm:
// run_aot_inductor MODEL.pt2 EXAMPLE.pt. EXAMPLE.pt is a scripted module with an input and the expected output.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <iostream>

int main(int, char** argv) {
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const torch::jit::Module example = torch::jit::load(argv[2]);
  const at::Tensor output = model.run({example.attr("input").toTensor()}).at(0);
  const at::Tensor expected = example.attr("expected").toTensor();
  if (at::allclose(output, expected)) return 0;
  std::cerr << "expected\n" << expected << "\ngot\n" << output << '\n';
  return 1;
}
