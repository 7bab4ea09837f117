// SPDX-License-Identifier: BSD-3-Clause
//
// How the row kernel (row_kernel-inl.h) multiplies: one kept value at a time, or pairs of bfloat16 values. This decides
// in which form the kept values and the dense operand are packed. Compiled once per instruction set.
//
// Note [Pairs]
// AVX512-BF16 multiplies and adds two pairs of bfloat16 values per lane. So two kept values of a row are broadcast
// together, and the two rows of the dense block that their offsets give are interleaved. The interleaving mixes columns
// within 128 bits. InPairs::arrange stores each 32 columns such that the mixed order is the natural one.
// Limits, in cycles for 16 columns x 2 kept values on Zen 4: 4/3 for multiplications and interleaving; OneByOne
// takes 2. Packed data has half the size.
#pragma once

#include "lanes-inl.h"
#include "visit.h"

namespace sdgp::SDGP_ISA {

SDGP_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SDGP_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// One kept value at a time. E: the type of the sums and of all packed data.
template <class E>
struct OneByOne {
  using Sum = E;
  using Packed = E;
  using Panels = Values<1, 2, 3, 4, 5, 6, 7, 8>;  // widths of a panel, in vectors of sums
  static constexpr bool kPairs = false;
  static constexpr int kStep = 1;     // kept values that are multiplied together
  static constexpr int kVectors = 1;  // a panel is a multiple of this

  // Adds the products of kStep kept values with kP vectors of columns, for each tap.
  template <int kP, class Offset, int... kI>
  static SDGP_INLINE void multiply(Vec<E>* sum, const E* value, const Offset* offset, const char* dense,
                                   int64_t tap_bytes, std::integer_sequence<int, kI...>) {
    const char* row = dense + *offset;
    const Vec<E> x = splat(*value);
    ((sum[kI] = multiply_add(
          x, load_bits<Vec<E>>(row + kI / kP * tap_bytes + kI % kP * static_cast<int>(sizeof(Vec<E>))), sum[kI])),
     ...);
  }
};

#if defined(__AVX512F__)
// The instructions of InPairs. The functions that it is inlined into need this, too. In those of OneByOne, which also
// run on CPUs without these instructions, the compiler never emits them: they take bfloat16.
#define SDGP_PAIRS __attribute__((target("avx512bf16")))

// Pairs of bfloat16 values, see Note [Pairs].
struct InPairs {
  using Sum = float;
  using Packed = uint16_t;
  using Panels = Values<2, 4, 6, 8>;
  static constexpr bool kPairs = true;
  static constexpr int kStep = 2;
  static constexpr int kVectors = 2;

  template <int kP, class Offset, int... kI>
  SDGP_PAIRS static SDGP_INLINE void multiply(Vec<float>* sum, const uint16_t* value, const Offset* offset,
                                              const char* dense, int64_t tap_bytes, std::integer_sequence<int, kI...>) {
    const __m512i pair = _mm512_set1_epi32(load_bits<int32_t>(value));
    ((sum[kI] = add<kI % 2>(sum[kI], pair, row_at<kP, kI>(dense + offset[0], tap_bytes),
                            row_at<kP, kI>(dense + offset[1], tap_bytes))),
     ...);
  }

  // Does the same for a single value, the last one of an odd number.
  template <int kP, class Offset, int... kI>
  SDGP_PAIRS static SDGP_INLINE void multiply_last(Vec<float>* sum, const uint16_t* value, const Offset* offset,
                                                   const char* dense, int64_t tap_bytes,
                                                   std::integer_sequence<int, kI...>) {
    const __m512i pair = _mm512_set1_epi32(*value);
    ((sum[kI] = add<kI % 2>(sum[kI], pair, row_at<kP, kI>(dense + offset[0], tap_bytes), _mm512_setzero_si512())), ...);
  }

  // Returns 32 columns in the order in which they are stored.
  static SDGP_INLINE Vec<uint16_t> arrange(Vec<uint16_t> columns) {
    return (Vec<uint16_t>)_mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), (__m512i)columns);
  }

 private:
  template <int kP, int kI>
  static SDGP_INLINE __m512i row_at(const char* row, int64_t tap_bytes) {
    return load_bits<__m512i>(row + kI / kP * tap_bytes + kI % kP / 2 * kVectorBytes);
  }

  template <bool kUpper>
  SDGP_PAIRS static SDGP_INLINE Vec<float> add(Vec<float> sum, __m512i pair, __m512i first, __m512i second) {
    const __m512i columns = kUpper ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)columns);
  }
};

