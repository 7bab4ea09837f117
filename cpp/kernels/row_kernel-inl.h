// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loops of a sparse product: one block of the dense operand, many result rows. Compiled once per instruction
// set.
//
// Note [Row kernel]
// A result row's panel of kP vectors stays in registers while the row's kept values pass: each is broadcast and
// multiplied with the row of the dense block that its offset names, one FMA with a memory operand per vector. The block
// (some taps x some reduction rows x the panel) must sit in the first-level cache, so it is small and many result
// rows pass before the next; partial sums wait in the second-level cache. Limits: two loads a cycle, one of which per
// kP is the broadcast's.
#pragma once

#include "pack_dense-inl.h"
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

// N:M rows of one block of the reduction, as the row kernel reads them: consecutive, with offsets for indices.
template <class E, class Offset = uint16_t>
struct KeptBlock {
  const E* values;        // (sources, count)
  const Offset* offsets;  // bytes from the beginning of the tap's rows in the dense block
  int64_t count;
};

template <class E>
struct BlockCall {
  // Per result row that has something to add: its number, then for each tap which N:M row it reads, -1: none.
  const int32_t* entries;
  int64_t count;
  int64_t taps;
  KeptBlock<E> kept;
  const char* dense;
  int64_t tap_bytes;
  const E* in;  // partial sums
  int64_t in_stride;
  E* out;
  int64_t out_stride;
  const char* next;  // the following block, fetched into the second-level cache meanwhile
  int64_t next_lines;
};

template <class E, int kP, bool kFirst, int... kI>
SDGP_INLINE void multiply_row(const BlockCall<E>& call, const int32_t* entry, std::integer_sequence<int, kI...>) {
  constexpr int kL = kLanes<E>;
  const E* in = call.in + entry[0] * call.in_stride;
  // An array that is not unrolled everywhere would live on the stack: hence the pack expansions.
  Vec<E> sum[kP] = {(kFirst ? Vec<E>{} : load_bits<Vec<E>>(in + kI * kL))...};
  const char* dense = call.dense;
  for (int64_t tap = 1; tap <= call.taps; ++tap, dense += call.tap_bytes) {
    if (entry[tap] < 0) continue;
    const E* value = call.kept.values + entry[tap] * call.kept.count;
    const uint16_t* offset = call.kept.offsets + entry[tap] * call.kept.count;
    for (const E* const end = value + call.kept.count; value != end; ++value, ++offset) {
      const char* row = dense + *offset;
      const Vec<E> x = splat(*value);
      ((sum[kI] = multiply_add(x, load_bits<Vec<E>>(row + kI * sizeof(Vec<E>)), sum[kI])), ...);
    }
  }
  E* out = call.out + entry[0] * call.out_stride;
  ((store_bits(out + kI * kL, sum[kI])), ...);
}

template <class E, int kP, bool kFirst>
__attribute__((noinline)) void multiply_block(const BlockCall<E>& block) {
  constexpr auto kVectors = std::make_integer_sequence<int, kP>{};
  const BlockCall<E> call = block;  // a copy: nothing that is stored can change it
  const int32_t* entry = call.entries;
  const char* next = call.next;
  for (int64_t i = 0; i < call.count; ++i, entry += 1 + call.taps) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_row<E, kP, kFirst>(call, entry, kVectors);
  }
}

// Memory that will be read next: some strips, each of `pieces` equally spaced pieces of `bytes`.
struct Ahead {
  const char* const* strips;
  int64_t count;
  int64_t pieces;
  int64_t step;
  int64_t bytes;
  int64_t fetched = 0;
  int64_t strip = 0;
  const char* next = count > 0 ? strips[0] : nullptr;

  int64_t total() const { return count * pieces; }

  // Fetches the next piece into the second-level cache.
  SDGP_INLINE void fetch() {
    if (strip >= count) return;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at, 0, 2);
    next += step;
    if (++fetched < pieces) return;
    fetched = 0;
    if (++strip < count) next = strips[strip];
  }
};

