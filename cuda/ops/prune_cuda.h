// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on CUDA, for the ops that do.
#pragma once

#include "../../cpp/ops/prune_args.h"

namespace sdgp {

// The current stream of the input's device, as the kernels take it.
void* current_stream(const Tensor& input);

// The seed on the device, or null where the method draws nothing. `drawn` keeps a drawn one alive.
const int64_t* seed_pointer(const Tensor& input, const PruneCall& call, const std::optional<Tensor>& seed,
                            std::optional<Tensor>& drawn);

// prune_nm of `input` into `output`, of the current device.
void prune_into_cuda(const Tensor& input, Tensor& output, const PruneCall& call, int64_t n, int64_t m,
                     const std::optional<Tensor>& seed, bool scale);

}  // namespace sdgp
