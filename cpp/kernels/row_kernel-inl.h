// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loops of a sparse product: one block of the dense operand, many result rows. Compiled once per instruction
// set.
//
// Note [Row kernel]
// A panel of kP vectors of a result row stays in registers while the kernel goes through the row's kept values. It
// broadcasts each kept value and multiplies it with the row of the dense block that its offset gives: one FMA with a
// memory operand per vector. The block (some taps x some reduction rows x the panel) must fit the L1 cache. So it is
// small, and many result rows use it before the next block; partial sums wait in the L2 cache. The limit is two loads
// per cycle; the broadcast adds one load to each kP.
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

// The kept values of one block of the reduction in the form that the row kernel reads: one source after the other, with
// offsets instead of indices.
template <class E, class Offset = uint16_t>
struct KeptBlock {
  const E* values;
  const Offset* offsets;   // in bytes from the start of the tap's rows in the dense block
  int64_t count;           // of each source, if `starts` is null
  const uint32_t* starts;  // where the values of each source begin, and the end of the last one

  SDGP_INLINE int64_t start(int64_t source) const { return starts ? starts[source] : source * count; }
};

template <class E>
struct BlockCall {
  // Per result row that receives a sum: its number, then the N:M row that each tap reads, or -1 if there is none.
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
  const char* next;  // the next block, prefetched into the L2 cache during the call
  int64_t next_lines;
};

template <class E, int kP, bool kFirst, int... kI>
SDGP_INLINE void multiply_row(const BlockCall<E>& call, const int32_t* entry, std::integer_sequence<int, kI...>) {
  constexpr int kL = kLanes<E>;
  const E* in = call.in + entry[0] * call.in_stride;
  // The pack expansions keep the array in registers. An array with any loop that is not unrolled would be on the stack.
  Vec<E> sum[kP] = {(kFirst ? Vec<E>{} : load_bits<Vec<E>>(in + kI * kL))...};
  const char* dense = call.dense;
  for (int64_t tap = 1; tap <= call.taps; ++tap, dense += call.tap_bytes) {
    if (entry[tap] < 0) continue;
    const int64_t start = call.kept.start(entry[tap]);
    const E* value = call.kept.values + start;
    const uint16_t* offset = call.kept.offsets + start;
    for (const E* const end = call.kept.values + call.kept.start(entry[tap] + 1); value != end; ++value, ++offset) {
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
  const BlockCall<E> call = block;  // a local copy: no store can alias it
  const int32_t* entry = call.entries;
  const char* next = call.next;
  for (int64_t i = 0; i < call.count; ++i, entry += 1 + call.taps) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_row<E, kP, kFirst>(call, entry, kVectors);
  }
}

// Memory that will be read next: strips, each of `pieces` pieces of `bytes` bytes that are `step` bytes apart.
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

  // Prefetches the next piece into the L2 cache.
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
// The tap kernel is used if every result row has its own kept values and all taps read all of them: for a plain
// product, which has one tap, and for a weight gradient. Each tap reads at its own fixed distance from the address that
// an offset gives. One broadcast serves kT taps x kP vectors, whose sums stay in registers.
template <class E, class Offset>
struct TapsCall {
  KeptBlock<E, Offset> kept;
  int64_t rows;
  const char* dense;  // for the first tap
  int64_t tap_bytes;
  const E* in;  // partial sums: (rows, taps, panel)
  int64_t in_stride;
  E* out;
  int64_t out_stride;
  Ahead* ahead;
  int64_t fetches;  // number of calls of ahead->fetch() meanwhile
};

template <class E, class Offset, int kP, int kT, bool kFirst, int... kI>
SDGP_INLINE void multiply_taps_row(const TapsCall<E, Offset>& call, const E* value, const E* end, const Offset* offset,
                                   const E* in, E* out, std::integer_sequence<int, kI...>) {
  Vec<E> sum[kP * kT] = {(kFirst ? Vec<E>{} : load_bits<Vec<E>>(in + kI * kLanes<E>))...};
  for (; value != end; ++value, ++offset) {
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
      const E* const end = call.kept.values + call.kept.start(row + 1);
      multiply_taps_row<E, Offset, kP, kT, kFirst>(call, value, end, offset, in, out, kSums);
      offset += end - value;
      value = end;
      in += call.in_stride;
      out += call.out_stride;
    }
  }
}

constexpr int kMaxTaps = 3;                             // per call
constexpr int kMaxSums = kVectorBytes == 64 ? 24 : 12;  // of 32 or 16 registers

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