// Note [Tap kernel]
// Where all result rows are sums over kept values of their own, which all taps read, each at its own distance from
// where an offset leads: a plain product, which has one tap, and a weight gradient. One broadcast serves kT taps x kP
// vectors, whose sums stay in registers.
template <class E, class Offset>
struct TapsCall {
  KeptBlock<E, Offset> kept;
  int64_t rows;
  const char* dense;  // of the first tap
  int64_t tap_bytes;
  const E* in;  // partial sums: (rows, taps, panel)
  int64_t in_stride;
  E* out;
  int64_t out_stride;
  Ahead* ahead;
  int64_t fetches;  // meanwhile
};

template <class E, class Offset, int kP, int kT, bool kFirst, int... kI>
SDGP_INLINE void multiply_taps_row(const TapsCall<E, Offset>& call, const E* value, const Offset* offset, const E* in,
                                   E* out, std::integer_sequence<int, kI...>) {
  Vec<E> sum[kP * kT] = {(kFirst ? Vec<E>{} : load_bits<Vec<E>>(in + kI * kLanes<E>))...};
  for (const E* const end = value + call.kept.count; value != end; ++value, ++offset) {
    const char* row = call.dense + *offset;
    const Vec<E> x = splat(*value);
    ((sum[kI] = multiply_add(
          x, load_bits<Vec<E>>(row + kI / kP * call.tap_bytes + kI % kP * static_cast<int>(sizeof(Vec<E>))), sum[kI])),
     ...);
  }
  ((store_bits(out + kI * kLanes<E>, sum[kI])), ...);
}

template <class E, class Offset, int kP, int kT, bool kFirst>
__attribute__((noinline)) void multiply_taps(const TapsCall<E, Offset>& block) {
  constexpr auto kSums = std::make_integer_sequence<int, kP * kT>{};
  const TapsCall<E, Offset> call = block;  // a copy: nothing that is stored can change it
  const E* value = call.kept.values;
  const Offset* offset = call.kept.offsets;
  const E* in = call.in;
  E* out = call.out;
  int64_t row = 0;
  for (int64_t fetch = 1; fetch <= call.fetches; ++fetch) {
    call.ahead->fetch();
    for (const int64_t stop = call.rows * fetch / call.fetches; row < stop; ++row) {
      multiply_taps_row<E, Offset, kP, kT, kFirst>(call, value, offset, in, out, kSums);
      value += call.kept.count;
      offset += call.kept.count;
      in += call.in_stride;
      out += call.out_stride;
    }
  }
}

constexpr int kMaxTaps = 3;                             // in one call
constexpr int kMaxSums = kVectorBytes == 64 ? 24 : 12;  // of 32 registers, or 16

template <class E, class Offset>
void multiply_taps_of(int64_t panel, int64_t taps, bool first, const TapsCall<E, Offset>& call) {
  visit_at_least(Values<1, 2, 3>{}, taps, [&]<int kT>(Constant<kT>) {
    visit_at_least(Values<1, 2, 3, 4, 5, 6, 7, 8>{}, panel, [&]<int kP>(Constant<kP>) {
      if constexpr (kP * kT <= kMaxSums) {
        first ? multiply_taps<E, Offset, kP, kT, true>(call) : multiply_taps<E, Offset, kP, kT, false>(call);
      }
    });
  });
}

template <class E>
using BlockFunction = void (*)(const BlockCall<E>&);

template <class E, bool kFirst>
BlockFunction<E> block_function(int64_t panel) {
  return [&]<int... kI>(std::integer_sequence<int, kI...>) {
    constexpr BlockFunction<E> kFunctions[] = {&multiply_block<E, kI + 1, kFirst>...};
    return kFunctions[panel - 1];
  }(std::make_integer_sequence<int, kMaxPanel>{});
}

}  // namespace sdgp::SDGP_ISA
