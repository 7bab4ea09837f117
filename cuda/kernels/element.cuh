// SPDX-License-Identifier: BSD-3-Clause
//
// Converts a stored element to a number and back. Bits is the stored word. E is the type for arithmetic. K is the
// integer type for magnitudes (Note [Magnitude order] in cpp/kernels/select_largest-inl.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cmath>

#include "../../cpp/kernels/pruning.h"
#include "host_device.cuh"

namespace sdgp::cuda {

template <class Word, class Number, Word kOneBits>
struct Direct {
  using Bits = Word;
  using E = Number;
  using K = Word;
  static constexpr Bits kOne = kOneBits;
  static SDGP_HOST_DEVICE E widen(Bits x) { return bits_of<E>(x); }
  static SDGP_HOST_DEVICE Bits narrow(E x) { return bits_of<Bits>(x); }
};
using Float32 = Direct<uint32_t, float, 0x3f800000u>;
using Float64 = Direct<uint64_t, double, 0x3ff0000000000000u>;

struct Float16 {
  using Bits = uint16_t;
  using E = float;
  using K = uint32_t;
  static constexpr Bits kOne = 0x3c00;
  static SDGP_HOST_DEVICE E widen_high(uint32_t word) { return widen(static_cast<Bits>(word >> 16)); }
#if defined(__CUDACC__)
  static SDGP_HOST_DEVICE E widen(Bits x) { return __half2float(__ushort_as_half(x)); }
  static SDGP_HOST_DEVICE Bits narrow(E x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  static E widen(Bits x) { return static_cast<E>(bits_of<_Float16>(x)); }
  static Bits narrow(E x) { return bits_of<Bits>(static_cast<_Float16>(x)); }
#endif
};

struct BFloat16 {
  using Bits = uint16_t;
  using E = float;
  using K = uint32_t;
  static constexpr Bits kOne = 0x3f80;
  static SDGP_HOST_DEVICE E widen(Bits x) { return bits_of<E>(static_cast<uint32_t>(x) << 16); }
  static SDGP_HOST_DEVICE E widen_high(uint32_t word) { return bits_of<E>(word & 0xffff0000u); }
#if defined(__CUDACC__)
  static SDGP_HOST_DEVICE Bits narrow(E x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
  static Bits narrow(E x) {  // rounds to nearest, ties to even
    const auto word = bits_of<uint32_t>(x);
    if (x != x) return static_cast<Bits>(word >> 16 | 0x40);
    return static_cast<Bits>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
#endif
};

template <DType kDType>
struct ElementType;
template <>
struct ElementType<DType::kFloat32> {
  using Type = Float32;
};
template <>
struct ElementType<DType::kFloat64> {
  using Type = Float64;
};
template <>
struct ElementType<DType::kFloat16> {
  using Type = Float16;
};
template <>
struct ElementType<DType::kBFloat16> {
  using Type = BFloat16;
};
template <DType kDType>
using ElementOf = typename ElementType<kDType>::Type;

template <class C>
SDGP_HOST_DEVICE typename C::Bits without_sign(typename C::Bits x) {
  constexpr int kSign = sizeof(x) * 8 - 1;
  return static_cast<typename C::Bits>(x & ~(typename C::Bits{1} << kSign));
}

template <class C>
SDGP_HOST_DEVICE typename C::E magnitude_of(typename C::Bits x) {
  const auto value = C::widen(x);
  if constexpr (sizeof value == 4) {
    return fabsf(value);  // costs no instruction on a GPU
  } else {
    return fabs(value);
  }
}

// Writes the magnitudes of the two 16-bit elements of a word.
template <class C>
SDGP_HOST_DEVICE void magnitudes_of(uint32_t word, typename C::E& low, typename C::E& high) {
  low = magnitude_of<C>(static_cast<typename C::Bits>(word));
  high = fabsf(C::widen_high(word));
}

// Rounds to the stored precision.
template <class C>
SDGP_HOST_DEVICE typename C::E rounded(typename C::E x) {
  return C::widen(C::narrow(x));
}

}  // namespace sdgp::cuda
