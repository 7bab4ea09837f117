// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "launch.cuh"
#include "pack_24.cuh"

namespace sdgp::cuda {

template <class C, Method kMethod, int kM>
__global__ void __launch_bounds__(kTileThreads) pack_24_kernel(const __grid_constant__ PackArgs args) {
  __shared__ uint8_t nibbles[kTileRows * kTileQuads];
  const int64_t tiles_across = args.cols / kTileCols;
  const int64_t tile_row = blockIdx.x / tiles_across * kTileRows;
  const int64_t tile_col = blockIdx.x % tiles_across * kTileCols;
  const int thread = static_cast<int>(threadIdx.x);
  pack_values<C, kMethod, kM>(args, tile_row, tile_col, thread, nibbles);
  __syncthreads();
  pack_metadata(args, tile_row, tile_col, thread, nibbles);
}

template <class C, Method kMethod>
void launch_pack(const PackArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(args.rows / kTileRows * (args.cols / kTileCols));
  switch (args.m) {
    case 2: pack_24_kernel<C, kMethod, 2><<<blocks, kTileThreads, 0, stream>>>(args); break;
    case 4: pack_24_kernel<C, kMethod, 4><<<blocks, kTileThreads, 0, stream>>>(args); break;
    case 8: pack_24_kernel<C, kMethod, 8><<<blocks, kTileThreads, 0, stream>>>(args); break;
    case 16: pack_24_kernel<C, kMethod, 16><<<blocks, kTileThreads, 0, stream>>>(args); break;
    default: pack_24_kernel<C, kMethod, 32><<<blocks, kTileThreads, 0, stream>>>(args); break;
  }
  check_launch("pack_24");
}

template <class C>
void pack_24_as(const PackArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.method) {
    case Method::kRescale:  // the op has pruned by it already
    case Method::kMagnitude: return launch_pack<C, Method::kMagnitude>(args, on);
    case Method::kRandom: return launch_pack<C, Method::kRandom>(args, on);
    case Method::kRescaleGroup: return launch_pack<C, Method::kRescaleGroup>(args, on);
    case Method::kMvue: return launch_pack<C, Method::kMvue>(args, on);
  }
}

}  // namespace sdgp::cuda
