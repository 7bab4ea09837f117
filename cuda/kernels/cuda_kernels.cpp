// SPDX-License-Identifier: BSD-3-Clause
//
// Calls each kernel for the dtype of its arguments. The kernels of each dtype are compiled in a separate file.
#include "cuda_kernels.h"

#include "element.cuh"
#include "rescale.cuh"

namespace sdgp::cuda {

template <class C>
void launch_prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream);
template <class C>
void launch_rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream);
template <class C>
void launch_pack_24(const PackArgs& args, void* stream);

void launch_prune_nm(const PruneArgs& args, const int64_t* seed, const void* factors, void* stream) {
  visit(DTypes{}, args.dtype,
        [&]<DType kDType>(Constant<kDType>) { launch_prune_nm<ElementOf<kDType>>(args, seed, factors, stream); });
}

RescaleBytes rescale_bytes(const PruneArgs& args) {
  const SumParams params = plan_sums(args);
  const int64_t size = traits(args.dtype).sum_size;
  return {params.factors * size, 2 * params.stretches * params.factors * size};
}

void launch_rescale_factors(const PruneArgs& args, void* partial, void* factors, void* stream) {
  visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) {
    launch_rescale_factors<ElementOf<kDType>>(args, partial, factors, stream);
  });
}

void launch_pack_24(const PackArgs& args, void* stream) {
  visit(PackedDTypes{}, args.dtype,
        [&]<DType kDType>(Constant<kDType>) { launch_pack_24<ElementOf<kDType>>(args, stream); });
}

}  // namespace sdgp::cuda
