// SPDX-License-Identifier: BSD-3-Clause
//
// What the CUDA kernels' threads compute, run on the host, thread after thread: the shared library that
// tests/test_cuda_on_host.py compares with the CPU's ops. Only the launches and the shuffles of a warp are not in here.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../../cuda/pack_24.cuh"
#include "../../cuda/rescale.cuh"

namespace sdgp::cuda {
namespace {

template <class Visit>
void with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(Float32{});
    case DType::kFloat64: return visit(Float64{});
    case DType::kFloat16: return visit(Float16{});
    case DType::kBFloat16: return visit(BFloat16{});
  }
}

template <class Visit>
void with_method(Method method, Visit visit) {
  switch (method) {
    case Method::kMagnitude: return visit(std::integral_constant<Method, Method::kMagnitude>{});
    case Method::kRandom: return visit(std::integral_constant<Method, Method::kRandom>{});
    case Method::kRescale: return visit(std::integral_constant<Method, Method::kRescale>{});
    case Method::kRescaleGroup: return visit(std::integral_constant<Method, Method::kRescaleGroup>{});
    case Method::kMvue: return visit(std::integral_constant<Method, Method::kMvue>{});
  }
}

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
  args.method = static_cast<Method>(method);
  args.scale = scale != 0;
  args.n = n;
  args.m = m;
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
  with_dtype(args.dtype, [&](auto type) {
    using C = decltype(type);
    with_compiled_size(m, [&](auto compiled) {
      constexpr int kM = decltype(compiled)::value;
      std::vector<typename C::E> factors;
      if (args.method == Method::kRescale) {
        SumParams sums = plan_sums(args);
        factors.resize(sums.factors);
        std::vector<typename C::E> partial(2 * sums.stretches * sums.factors);
        sums.partial = partial.data();
        sums.factor = factors.data();
        sum_warps<C, kM>(sums);
        for (int64_t f = 0; f < sums.factors; ++f) find_factor<typename C::E>(sums, f);
        plan.params.factors = factors.data();
      }
      with_method(args.method, [&](auto chosen) {
        for (uint64_t thread = 0; thread < plan.params.threads; ++thread) {
          if constexpr (sizeof(typename C::Bits) == 2) {
            if (plan.rows_per_thread == 2) {
              prune_thread<C, decltype(chosen)::value, kM, 2>(plan.params, thread);
              continue;
            }
          }
          prune_thread<C, decltype(chosen)::value, kM, 1>(plan.params, thread);
        }
      });
    });
  });
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
                      .method = static_cast<Method>(method),
                      .n = n,
                      .m = m,
                      .seed = &seed,
                      .layout = static_cast<Metadata>(layout),
                      .rows = rows,
                      .cols = cols,
                      .packed = packed};
  std::vector<uint8_t> nibbles(kTileRows * kTileQuads);
  const auto run = [&](auto type, auto chosen, auto size) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      for (int64_t col = 0; col < cols; col += kTileCols) {
        std::fill(nibbles.begin(), nibbles.end(), uint8_t{0xff});
        for (int thread = 0; thread < kTileThreads; ++thread) {
          pack_values<decltype(type), decltype(chosen)::value, decltype(size)::value>(args, row, col, thread,
                                                                                      nibbles.data());
        }
        for (int thread = 0; thread < kTileThreads; ++thread) pack_metadata(args, row, col, thread, nibbles.data());
      }
    }
  };
  const auto with_type = [&](auto chosen, auto size) {
    if (args.dtype == DType::kFloat16) return run(Float16{}, chosen, size);
    run(BFloat16{}, chosen, size);
  };
  const auto with_m = [&](auto chosen) {
    switch (m) {
      case 2: return with_type(chosen, std::integral_constant<int, 2>{});
      case 4: return with_type(chosen, std::integral_constant<int, 4>{});
      case 8: return with_type(chosen, std::integral_constant<int, 8>{});
      case 16: return with_type(chosen, std::integral_constant<int, 16>{});
      default: return with_type(chosen, std::integral_constant<int, 32>{});
    }
  };
  switch (args.method) {
    case Method::kRescale:
    case Method::kMagnitude: return with_m(std::integral_constant<Method, Method::kMagnitude>{});
    case Method::kRandom: return with_m(std::integral_constant<Method, Method::kRandom>{});
    case Method::kRescaleGroup: return with_m(std::integral_constant<Method, Method::kRescaleGroup>{});
    case Method::kMvue: return with_m(std::integral_constant<Method, Method::kMvue>{});
  }
}

}  // namespace sdgp::cuda
