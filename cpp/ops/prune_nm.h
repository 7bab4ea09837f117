// SPDX-License-Identifier: BSD-3-Clause
//
// Checks the arguments of prune_nm and of _prune_nm_scale (it returns the multipliers) in the same way on every device.
#pragma once

#include "prune_args.h"

namespace sdgp {

template <bool kScale>
constexpr const char* kPruneNmName = kScale ? "_prune_nm_scale" : "prune_nm";

template <bool kScale>
PruneCall validate_prune_nm(const Tensor& input, const Settings& settings) {
  PruneCall call = validate_prune(kPruneNmName<kScale>, input, settings);
  call.pruning.scale = kScale;
  return call;
}

}  // namespace sdgp
