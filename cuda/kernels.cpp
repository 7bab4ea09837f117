// SPDX-License-Identifier: BSD-3-Clause
//
// Each kernel by dtype: every dtype's are compiled in a file of their own.
#include "kernels.h"

#include "element.cuh"
#include "rescale.cuh"

namespace sdgp::cuda {

template <class C>
void prune_nm_as(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream);
template <class C>
void rescale_factors_as(const PruneArgs& args, void* partial, void* factors, void* stream);
template <class C>
void pack_24_as(const PackArgs& args, void* stream);

void prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32: return prune_nm_as<Float32>(args, seed, factors, stream);
    case DType::kFloat64: return prune_nm_as<Float64>(args, seed, factors, stream);
    case DType::kFloat16: return prune_nm_as<Float16>(args, seed, factors, stream);
    case DType::kBFloat16: return prune_nm_as<BFloat16>(args, seed, factors, stream);
  }
}

RescaleSizes rescale_sizes(const PruneArgs& args) {
  const SumParams params = plan_sums(args);
  return {params.factors, 2 * params.stretches * params.factors};
}

void rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32: return rescale_factors_as<Float32>(args, partial, factors, stream);
    case DType::kFloat64: return rescale_factors_as<Float64>(args, partial, factors, stream);
    case DType::kFloat16: return rescale_factors_as<Float16>(args, partial, factors, stream);
    case DType::kBFloat16: return rescale_factors_as<BFloat16>(args, partial, factors, stream);
  }
}

void pack_24(const PackArgs& args, void* stream) {
  if (args.dtype == DType::kFloat16) return pack_24_as<Float16>(args, stream);
  pack_24_as<BFloat16>(args, stream);
}

}  // namespace sdgp::cuda
