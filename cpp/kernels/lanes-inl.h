// SPDX-License-Identifier: BSD-3-Clause
//
// The lanes (vec-inl.h) of each element type. Each type has one entry here. Compiled once per instruction set.
#pragma once

#include "pruning.h"
#include "vec-inl.h"

namespace sdgp::SDGP_ISA {

// The lanes of a stored type: one lane type for computation, and one for methods that only compare magnitudes.
template <DType kDType>
struct LaneTypes;
template <>
struct LaneTypes<DType::kFloat32> {
  using Computed = Float32;
  using Compared = Float32;
};
template <>
struct LaneTypes<DType::kFloat64> {
  using Computed = Float64;
  using Compared = Float64;
};
template <>
struct LaneTypes<DType::kFloat16> {
  using Computed = Float16;
  using Compared = Bits16<0x3c00>;
};
template <>
struct LaneTypes<DType::kBFloat16> {
  using Computed = BFloat16;
  using Compared = Bits16<0x3f80>;
};
template <DType kDType>
using LanesOf = typename LaneTypes<kDType>::Computed;
template <DType kDType, Method kMethod>
using LanesFor =
    std::conditional_t<kMethod == Method::kMagnitude, typename LaneTypes<kDType>::Compared, LanesOf<kDType>>;

// The integer type that moves an element without a conversion.
template <int kBytes>
using Word = std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;
template <DType kDType>
using WordOf = Word<sizeof(typename LanesOf<kDType>::T)>;

}  // namespace sdgp::SDGP_ISA
