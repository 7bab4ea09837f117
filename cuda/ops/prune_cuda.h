// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on CUDA for the ops that need it.
#pragma once

#include "../../cpp/ops/prune_args.h"

namespace sdgp {

// Returns the current stream of the input's device in the type that the kernels take.
void* current_stream(const Tensor& input);

// Returns the seed on the device, or null if the method draws nothing. `held` keeps the seed's tensor alive.
const int64_t* seed_on_device(const Tensor& input, const PruneCall& call, std::optional<Tensor>& held);

// Writes prune_nm of `input` to `output`. Both are on the current device.
void prune_into_cuda(const Tensor& input, Tensor& output, const PruneCall& call);

}  // namespace sdgp
