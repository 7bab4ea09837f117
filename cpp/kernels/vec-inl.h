// SPDX-License-Identifier: BSD-3-Clause
//
// Fixed-width vectors based on the compiler's vector extensions (GCC, Clang), compiled once per instruction set inside
// namespace SDGP_ISA. The language has arithmetic, comparisons (-1 / 0 lanes) and `mask ? a : b`. This file adds load,
// store, 16-bit float conversions, "any lane" and the transpose of a tile.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SDGP_INLINE inline __attribute__((always_inline))

namespace sdgp::SDGP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(E));

template <class E, int kBytes = kVectorBytes>
struct VecType {
  typedef E type __attribute__((vector_size(kBytes)));
};
template <class E>
using Vec = typename VecType<E>::type;
using HalfVec = VecType<uint16_t, kVectorBytes / 2>::type;

template <class E>
SDGP_INLINE Vec<E> splat(E value) {
  return value - Vec<E>{};  // not `+`, because 0 + -0 is +0
}

template <class V>
SDGP_INLINE V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
SDGP_INLINE void store_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class M>
SDGP_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const auto bits = (Vec<uint64_t>)mask;
  return (bits[0] | bits[1]) != 0;
#endif
}

// Masked forms of x, of a + x (if the mask is true, or if it is false) and of count - 1. With AVX-512, a comparison
// returns a mask register, which the operation takes directly. Before AVX-512, it returns a vector for an `and`, whose
// lanes are all ones or zero.
#if defined(__AVX512F__)
template <class M, class V>
SDGP_INLINE V keep_if(M mask, V x) {
  return mask ? x : V{};
}
template <class M, class V>
SDGP_INLINE V add_if(M mask, V a, V x) {
  return mask ? a + x : a;
}
template <class M, class V>
SDGP_INLINE V add_unless(M mask, V a, V x) {
  return mask ? a : a + x;
}
template <class M, class V>
SDGP_INLINE V decrement_if(M mask, V count) {
  return mask ? count - 1 : count;
}
#else
template <class M, class V>
SDGP_INLINE V keep_if(M mask, V x) {
  return (V)((M)x & mask);
}
template <class M, class V>
SDGP_INLINE V add_if(M mask, V a, V x) {
  return a + keep_if(mask, x);
}
template <class M, class V>
SDGP_INLINE V add_unless(M mask, V a, V x) {
#if defined(__AVX2__)
  // GCC 12 turns `& ~mask` into a blend, which costs three times as much.
  return a + (V)_mm256_andnot_si256((__m256i)mask, (__m256i)x);
#else
  return a + (V)((M)x & ~mask);
#endif
}
template <class M, class V>
SDGP_INLINE V decrement_if(M mask, V count) {
  return count + (V)mask;
}
#endif

template <class V>
SDGP_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
SDGP_INLINE V vmin(V a, V b) {
  return a > b ? b : a;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// GCC 12 would make a blend here, too.
SDGP_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
#endif

// Returns the sum of each lane and all lanes before it.
template <class E>
SDGP_INLINE Vec<E> prefix_sums(Vec<E> v) {
  constexpr int kL = kLanes<E>;
  [&]<int... kStep>(std::integer_sequence<int, kStep...>) {
    const auto add = [&]<int kBy, int... kI>(std::integral_constant<int, kBy>, std::integer_sequence<int, kI...>)
                         __attribute__((always_inline)) {
                           if constexpr (kBy < kL)
                             v += __builtin_shufflevector(Vec<E>{}, v, (kI < kBy ? kI : kL + kI - kBy)...);
                         };
    (add(std::integral_constant<int, 1 << kStep>{}, std::make_integer_sequence<int, kL>{}), ...);
  }(std::make_integer_sequence<int, 4>{});
  return v;
}

// Adds the upper half of the lanes to the lower half until one lane is left.
template <class V>
SDGP_INLINE auto sum_lanes(V v) {
  constexpr int kN = sizeof(V) / sizeof(v[0]);
  if constexpr (kN == 2) {
    return v[0] + v[1];
  } else {
    return [&]<int... kI>(std::integer_sequence<int, kI...>) {
      return sum_lanes(__builtin_shufflevector(v, v, kI...) + __builtin_shufflevector(v, v, (kI + kN / 2)...));
    }(std::make_integer_sequence<int, kN / 2>{});
  }
}

// An intrinsic, because GCC 12 splits the conversion of a whole vector in two.
SDGP_INLINE Vec<uint32_t> widen(HalfVec h) {
#if defined(__AVX512F__)
  return (Vec<uint32_t>)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Vec<uint32_t>);
#endif
}

