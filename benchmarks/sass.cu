// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels that sass.py counts: those of the library, with the settings of a usual call as constants, so that the
// compiler drops the code that such a call does not execute. A call keeps two of four 16-bit values, and the tensor is
// contiguous, in whole tiles.
#include "../cuda/kernels/pack_24_launch.cuh"
#include "../cuda/kernels/prune_nm_launch.cuh"

using namespace sdgp;
using namespace sdgp::cuda;

template <class C, Method kMethod>
__device__ void prune(PruneParams params) {
  params.pruning.n = 2;
  params.pruning.m = 4;
  params.pruning.scale = false;
  params.vector_in = params.vector_out = true;
  params.axes = 1;
  params.partial_axis = -1;
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread < params.threads) prune_thread<C, kMethod, 4, Share::kSpan>(params, thread);
}

template <class C, Method kMethod, bool kColumns>
__device__ void pack(PackArgs args) {
  args.pruning.n = 2;
  args.layout = Layout24::kCusparseLtSm90;
  args.in_rows = args.rows;
  args.in_cols = args.cols;
  const auto tiles_across = static_cast<unsigned>(args.cols / kTileCols);
  const int64_t tile_row = int64_t{blockIdx.x / tiles_across} * kTileRows;
  const int64_t tile_col = int64_t{blockIdx.x % tiles_across} * kTileCols;
  __builtin_assume(rows_lie_in_vectors(args));
  __builtin_assume(args.rows % kTileRows == 0 && args.cols % kTileCols == 0);
  __builtin_assume(tile_row + kTileRows <= args.rows && tile_col + kTileCols <= args.cols);
  pack_tile<C, kMethod, 4, kColumns>(args, tile_row, tile_col);
}

#define SDGP_COUNTED(name, call, Params) \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ Params params) { call(params); }

SDGP_COUNTED(prune_magnitude, (prune<BFloat16, Method::kMagnitude>), PruneParams)
SDGP_COUNTED(prune_mvue, (prune<BFloat16, Method::kMvue>), PruneParams)
SDGP_COUNTED(pack_magnitude, (pack<BFloat16, Method::kMagnitude, false>), PackArgs)
SDGP_COUNTED(pack_mvue, (pack<BFloat16, Method::kMvue, false>), PackArgs)
SDGP_COUNTED(pack_columns_magnitude, (pack<BFloat16, Method::kMagnitude, true>), PackArgs)
SDGP_COUNTED(pack_columns_mvue, (pack<BFloat16, Method::kMvue, true>), PackArgs)
