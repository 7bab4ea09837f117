// SPDX-License-Identifier: BSD-3-Clause
//
// What the CUDA kernels offer to the ops: no torch here, and no CUDA headers. Everything runs on `stream`, a
// cudaStream_t, of the current device; std::runtime_error where a launch fails.
#pragma once

#include <cstdint>

#include "../cpp/kernels/kernels.h"

namespace sdgp::cuda {

// `seed`: on the device, for methods that draw. `factors`: for rescale, from rescale_factors.
void prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream);

// How many elements rescale_factors wants: float32, or float64 for float64.
struct RescaleSizes {
  int64_t factors;
  int64_t partial;
};
RescaleSizes rescale_sizes(const PruneArgs& args);
void rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream);

// Layouts of a 2:4 operand's metadata, see metadata.cuh.
enum class Metadata { kCusparseLtSm80, kCusparseLtSm90, kCutlassSm80 };

constexpr int kTileRows = 128;  // an operand has whole tiles
constexpr int kTileCols = 64;

// A matrix of 16-bit floats whose rows are consecutive, and the operand that it becomes.
struct PackArgs {
  const void* in;
  int64_t in_rows;
  int64_t in_cols;
  int64_t row_stride;
  DType dtype;
  Method method;
  int n;
  int m;  // 2, 4, 8, 16 or 32
  const int64_t* seed;
  Metadata layout;
  int64_t rows;  // of the operand: whole tiles
  int64_t cols;
  void* packed;  // kept values (rows, cols / 2), then the metadata, rows x cols / 8 bytes
};
void pack_24(const PackArgs& args, void* stream);

// Whether pack_24 prunes to groups of m by itself.
constexpr bool packs(int64_t m) { return m == 2 || m == 4 || m == 8 || m == 16 || m == 32; }

}  // namespace sdgp::cuda
