// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "launch.cuh"
#include "pack_24.cuh"

namespace sdgp::cuda {

// Packs one tile, with all threads of a block. kColumns: the columns of the matrix are contiguous, otherwise its rows.
template <class C, Method kMethod, int kM, bool kColumns>
__device__ void pack_tile(const PackArgs& args, int64_t tile_row, int64_t tile_col) {
  constexpr int kNibbles = kTileRows * kTileQuads / 2;
  SDGP_SHARED(uint8_t, nibbles, kNibbles);
  const int thread = static_cast<int>(threadIdx.x % kTileThreads);  // tells the compiler that it is not negative
  Pruning pruning = with_mixed_seed<kMethod>(args.pruning, args.seed);
  pruning.scale = false;  // an operand has no multipliers; the constant removes their code
  if constexpr (kColumns) {
    SDGP_SHARED(uint32_t, values, kTileRows* kSharedWords);
    with_constants<kM>(pruning, [&](const Pruning& mixed) {
      pack_columns<C, kMethod, kM>(args, mixed, tile_row, tile_col, thread, values, nibbles);
    });
    __syncthreads();
    store_values<typename C::Bits>(args, tile_row, tile_col, thread, values);
  } else {
    with_constants<kM>(pruning, [&](const Pruning& mixed) {
      pack_values<C, kMethod, kM>(args, mixed, tile_row, tile_col, thread, nibbles);
    });
    __syncthreads();
  }
  pack_metadata(args, tile_row, tile_col, thread, nibbles);
}

template <class C, Method kMethod, int kM, bool kColumns>
__global__ void __launch_bounds__(kTileThreads) pack_24_kernel(const __grid_constant__ PackArgs args) {
  const auto tiles_across = static_cast<unsigned>(args.cols / kTileCols);  // at most the number of blocks
  const int64_t tile_row = int64_t{blockIdx.x / tiles_across} * kTileRows;
  const int64_t tile_col = int64_t{blockIdx.x % tiles_across} * kTileCols;
  pack_tile<C, kMethod, kM, kColumns>(args, tile_row, tile_col);
}

template <class C>
void launch_pack_24(const PackArgs& args, void* stream) {
  const auto blocks = static_cast<uint64_t>(args.rows / kTileRows * (args.cols / kTileCols));
  visit_pack(args, [&]<Method kMethod, int kM>(Constant<kMethod>, Constant<kM>) {
    auto kernel = &pack_24_kernel<C, kMethod, kM, false>;
    if constexpr (packs_columns(kM)) {
      if (args.col_stride != 1) kernel = &pack_24_kernel<C, kMethod, kM, true>;
    }
    launch(kernel, blocks, kTileThreads, stream, args);
  });
  check_launch("pack_24");
}

}  // namespace sdgp::cuda
