// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels of prune_nm and of rescale's factors, and the code that selects them for a call. Each dtype includes this
// file in its own source file, so that the dtypes compile in parallel.
#pragma once

#include "launch.cuh"
#include "rescale.cuh"

namespace sdgp::cuda {

template <class C, Method kMethod, int kM, Share kShare>
__global__ void __launch_bounds__(kThreads) prune_nm_kernel(const __grid_constant__ PruneParams params) {
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread < params.threads) prune_thread<C, kMethod, kM, kShare>(params, thread);
}

template <class C>
void launch_prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream) {
  PrunePlan plan = plan_prune(args);
  plan.params.seed = seed;
  plan.params.factors = factors;
  const uint64_t blocks = blocks_of(plan.params.threads);
  visit_prune<C>(plan, [&]<Method kMethod, int kM, Share kShare>(Constant<kMethod>, Constant<kM>, Constant<kShare>) {
    launch(&prune_nm_kernel<C, kMethod, kM, kShare>, blocks, kThreads, stream, plan.params);
  });
  check_launch("prune_nm");
}

template <class C, int kM>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const __grid_constant__ SumParams params) {
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp >= params.samples * params.stretches * params.tiles) return;  // whole warps return
  const WarpShare share(params, warp);
  LaneSums<C, kM> sums;
  sums.sum(params, share, lane);
  if (params.lanes != Lanes::kGroupsOfPosition) {
    const int used = params.lanes == Lanes::kGroupsOfRow ? 1 : kM;
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) {
      if (j >= used) continue;
      for (int other = kWarp / 2; other > 0; other /= 2) {
        sums.all[j] += __shfl_xor_sync(0xffffffffu, sums.all[j], other);
        sums.kept[j] += __shfl_xor_sync(0xffffffffu, sums.kept[j], other);
      }
    }
    if (lane != 0) return;
  }
  sums.store(params, share, lane);
}

template <class E>
__global__ void __launch_bounds__(kThreads) factors_kernel(const __grid_constant__ SumParams params) {
  const int64_t factor = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (factor < params.factors) find_factor<E>(params, factor);
}

template <class C>
void launch_rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream) {
  SumParams params = plan_sums(args);
  params.partial = partial;
  params.factor = factors;
  const auto warps = static_cast<uint64_t>(params.samples * params.stretches * params.tiles);
  visit_at_least(GroupSizes{}, args.pruning.m, [&]<int kM>(Constant<kM>) {
    launch(&partial_sums_kernel<C, kM>, blocks_of(warps * kWarp), kThreads, stream, params);
  });
  check_launch("rescale");
  launch(&factors_kernel<typename C::E>, blocks_of(static_cast<uint64_t>(params.factors)), kThreads, stream, params);
  check_launch("rescale");
}

}  // namespace sdgp::cuda
