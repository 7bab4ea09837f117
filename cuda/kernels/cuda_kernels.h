// SPDX-License-Identifier: BSD-3-Clause
//
// What the CUDA kernels offer to the ops: no torch here, and no CUDA headers. Everything runs on `stream`, a
// cudaStream_t, of the current device; std::runtime_error where a launch fails.
#pragma once

#include <cstdint>

#include "../../cpp/kernels/args.h"
#include "../../cpp/kernels/layout_24.h"

namespace sdgp::cuda {

// `seed`: on the device, for methods that draw. `factors`: for rescale, from launch_rescale_factors.
void launch_prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream);

// The room that launch_rescale_factors wants, in bytes.
struct RescaleBytes {
  int64_t factors;
  int64_t partial;
};
RescaleBytes rescale_bytes(const PruneArgs& args);
void launch_rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream);

// A matrix of 16-bit floats whose rows are consecutive, and the operand that it becomes.
struct PackArgs {
  const void* in;
  int64_t in_rows;
  int64_t in_cols;
  int64_t row_stride;
  DType dtype;
  Pruning pruning;  // by group, m one of PackedSizes
  const int64_t* seed;
  Layout24 layout;
  int64_t rows;  // of the operand: whole tiles
  int64_t cols;
  void* packed;  // kept values (rows, cols / 2), then the metadata, rows x cols / 8 bytes
};
void launch_pack_24(const PackArgs& args, void* stream);

}  // namespace sdgp::cuda
