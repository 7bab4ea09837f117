// SPDX-License-Identifier: BSD-3-Clause
//
// What the CUDA kernels' threads compute, run on the host, thread after thread: the shared library that
// tests/test_cuda_on_host.py compares with the CPU's ops. Only the launches and the shuffles of a warp are not in here.
#include <algorithm>
#include <vector>

#include "../../cuda/driver.h"
#include "../../cuda/kernels/pack_24.cuh"
#include "../../cuda/kernels/rescale.cuh"

namespace sdgp::cuda {
namespace {

template <class C, int kM>
void sum_warps(const SumParams& params) {
  const int64_t warps = params.samples * params.stretches * params.tiles;
  for (int64_t warp = 0; warp < warps; ++warp) {
    const WarpShare share(params, warp);
    std::vector<LaneSums<C, kM>> lanes(kWarp);
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane].sum(params, share, lane);
    if (params.lanes == Lanes::kGroupsOfPosition) {
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane].store(params, share, lane);
      continue;
    }
    for (int other = kWarp / 2; other > 0; other /= 2) {  // as the shuffles add them up
      for (int lane = 0; lane < other; ++lane) {
        for (int j = 0; j < kM; ++j) {
          lanes[lane].all[j] += lanes[lane + other].all[j];
          lanes[lane].kept[j] += lanes[lane + other].kept[j];
        }
      }
    }
    lanes[0].store(params, share, 0);
  }
}

// The factors of rescale.
template <class C>
std::vector<typename C::E> find_factors(const PruneArgs& args) {
  SumParams sums = plan_sums(args);
  std::vector<typename C::E> factors(sums.factors);
  std::vector<typename C::E> partial(2 * sums.stretches * sums.factors);
  sums.partial = partial.data();
  sums.factor = factors.data();
  visit_at_least(GroupSizes{}, args.pruning.m, [&]<int kM>(Constant<kM>) { sum_warps<C, kM>(sums); });
  for (int64_t f = 0; f < sums.factors; ++f) find_factor<typename C::E>(sums, f);
  return factors;
}

template <class C>
void prune(const PruneArgs& args, PrunePlan& plan) {
  std::vector<typename C::E> factors;
  if (args.pruning.method == Method::kRescale) factors = find_factors<C>(args);
  plan.params.factors = factors.data();
  visit_prune<C>(plan, [&]<Method kMethod, int kM, int kV>(Constant<kMethod>, Constant<kM>, Constant<kV>) {
    for (uint64_t thread = 0; thread < plan.params.threads; ++thread) {
      prune_thread<C, kMethod, kM, kV>(plan.params, thread);
    }
  });
}

template <class C, Method kMethod, int kM>
void pack(const PackArgs& args) {
  std::vector<uint8_t> nibbles(kTileRows * kTileQuads);
  for (int64_t row = 0; row < args.rows; row += kTileRows) {
    for (int64_t col = 0; col < args.cols; col += kTileCols) {
      std::fill(nibbles.begin(), nibbles.end(), uint8_t{0xff});
      for (int thread = 0; thread < kTileThreads; ++thread) {
        pack_values<C, kMethod, kM>(args, row, col, thread, nibbles.data());
      }
      for (int thread = 0; thread < kTileThreads; ++thread) pack_metadata(args, row, col, thread, nibbles.data());
    }
  }
}

}  // namespace

// `sizes`, `in_strides`, `out_strides`: of all dimensions but the pruned one, sorted and not merged; `flags`: has
// factors of its own.
extern "C" int prune_on_host(const void* in, void* out, int dtype, int method, int scale, int n, int m, int64_t seed,
                             int64_t size, int64_t in_stride, int64_t out_stride, int dim_per_factor, int ndim,
                             const int64_t* sizes, const int64_t* in_strides, const int64_t* out_strides,
                             const int64_t* row_steps, const int64_t* per_factor) {
  PruneArgs args{};
  args.in = in;
  args.out = out;
  args.dtype = static_cast<DType>(dtype);
  args.pruning = {.method = static_cast<Method>(method), .n = n, .m = m, .seed = 0, .scale = scale != 0};
  args.size = size;
  args.in_stride = in_stride;
  args.out_stride = out_stride;
  args.dim_per_factor = dim_per_factor != 0;
  args.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    args.dims[d] = {sizes[d], in_strides[d], out_strides[d], row_steps[d], per_factor[d] != 0};
  }
  PrunePlan plan = plan_prune(args);
  plan.params.seed = &seed;
  visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) { prune<ElementOf<kDType>>(args, plan); });
  return plan.rows_per_thread * 4 + plan.params.vector_in * 2 + plan.params.vector_out;  // which paths were taken
}

extern "C" void pack_on_host(const void* in, int64_t in_rows, int64_t in_cols, int64_t row_stride, int dtype,
                             int method, int n, int m, int64_t seed, int layout, int64_t rows, int64_t cols,
                             void* packed) {
  const PackArgs args{.in = in,
                      .in_rows = in_rows,
                      .in_cols = in_cols,
                      .row_stride = row_stride,
                      .dtype = static_cast<DType>(dtype),
                      .pruning = {.method = static_cast<Method>(method), .n = n, .m = m, .seed = 0, .scale = false},
                      .seed = &seed,
                      .layout = static_cast<Layout24>(layout),
                      .rows = rows,
                      .cols = cols,
                      .packed = packed};
  visit(PackedDTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    visit_pack(args, [&]<Method kMethod, int kM>(Constant<kMethod>, Constant<kM>) {
      pack<ElementOf<kDType>, kMethod, kM>(args);
    });
  });
}

extern "C" int driver_version_on_host() { return driver_version(); }

}  // namespace sdgp::cuda
