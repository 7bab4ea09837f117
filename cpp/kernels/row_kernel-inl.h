// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loops of a sparse product: one block of the dense operand, many result rows. Compiled once per instruction
// set.
//
// Note [Row kernel]
// A panel of kP vectors of a result row stays in registers while the kernel goes through the row's kept values. It
// broadcasts each kept value and multiplies it with the row of the dense block that its offset gives: one FMA with a
// memory operand per vector (InPairs: Note [Pairs]). The block (some taps x some reduction rows x the panel) must fit
// the L1 cache. So it is small, and many result rows use it before the next block; partial sums wait in the L2 cache.
// The limit is two loads per cycle; the broadcast adds one load to each kP.
#pragma once

#include "pack_dense-inl.h"

namespace sdgp::SDGP_ISA {

// The kept values of one block of the reduction in the form that the row kernel reads: one source after the other, with
// offsets instead of indices.
template <class Packed, class Offset = uint16_t>
struct KeptBlock {
  const Packed* values;
  const Offset* offsets;   // in bytes from the start of the tap's rows in the dense block
  int64_t count;           // of each source, if `starts` is null
  const uint32_t* starts;  // where the values of each source begin, and the end of the last one

  SDGP_INLINE int64_t start(int64_t source) const { return starts ? starts[source] : source * count; }
};

// A: how it multiplies, see arithmetic-inl.h.
template <class A>
struct BlockCall {
  using Sum = typename A::Sum;
  // Per result row that receives a sum: its number, then the N:M row that each tap reads, or -1 if there is none.
  const int32_t* entries;
  int64_t count;
  int64_t taps;
  KeptBlock<typename A::Packed> kept;
  const char* dense;
  int64_t tap_bytes;
  const Sum* in;  // partial sums
  int64_t in_stride;
  Sum* out;
  int64_t out_stride;
  const char* next;  // the next block, prefetched into the L2 cache during the call
  int64_t next_lines;
};

// Adds the products of the kept values from `value` to `end`. Returns where their offsets end.
template <class A, int kP, class Offset, class Indices>
SDGP_PAIRS SDGP_INLINE const Offset* multiply_kept(Vec<typename A::Sum>* sum, const typename A::Packed* value,
                                                   const typename A::Packed* end, const Offset* offset,
                                                   const char* dense, int64_t tap_bytes, Indices indices) {
  for (; value + A::kStep <= end; value += A::kStep, offset += A::kStep) {
    A::template multiply<kP>(sum, value, offset, dense, tap_bytes, indices);
  }
  if constexpr (A::kStep > 1) {
    if (value == end) return offset;
    A::template multiply_last<kP>(sum, value, offset, dense, tap_bytes, indices);
    ++offset;
  }
  return offset;
}

template <class A, int kP, bool kFirst, int... kI>
SDGP_PAIRS SDGP_INLINE void multiply_row(const BlockCall<A>& call, const int32_t* entry,
                                         std::integer_sequence<int, kI...> indices) {
  using Sum = typename A::Sum;
  constexpr int kL = kLanes<Sum>;
  const Sum* in = call.in + entry[0] * call.in_stride;
  // The pack expansions keep the array in registers. An array with any loop that is not unrolled would be on the stack.
  Vec<Sum> sum[kP] = {(kFirst ? Vec<Sum>{} : load_bits<Vec<Sum>>(in + kI * kL))...};
  const char* dense = call.dense;
  for (int64_t tap = 1; tap <= call.taps; ++tap, dense += call.tap_bytes) {
    if (entry[tap] < 0) continue;
    const int64_t start = call.kept.start(entry[tap]), end = call.kept.start(entry[tap] + 1);
    multiply_kept<A, kP>(sum, call.kept.values + start, call.kept.values + end, call.kept.offsets + start, dense, 0,
                         indices);
  }
  Sum* out = call.out + entry[0] * call.out_stride;
  ((store_bits(out + kI * kL, sum[kI])), ...);
}

template <class A, int kP, bool kFirst>
SDGP_PAIRS __attribute__((noinline)) void multiply_block(const BlockCall<A>& block) {
  constexpr auto kVectors = std::make_integer_sequence<int, kP>{};
  const BlockCall<A> call = block;  // a local copy: no store can alias it
  const int32_t* entry = call.entries;
  const char* next = call.next;
  for (int64_t i = 0; i < call.count; ++i, entry += 1 + call.taps) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_row<A, kP, kFirst>(call, entry, kVectors);
  }
}

