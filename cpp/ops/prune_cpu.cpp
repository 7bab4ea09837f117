// SPDX-License-Identifier: BSD-3-Clause
#include "prune_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/table.h"

namespace sdgp {

Pruning read_seed(const Tensor& input, const PruneCall& call) {
  Pruning pruning = call.pruning;
  if (call.draws()) pruning.seed = static_cast<uint64_t>(*seed_of(input, call).const_data_ptr<int64_t>());
  return pruning;
}

void prune_into_cpu(const Tensor& input, Tensor& output, const PruneCall& call) {
  if (prune_trivially(input, output, call.pruning)) return;
  PruneArgs args = describe_prune(input, output, call);
  args.pruning = read_seed(input, call);
  args.out = output.mutable_data_ptr();
  const Kernels& table = kernels();
  const int64_t units = table.prune_nm_units(args);
  torch::stable::parallel_for(0, units, grain_of(units, input.numel()),
                              [&](int64_t begin, int64_t end) { table.prune_nm(args, begin, end); });
}

}  // namespace sdgp
