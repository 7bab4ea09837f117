// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loop of sparse products in bfloat16 on CPUs with AVX512-BF16.
//
// Note [Permute kernel]
// Lanes are result rows. For one column of the dense operand, one register holds the values of a window of up to 32
// reduction rows and serves as a lookup table. Each lane has two kept values of its row as a pair of 16-bit floats, and
// their positions in the window as a pair of 16-bit indices. One vpermw looks up the values that the pairs of 16 rows
// are multiplied with; one vdpbf16ps multiplies and adds them. Sums stay in registers throughout a block of windows.
// Every pattern whose group fits a window runs at the same rate per kept value.
//
// Limits, in cycles for 16 lanes x 2 products:
//   Zen 4         4/3; the row kernel takes 2
//   Golden Cove   3, of which vdpbf16ps takes 2; the row kernel takes 1, so it is the better kernel on Intel
#pragma once

#include "plan-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int kTable = 32;         // maximum number of reduction rows of a window (16-bit elements of a register)
constexpr int kTableColumns = 16;  // columns whose sums stay in registers
constexpr int kWindowTableBytes = kTableColumns * kVectorBytes;  // tables of a window: [column][reduction row]
constexpr int kResident = 10;                                    // tables that also stay in registers
constexpr int kLaneRows = 16;                                    // result rows in a vector of sums
constexpr int kPairRows = 2 * kLaneRows;                         // result rows in a vector of 16-bit elements
constexpr int64_t kBlockWindows = 16;                            // windows whose tables stay in the L1 cache: 16 KiB

// The size of a window, and of what a result row keeps of it.
struct Window {
  int64_t size;   // reduction rows: as many whole groups as fit a table
  int64_t pairs;  // pairs of kept values
  int64_t bytes;  // per vector of rows: one vector of indices for each two pairs, then the pairs

  explicit Window(const Pruning& pruning)
      : size(kTable / pruning.m * pruning.m),
        pairs(ceil_div(kTable / pruning.m * pruning.n, 2)),
        bytes((pairs + ceil_div(pairs, 2)) * kVectorBytes) {}
};

// The layout of a chunk's kept values: [block of kBlockWindows windows][vector of rows][window][pairs and indices].
struct KeptLayout {
  int64_t windows;
  int64_t vectors;
  int64_t window_bytes;  // per vector of rows

  int64_t bytes() const { return windows * vectors * window_bytes; }
  // Returns the bytes of one vector of rows, for all windows of the block that contains `window`.
  int64_t vector_bytes(int64_t window) const {
    return at_most(windows - window / kBlockWindows * kBlockWindows, kBlockWindows) * window_bytes;
  }
  int64_t offset(int64_t window, int64_t vector) const {
    const int64_t first = window / kBlockWindows * kBlockWindows;
    return first * vectors * window_bytes + vector * vector_bytes(window) + (window - first) * window_bytes;
  }
};

// Returns whether 32 bits hold every position that is computed along the axis, inside the image or outside.
inline bool is_short(const Axis2d& axis) {
  constexpr int64_t kMost = int64_t{1} << 28;
  const bool each = axis.in < kMost && axis.out < kMost && axis.padding < kMost && axis.kernel < kMost &&
                    axis.stride < kMost && axis.dilation < kMost;
  return each && axis.kernel * axis.dilation < kMost && axis.out * axis.stride < kMost;
}

// One multiplication: kTableColumns columns and a block of windows, for all vectors of rows.
struct PermuteCall {
  const char* tables;  // [window][column]
  const char* kept;    // [vector][window][pairs and indices]
  int64_t windows;
  int64_t pairs;
  int64_t vectors;
  float* sums;         // [vector][column][row]
  const char* next;    // the next tables, prefetched into the L2 cache during the call
  int64_t next_lines;  // cache lines to prefetch per vector
};

template <int... kI>
__attribute__((target("avx512bf16"))) SDGP_INLINE void multiply_pair(__m512* sum, __m512i values, __m512i indices,
                                                                     const __m512i* resident, const char* tables,
                                                                     std::integer_sequence<int, kI...>) {
  // Tables that are not resident must be memory operands of vpermw. Without this, the compiler loads them into
  // registers and spills those.
  asm("" : "+r"(tables));
  ((sum[kI] = _mm512_dpbf16_ps(
        sum[kI], (__m512bh)values,
        (__m512bh)_mm512_permutexvar_epi16(
            indices, kI < kResident ? resident[kI % kResident] : load_bits<__m512i>(tables + kI * kVectorBytes)))),
   ...);
}

template <bool kFirst, int... kI, int... kR>
__attribute__((target("avx512bf16"))) SDGP_INLINE void multiply_vector(const PermuteCall& call, const char* kept,
                                                                       float* sums,
                                                                       std::integer_sequence<int, kI...> columns,
                                                                       std::integer_sequence<int, kR...>) {
  __m512 sum[kTableColumns] = {(kFirst ? __m512{} : load_bits<__m512>(sums + kI * kLaneRows))...};
  const char* tables = call.tables;
  for (int64_t window = 0; window < call.windows; ++window, tables += kWindowTableBytes) {
    const __m512i resident[kResident] = {load_bits<__m512i>(tables + kR * kVectorBytes)...};
    int64_t left = call.pairs;
    for (; left >= 2; left -= 2, kept += 3 * kVectorBytes) {
      const auto indices = load_bits<__m512i>(kept);
      multiply_pair(sum, load_bits<__m512i>(kept + kVectorBytes), indices, resident, tables, columns);
      multiply_pair(sum, load_bits<__m512i>(kept + 2 * kVectorBytes), _mm512_srli_epi16(indices, 8), resident, tables,
                    columns);
    }
    if (left == 0) continue;
    multiply_pair(sum, load_bits<__m512i>(kept + kVectorBytes), load_bits<__m512i>(kept), resident, tables, columns);
    kept += 2 * kVectorBytes;
  }
  ((store_bits(sums + kI * kLaneRows, sum[kI])), ...);
}

template <bool kFirst>
__attribute__((noinline, target("avx512bf16"))) void multiply_windows(const PermuteCall& block) {
  const PermuteCall call = block;  // a local copy: no store can alias it
  const char* kept = call.kept;
  const char* next = call.next;
  float* sums = call.sums;
  const int64_t bytes = call.windows * (call.pairs + ceil_div(call.pairs, 2)) * kVectorBytes;
  for (int64_t v = 0; v < call.vectors; ++v, kept += bytes, sums += kTableColumns * kLaneRows) {
    for (int64_t line = 0; line < call.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_vector<kFirst>(call, kept, sums, std::make_integer_sequence<int, kTableColumns>{},
                            std::make_integer_sequence<int, kResident>{});
  }
}

}  // namespace sdgp::SDGP_ISA
#endif