// Converts 32-bit lanes to 16-bit lanes. Values must be below 2^16.
SDGP_INLINE HalfVec narrow(Vec<uint32_t> v) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, HalfVec);
#endif
}

SDGP_INLINE Vec<float> float_from_bfloat16(HalfVec h) { return (Vec<float>)(widen(h) << 16); }

SDGP_INLINE HalfVec bfloat16_from_float(Vec<float> f) { return narrow((Vec<uint32_t>)f >> 16); }

// Rounds to nearest, ties to even. A NaN stays a NaN: every NaN here came from a bfloat16 or from an operation, so its
// low half is zero and the addition carries nothing into the upper half.
SDGP_INLINE Vec<float> round_to_bfloat16(Vec<float> f) {
  const auto bits = (Vec<uint32_t>)f;
  return (Vec<float>)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

SDGP_INLINE Vec<float> float_from_float16(HalfVec h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const Vec<uint32_t> bits = widen(h);
  const Vec<uint32_t> magnitude = bits & 0x7fff;
  // A float with these exponent and fraction bits is too small by a factor of 2^112. This is also true for subnormals.
  const auto scaled = (Vec<uint32_t>)((Vec<float>)(magnitude << 13) * 0x1p112f);
  // A signalling NaN becomes quiet, as in hardware: mvue and rescale_group order NaNs by their bits.
  const Vec<uint32_t> quiet = magnitude > 0x7c00 ? splat<uint32_t>(0x400000) : Vec<uint32_t>{};
  const Vec<uint32_t> special = (magnitude << 13) | 0x7f800000 | quiet;
  return (Vec<float>)((magnitude >= 0x7c00 ? special : scaled) | ((bits & 0x8000) << 16));
#endif
}

SDGP_INLINE HalfVec float16_from_float(Vec<float> f) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#else
  const auto bits = (Vec<uint32_t>)f;
  const Vec<uint32_t> magnitude = bits & 0x7fffffff;
  const Vec<uint32_t> normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 aligns the last place of a subnormal with the last bit of the sum, so the addition rounds.
  const Vec<uint32_t> subnormal = (Vec<uint32_t>)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  Vec<uint32_t> half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? splat<uint32_t>(0x7c00) : half;  // 65520 and above round to inf
  half = magnitude > 0x7f800000 ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : half;
  return narrow(half | ((bits >> 16) & 0x8000));
#endif
}

// How a stored type becomes lanes and back. E is the lane type. K is the signed integer of the same width, in which
// magnitudes are compared, and U is the unsigned one. A computed value is rounded before it is stored.
template <class Lane, class Signed, class Word>
struct Direct {
  using T = Lane;
  using E = Lane;
  using K = Signed;
  using U = Word;
  static constexpr E kOne = 1;
  static SDGP_INLINE Vec<E> load(const T* p) { return load_bits<Vec<E>>(p); }
  static SDGP_INLINE Vec<E> round(Vec<E> v) { return v; }
  static SDGP_INLINE void store(T* p, Vec<E> v) { store_bits(p, v); }
};
using Float32 = Direct<float, int32_t, uint32_t>;
using Float64 = Direct<double, int64_t, uint64_t>;

