// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels of prune_nm and of rescale's factors, and which of them a call takes. Included once per dtype, so that
// they compile side by side.
#pragma once

#include "launch.cuh"
#include "rescale.cuh"

namespace sdgp::cuda {

template <class C, Method kMethod, int kM, int kV>
__global__ void __launch_bounds__(kThreads) prune_nm_kernel(const __grid_constant__ PruneParams params) {
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread < params.threads) prune_thread<C, kMethod, kM, kV>(params, thread);
}

template <class C, Method kMethod, int kM>
void launch_prune(const PrunePlan& plan, cudaStream_t stream) {
  const unsigned blocks = blocks_of(plan.params.threads);
  if constexpr (sizeof(typename C::Bits) == 2 && kM <= 16) {
    if (plan.rows_per_thread == 2) {
      prune_nm_kernel<C, kMethod, kM, 2><<<blocks, kThreads, 0, stream>>>(plan.params);
      return check_launch("prune_nm");
    }
  }
  prune_nm_kernel<C, kMethod, kM, 1><<<blocks, kThreads, 0, stream>>>(plan.params);
  check_launch("prune_nm");
}

template <class C>
void prune_nm_as(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream) {
  PrunePlan plan = plan_prune(args);
  plan.params.seed = seed;
  plan.params.factors = factors;
  const auto on = static_cast<cudaStream_t>(stream);
  with_compiled_size(args.m, [&](auto size) {
    constexpr int kM = decltype(size)::value;
    switch (args.method) {
      case Method::kMagnitude: return launch_prune<C, Method::kMagnitude, kM>(plan, on);
      case Method::kRandom: return launch_prune<C, Method::kRandom, kM>(plan, on);
      case Method::kRescale: return launch_prune<C, Method::kRescale, kM>(plan, on);
      case Method::kRescaleGroup: return launch_prune<C, Method::kRescaleGroup, kM>(plan, on);
      case Method::kMvue: return launch_prune<C, Method::kMvue, kM>(plan, on);
    }
  });
}

template <class C, int kM>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const __grid_constant__ SumParams params) {
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp >= params.samples * params.stretches * params.tiles) return;  // whole warps
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
void rescale_factors_as(const PruneArgs& args, void* partial, void* factors, void* stream) {
  SumParams params = plan_sums(args);
  params.partial = partial;
  params.factor = factors;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto warps = static_cast<uint64_t>(params.samples * params.stretches * params.tiles);
  with_compiled_size(args.m, [&](auto size) {
    partial_sums_kernel<C, decltype(size)::value><<<blocks_of(warps * kWarp), kThreads, 0, on>>>(params);
  });
  check_launch("rescale");
  factors_kernel<typename C::E><<<blocks_of(static_cast<uint64_t>(params.factors)), kThreads, 0, on>>>(params);
  check_launch("rescale");
}

}  // namespace sdgp::cuda
