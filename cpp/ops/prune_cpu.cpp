// SPDX-License-Identifier: BSD-3-Clause
#include "prune_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace sdgp {

uint64_t seed_on_cpu(const Tensor& input, const PruneCall& call, int64_t n, int64_t m,
                     const std::optional<Tensor>& seed) {
  if (!is_random(call.method) || n == m) return 0;
  return static_cast<uint64_t>(*(seed ? *seed : draw_seed(input)).const_data_ptr<int64_t>());
}

PruneArgs describe_prune_cpu(const Tensor& input, const Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                             const std::optional<Tensor>& seed) {
  PruneArgs args = describe_prune(input, output, call, n, m);
  args.seed = seed_on_cpu(input, call, n, m, seed);
  return args;
}

void prune_into(const Tensor& input, Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                const std::optional<Tensor>& seed, bool scale) {
  if (nothing_to_choose(input, output, n, m, scale)) return;
  PruneArgs args = describe_prune_cpu(input, output, call, n, m, seed);
  args.out = output.mutable_data_ptr();
  args.scale = scale;
  const Kernels& table = kernels();
  const int64_t units = table.prune_nm_units(args);
  torch::stable::parallel_for(0, units, grain_of(units, input.numel()),
                              [&](int64_t begin, int64_t end) { table.prune_nm(args, begin, end); });
}

}  // namespace sdgp
