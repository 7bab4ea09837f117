// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loop of sparse products in bfloat16 on CPUs that have AVX512-BF16.
//
// Note [Permute kernel]
// Lanes are result rows. For one column of the dense operand, the values of a window of up to 32 reduction rows lie in
// one register as a lookup table. Each lane has two kept values of its row, as a pair of 16-bit floats, and their two
// positions in the window, as a pair of 16-bit indices: one vpermw looks up what 16 rows' pairs are multiplied with,
// one vdpbf16ps multiplies and adds them. No sum leaves its register while a block of windows passes, and every pattern
// whose group fits a window runs at the same rate per kept value.
//
// Limits, in cycles for 16 lanes x 2 products:
//   Zen 4         4/3; the row kernel takes 2
//   Golden Cove   3, of which vdpbf16ps alone takes 2; the row kernel takes 1 and stays the better one on Intel
#pragma once

#include "plan-inl.h"

#if defined(__AVX512F__)
namespace sdgp::SDGP_ISA {

constexpr int kTable = 32;         // reduction rows of a window, at most: 16-bit elements of a register
constexpr int kTableColumns = 16;  // columns whose sums stay in registers
constexpr int kWindowTableBytes = kTableColumns * kVectorBytes;  // the tables of a window: [column][reduction row]
constexpr int kResident = 10;                                    // tables that stay in registers as well
constexpr int kLaneRows = 16;                                    // result rows of a vector of sums
constexpr int kPairRows = 2 * kLaneRows;                         // result rows of a vector of 16-bit elements
constexpr int64_t kBlockWindows = 16;  // windows whose tables stay in the first-level cache: 16 KiB

// What a result row keeps of a window.
struct Window {
  int64_t size;   // reduction rows: as many whole groups as a table holds
  int64_t pairs;  // of kept values
  int64_t bytes;  // of a vector of rows: per two pairs one vector of indices, then the pairs

  explicit Window(const Pruning& pruning)
      : size(kTable / pruning.m * pruning.m),
        pairs(ceil_div(kTable / pruning.m * pruning.n, 2)),
        bytes((pairs + ceil_div(pairs, 2)) * kVectorBytes) {}
};

// How a chunk's kept values lie: [block of kBlockWindows windows][vector of rows][window][pairs and indices].
struct KeptLayout {
  int64_t windows;
  int64_t vectors;
  int64_t window_bytes;  // of a vector of rows

  int64_t bytes() const { return windows * vectors * window_bytes; }
  // Of all windows of a block, of one vector of rows.
  int64_t vector_bytes(int64_t window) const {
    return at_most(windows - window / kBlockWindows * kBlockWindows, kBlockWindows) * window_bytes;
  }
  int64_t offset(int64_t window, int64_t vector) const {
    const int64_t first = window / kBlockWindows * kBlockWindows;
    return first * vectors * window_bytes + vector * vector_bytes(window) + (window - first) * window_bytes;
  }
};

// Whether 32 bits hold every position that is computed along an axis, inside or outside of it.
inline bool is_short(const Axis2d& axis) {
  constexpr int64_t kMost = int64_t{1} << 28;
  const bool each = axis.in < kMost && axis.out < kMost && axis.padding < kMost && axis.kernel < kMost &&
                    axis.stride < kMost && axis.dilation < kMost;
  return each && axis.kernel * axis.dilation < kMost && axis.out * axis.stride < kMost;
}

// A column block and a block of windows, for all vectors of rows.
struct PermuteCall {
  const char* tables;  // [window][column]
  const char* kept;    // [vector][window][pairs and indices]
  int64_t windows;
  int64_t pairs;
  int64_t vectors;
  float* sums;         // [vector][column][row]
  const char* next;    // the tables that follow, fetched into the second-level cache meanwhile
  int64_t next_lines;  // per vector
};

template <int... kI>
__attribute__((target("avx512bf16"))) SDGP_INLINE void multiply_pair(__m512* sum, __m512i values, __m512i indices,
                                                                     const __m512i* resident, const char* tables,
                                                                     std::integer_sequence<int, kI...>) {
  asm("" : "+r"(tables));  // what is not resident is vpermw's memory operand, not a register's that is then spilled
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
  const PermuteCall call = block;  // a copy: nothing that is stored can change it
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
