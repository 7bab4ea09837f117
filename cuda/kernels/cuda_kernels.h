// SPDX-License-Identifier: BSD-3-Clause
//
// The functions that the CUDA kernels offer to the ops, without torch and without CUDA headers. Everything runs on
// `stream`, a cudaStream_t of the current device. The functions throw std::runtime_error if a launch fails.
#pragma once

#include <cstdint>

#include "../../cpp/kernels/args.h"
#include "../../cpp/kernels/layout_24.h"

namespace sdgp::cuda {

// `seed` is on the device, for methods that draw. `factors` is for rescale and comes from launch_rescale_factors.
void launch_prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream);

// The sizes in bytes of the buffers that launch_rescale_factors needs.
struct RescaleBytes {
  int64_t factors;
  int64_t partial;
};
RescaleBytes rescale_bytes(const PruneArgs& args);
void launch_rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream);

// Whether there is a kernel for matrices whose columns are contiguous, not their rows. The others must be copied first.
constexpr bool packs_columns(int m) { return m == 4; }

// A matrix of 16-bit floats, and the operand that it becomes. col_stride is 1 or, if packs_columns, row_stride may be.
struct PackArgs {
  const void* in;
  int64_t in_rows;
  int64_t in_cols;
  int64_t row_stride;
  int64_t col_stride;
  DType dtype;
  Pruning pruning;  // a method that works by group; m is one of PackedSizes
  const int64_t* seed;
  Layout24 layout;
  int64_t rows;  // of the operand, in whole tiles
  int64_t cols;
  void* packed;  // kept values (rows, cols / 2), then the metadata, rows x cols / 8 bytes
};
void launch_pack_24(const PackArgs& args, void* stream);

}  // namespace sdgp::cuda