SDGP_INLINE Vec<float> unrounded(Vec<float> v) { return v; }

// A 16-bit float, widened to float lanes. kRound rounds first if kNarrow truncates.
template <Vec<float> (*kWiden)(HalfVec), HalfVec (*kNarrow)(Vec<float>), Vec<float> (*kRound)(Vec<float>)>
struct Widened {
  using T = uint16_t;
  using E = float;
  using K = int32_t;
  using U = uint32_t;
  static constexpr E kOne = 1;
  static SDGP_INLINE Vec<E> load(const T* p) { return kWiden(load_bits<HalfVec>(p)); }
  static SDGP_INLINE Vec<E> round(Vec<E> v) { return kRound(v); }
  static SDGP_INLINE void store(T* p, Vec<E> v) { store_bits(p, kNarrow(v)); }
};
using Float16 = Widened<&float_from_float16, &float16_from_float, &unrounded>;
using BFloat16 = Widened<&float_from_bfloat16, &bfloat16_from_float, &round_to_bfloat16>;

// A 16-bit float as its bits. This is enough for magnitude, with twice the lanes and no conversion.
template <int16_t kOneBits>
struct Bits16 {
  using T = uint16_t;
  using E = int16_t;
  using K = int16_t;
  using U = uint16_t;
  static constexpr E kOne = kOneBits;
  static SDGP_INLINE Vec<E> load(const T* p) { return load_bits<Vec<E>>(p); }
  static SDGP_INLINE void store(T* p, Vec<E> v) { store_bits(p, v); }
};

// Exchanges bit kBit of the vector index with bit kBit of the lane index. Afterwards `a` holds the elements whose lane
// bit was 0, and `b` those whose lane bit was 1.
template <class E, int kBit>
SDGP_INLINE void exchange(Vec<E>& a, Vec<E>& b) {
  constexpr int kBytes = static_cast<int>(sizeof(E)) << kBit;
  if constexpr (kBytes < 8) {
    using W = std::conditional_t<kBytes == 2, uint32_t, uint64_t>;
    constexpr int kShift = kBytes * 8;
    constexpr W kLow = (W{1} << kShift) - 1;
    const auto wa = (Vec<W>)a;
    const auto wb = (Vec<W>)b;
    a = (Vec<E>)((wa & kLow) | (wb << kShift));
    b = (Vec<E>)((wa >> kShift) | (wb & ~kLow));
  } else {
    using W = Vec<uint64_t>;
    constexpr int kStep = kBytes / 8;
    constexpr int kN = kLanes<uint64_t>;
    const auto wa = (W)a;
    const auto wb = (W)b;
    [&]<int... kI>(std::integer_sequence<int, kI...>) {
      a = (Vec<E>)__builtin_shufflevector(wa, wb, ((kI & kStep) ? kN + kI - kStep : kI)...);
      b = (Vec<E>)__builtin_shufflevector(wa, wb, ((kI & kStep) ? kN + kI : kI + kStep)...);
    }(std::make_integer_sequence<int, kN>{});
  }
}

// Transposes kN x kN squares of lanes across kN vectors. kN is a power of two and at most the number of lanes. The
// function is its own inverse.
template <class E, int kN, int kBit = 0>
SDGP_INLINE void transpose(Vec<E>* x) {
  if constexpr ((1 << kBit) < kN) {
#pragma GCC unroll 64
    for (int i = 0; i < kN; ++i) {
      if (!(i & (1 << kBit))) exchange<E, kBit>(x[i], x[i + (1 << kBit)]);
    }
    transpose<E, kN, kBit + 1>(x);
  }
}

// The vectors of lanes of type C: elements, signed integers (magnitudes and masks) and unsigned integers.
template <class C>
using Elem = Vec<typename C::E>;
template <class C>
using Key = Vec<typename C::K>;
template <class C>
using Unsigned = Vec<typename C::U>;

}  // namespace sdgp::SDGP_ISA
