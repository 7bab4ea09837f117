// SPDX-License-Identifier: BSD-3-Clause
//
// Pruning on CUDA, for the ops that do.
#pragma once

#include "../../cpp/ops/prune_args.h"

namespace sdgp {

// The current stream of the input's device, as the kernels take it.
void* current_stream(const Tensor& input);

// The seed on the device, or null where nothing is drawn. `held` keeps a drawn one alive.
const int64_t* seed_on_device(const Tensor& input, const PruneCall& call, std::optional<Tensor>& held);

// prune_nm of `input` into `output`, of the current device.
void prune_into_cuda(const Tensor& input, Tensor& output, const PruneCall& call);

}  // namespace sdgp