// The lanes of bfloat16 where InPairs multiplies.
struct PairedBFloat16 : BFloat16 {};
#else
#define SDGP_PAIRS
#endif

template <class C>
struct ArithmeticFor {
  using type = OneByOne<typename C::E>;
};
#if defined(__AVX512F__)
template <>
struct ArithmeticFor<PairedBFloat16> {
  using type = InPairs;
};
#endif
template <class C>
using ArithmeticOf = typename ArithmeticFor<C>::type;

// The lanes in which products of a type run. kPairs: this CPU multiplies pairs of bfloat16 values fast.
template <DType kDType, bool kPairs>
struct ProductLanesFor {
  using type = LanesOf<kDType>;
};
#if defined(__AVX512F__)
template <>
struct ProductLanesFor<DType::kBFloat16, true> {
  using type = PairedBFloat16;
};
#endif
template <DType kDType, bool kPairs>
using ProductLanes = typename ProductLanesFor<kDType, kPairs>::type;

template <class C>
SDGP_INLINE typename C::E load_element(const typename C::T* p) {
  if constexpr (sizeof(typename C::T) == sizeof(typename C::E)) {
    return *p;
  } else {
    typename C::T lanes[kLanes<typename C::E>] = {*p};
    return C::load(lanes)[0];
  }
}

template <class C>
SDGP_INLINE void store_element(typename C::T* p, typename C::E value) {
  if constexpr (sizeof(typename C::T) == sizeof(typename C::E)) {
    *p = value;
  } else {
    typename C::T lanes[kLanes<typename C::E>];
    C::store(lanes, C::round(splat<typename C::E>(value)));
    *p = lanes[0];
  }
}

template <class C>
SDGP_INLINE void store_elements(const typename C::E* from, typename C::T* to, int64_t count) {
  constexpr int kL = kLanes<typename C::E>;
  int64_t i = 0;
  for (; i + kL <= count; i += kL) C::store(to + i, C::round(load_bits<Vec<typename C::E>>(from + i)));
  for (; i < count; ++i) store_element<C>(to + i, from[i]);
}

// Packing: how lanes of type C become what ArithmeticOf<C> reads.
template <class C>
struct Packing {
  using T = typename C::T;
  using A = ArithmeticOf<C>;
  using Packed = typename A::Packed;
  static constexpr bool kMoved = sizeof(T) == sizeof(Packed);  // the bits of an element do not change
  static constexpr int kL = kLanes<Packed>;

  static SDGP_INLINE Packed element(const T* p) {
    if constexpr (kMoved) {
      return *p;
    } else {
      return load_element<C>(p);
    }
  }

  static SDGP_INLINE Vec<Packed> load(const T* p) {
    if constexpr (kMoved) {
      return load_bits<Vec<Packed>>(p);
    } else {
      return C::load(p);
    }
  }

  static SDGP_INLINE void elements(const T* from, Packed* to, int64_t count) {
    int64_t i = 0;
    for (; i + kL <= count; i += kL) store_bits(to + i, load(from + i));
    for (; i < count; ++i) to[i] = element(from + i);
  }

  // Stores the columns that follow each other in a dense row.
  static SDGP_INLINE void store_columns(Packed* to, Vec<Packed> columns) {
    if constexpr (A::kPairs) {
      store_bits(to, A::arrange(columns));
    } else {
      store_bits(to, columns);
    }
  }

  // Packs one row of the dense operand: `count` columns, and zeros up to `width`, a multiple of the lanes.
  static SDGP_INLINE void columns(const T* from, int64_t stride, int64_t count, Packed* to, int64_t width) {
    for (int64_t j = 0; j < width; j += kL, to += kL, from += kL * stride) {
      if (stride == 1 && count - j >= kL) {
        store_columns(to, load(from));
        continue;
      }
      Packed line[kL] = {};
      for (int64_t i = 0; i < kL && j + i < count; ++i) line[i] = element(from + i * stride);
      store_columns(to, load_bits<Vec<Packed>>(line));
    }
  }
};

}  // namespace sdgp::SDGP_ISA