template <class A>
void multiply_block_of(int64_t panel, bool first, const BlockCall<A>& call) {
  visit_at_least(typename A::Panels{}, panel, [&]<int kP>(Constant<kP>) {
    first ? multiply_block<A, kP, true>(call) : multiply_block<A, kP, false>(call);
  });
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
template <class A, class Offset>
struct TapsCall {
  using Sum = typename A::Sum;
  KeptBlock<typename A::Packed, Offset> kept;
  int64_t rows;
  const char* dense;  // for the first tap
  int64_t tap_bytes;
  const Sum* in;  // partial sums: (rows, taps, panel)
  int64_t in_stride;
  Sum* out;
  int64_t out_stride;
  Ahead* ahead;
  int64_t fetches;  // number of calls of ahead->fetch() meanwhile
};

template <class A, class Offset, int kP, bool kFirst, int... kI>
SDGP_PAIRS SDGP_INLINE const Offset* multiply_taps_row(const TapsCall<A, Offset>& call, const typename A::Packed* value,
                                                       const typename A::Packed* end, const Offset* offset,
                                                       const typename A::Sum* in, typename A::Sum* out,
                                                       std::integer_sequence<int, kI...> indices) {
  using Sum = typename A::Sum;
  Vec<Sum> sum[sizeof...(kI)] = {(kFirst ? Vec<Sum>{} : load_bits<Vec<Sum>>(in + kI * kLanes<Sum>))...};
  offset = multiply_kept<A, kP>(sum, value, end, offset, call.dense, call.tap_bytes, indices);
  ((store_bits(out + kI * kLanes<Sum>, sum[kI])), ...);
  return offset;
}

template <class A, class Offset, int kP, int kT, bool kFirst>
SDGP_PAIRS __attribute__((noinline)) void multiply_taps(const TapsCall<A, Offset>& block) {
  constexpr auto kSums = std::make_integer_sequence<int, kP * kT>{};
  const TapsCall<A, Offset> call = block;  // a copy: nothing that is stored can change it
  const auto* value = call.kept.values;
  const Offset* offset = call.kept.offsets;
  const auto* in = call.in;
  auto* out = call.out;
  int64_t row = 0;
  for (int64_t fetch = 1; fetch <= call.fetches; ++fetch) {
    call.ahead->fetch();
    for (const int64_t stop = call.rows * fetch / call.fetches; row < stop; ++row) {
      const auto* const end = call.kept.values + call.kept.start(row + 1);
      offset = multiply_taps_row<A, Offset, kP, kFirst>(call, value, end, offset, in, out, kSums);
      value = end;
      in += call.in_stride;
      out += call.out_stride;
    }
  }
}

constexpr int kMaxTaps = 3;                             // per call
constexpr int kMaxSums = kVectorBytes == 64 ? 24 : 12;  // of 32 or 16 registers

template <class A, class Offset>
void multiply_taps_of(int64_t panel, int64_t taps, bool first, const TapsCall<A, Offset>& call) {
  visit_at_least(Values<1, 2, 3>{}, taps, [&]<int kT>(Constant<kT>) {
    visit_at_least(typename A::Panels{}, panel, [&]<int kP>(Constant<kP>) {
      if constexpr (kP * kT <= kMaxSums) {
        first ? multiply_taps<A, Offset, kP, kT, true>(call) : multiply_taps<A, Offset, kP, kT, false>(call);
      }
    });
  });
}

}  // namespace sdgp::SDGP_ISA
