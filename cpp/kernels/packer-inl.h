// SPDX-License-Identifier: BSD-3-Clause
//
// Packs the kept values of pruned rows, with their indices or with what a product needs instead. Compiled once per
// instruction set.
//
// Note [Packing]
// After prune_nm, the kept values are the elements that are not +0, at most n per group. Pruned elements with the
// lowest indices fill the group up to n. Eight elements are packed at a time: their mask bits select one of 256
// permutations, which moves the kept elements to the front. AVX-512 instead compresses 16 elements of 32 bits. Whole
// vectors are stored; the next store overwrites what lies beyond the kept elements.
#pragma once

#include "pruned_rows-inl.h"

namespace sdgp::SDGP_ISA {

constexpr int64_t kCompressElements = 4096;  // per buffer, so that it stays in the L1 cache

struct PackTable {
  uint64_t order[256];  // byte i: the position of the i-th kept element
  uint8_t filled[256];  // the bits of the kept elements
};

// m divides 8. Each m consecutive bits of the eight are a group, which is filled up to n bits.
__attribute__((noinline)) constexpr PackTable make_pack_table(int n, int m) {
  PackTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    uint64_t order = 0;
    uint32_t filled = 0;
    int kept = 0;
    for (int group = 0; group < kPack; group += m) {
      int missing = n;
      for (int j = 0; j < m; ++j) missing -= bits >> (group + j) & 1;
      for (int j = 0; j < m; ++j) {
        const bool set = bits >> (group + j) & 1;
        if (!set && missing-- <= 0) continue;
        order |= static_cast<uint64_t>(group + j) << (8 * kept++);
        filled |= 1u << (group + j);
      }
    }
    table.order[bits] = order;
    table.filled[bits] = static_cast<uint8_t>(filled);
  }
  return table;
}

// Keeps the elements that are not +0.
inline constexpr PackTable kPackNonzeros = make_pack_table(0, kPack);

// Returns one bit per element of eight: 1 if the element is not +0.
template <class T>
SDGP_INLINE uint32_t kept_bits(const T* x) {
#if defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  if constexpr (sizeof(T) == 2) {
    const __m128i equal = _mm_cmpeq_epi16(load_bits<__m128i>(x), _mm_setzero_si128());
    return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(equal, equal))) & 0xff;
  } else if constexpr (sizeof(T) == 4) {
    const __m256i equal = _mm256_cmpeq_epi32(load_bits<__m256i>(x), zero);
    return ~static_cast<uint32_t>(_mm256_movemask_ps((__m256)equal)) & 0xff;
  } else {
    const __m256i low = _mm256_cmpeq_epi64(load_bits<__m256i>(x), zero);
    const __m256i high = _mm256_cmpeq_epi64(load_bits<__m256i>(x + 4), zero);
    return ~static_cast<uint32_t>(_mm256_movemask_pd((__m256d)low) | _mm256_movemask_pd((__m256d)high) << 4) & 0xff;
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < kPack; ++i) bits |= static_cast<uint32_t>(x[i] != 0) << i;
  return bits;
#endif
}

// Stores the eight elements in the order that the bytes of `order` give.
template <class T>
SDGP_INLINE void store_in_order(const T* x, uint64_t order, T* out) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(order));
  if constexpr (sizeof(T) == 2) {
    const __m128i doubled = _mm_unpacklo_epi8(_mm_add_epi8(bytes, bytes), _mm_add_epi8(bytes, bytes));
    const __m128i control = _mm_add_epi8(doubled, _mm_set1_epi16(0x0100));
    return store_bits(out, _mm_shuffle_epi8(load_bits<__m128i>(x), control));
  } else if constexpr (sizeof(T) == 4) {
    return store_bits(out, _mm256_permutevar8x32_epi32(load_bits<__m256i>(x), _mm256_cvtepu8_epi32(bytes)));
  }
#endif
  for (int i = 0; i < kPack; ++i) out[i] = x[order >> (8 * i) & 7];
}

// Sets the lowest `count` bits that are 0.
SDGP_INLINE uint64_t fill_bits(uint64_t bits, int count) {
  for (; count > 0; --count) bits |= bits + 1;
  return bits;
}

template <class T>
struct Packer {
  const int n;
  const int m;
  const bool whole;  // eight elements are a whole number of groups
  const PackTable table;

  explicit Packer(const Pruning& pruning)
      : n(pruning.n), m(pruning.m), whole(kPack % m == 0), table(whole ? make_pack_table(n, m) : kPackNonzeros) {}

  // Packs one group of `length` elements. Reads and writes nothing beyond it.
  void pack_group(const T* x, int64_t length, T* values, uint8_t* indices) const {
    int64_t missing = n < length ? n : length;
    for (int64_t j = 0; j < length; ++j) missing -= x[j] != 0;
    int slot = 0;
    for (int64_t j = 0; j < length; ++j) {
      if (x[j] == 0 && missing-- <= 0) continue;
      values[slot] = x[j];
      indices[slot++] = static_cast<uint8_t>(j);
    }
    for (; slot < n; ++slot) {
      values[slot] = 0;
      indices[slot] = 0;
    }
  }

  // Packs one row. Reads up to kPack - 1 elements beyond it, but writes nothing beyond its kept values.
  void pack_row(const T* x, int64_t size, T* values, uint8_t* indices) const {
    const int64_t full = size / m;
    const int64_t kept = ceil_div(size, m) * n;
    int64_t group = 0;
    if (whole) {
      const int step = kPack / m;
      const uint64_t local = static_cast<uint64_t>(m - 1) * 0x0101010101010101u;  // m is a power of two
      for (; group + step <= full && group * n + kPack <= kept; group += step) {
        const uint64_t order = table.order[kept_bits(x + group * m)];
        store_in_order(x + group * m, order, values + group * n);
        const uint64_t index = order & local;
        std::memcpy(indices + group * n, &index, sizeof index);
      }
    } else {
      for (; group < full && group * n + n + kPack <= kept; ++group) {
        pack_blocks(x + group * m, values + group * n, indices + group * n);
      }
    }
    for (; group * m < size; ++group) {
      const int64_t length = size - group * m < m ? size - group * m : m;
      pack_group(x + group * m, length, values + group * n, indices + group * n);
    }
  }

  // Returns whether place_block accepts `rows` elements at a time.
  bool places(int64_t rows) const { return whole ? rows % kPack == 0 : m % kPack == 0; }

  // Packs whole groups, and returns the end of the kept values. Instead of indices, writes the byte offsets of the rows
  // of a dense operand. Writes up to 16 elements beyond the kept values. With n == 0, keeps what is not +0.
  T* place_block(const T* x, int64_t size, T* values, uint16_t* offsets, uint16_t row_bytes) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      if (whole || m % kLanes<T> == 0) return place_vectors(x, size, values, offsets, row_bytes);
    }
#endif
    if (whole) {
      for (int64_t i = 0; i < size; i += kPack) {
        const uint32_t bits = kept_bits(x + i);
        const uint64_t order = table.order[bits];
        const int kept = n > 0 ? kPack / m * n : __builtin_popcount(bits);
        store_in_order(x + i, order, values);
        store_offsets(order, i, row_bytes, offsets);
        values += kept;
        offsets += kept;
      }
      return values;
    }
    for (int64_t i = 0; i < size; i += m) {
      const uint64_t bits = group_bits(x + i);
      for (int j = 0; j < m; j += kPack) {
        const auto block = static_cast<uint32_t>(bits >> j & 0xff);
        const uint64_t order = table.order[block];
        store_in_order(x + i + j, order, values);
        store_offsets(order, i + j, row_bytes, offsets);
        values += __builtin_popcount(block);
        offsets += __builtin_popcount(block);
      }
    }
    return values;
  }

#if defined(__AVX512F__)
  // place_block for 32-bit elements, a vector at a time. A vector is whole groups, or a group is whole vectors.
  T* place_vectors(const T* x, int64_t size, T* values, uint16_t* offsets, uint16_t row_bytes) const {
    constexpr int kL = kLanes<T>;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lane_bytes = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(row_bytes));
    const auto place = [&](__m512i vector, int64_t at, uint32_t bits) __attribute__((always_inline)) {
      const __m512i bytes = _mm512_add_epi32(lane_bytes, _mm512_set1_epi32(static_cast<int>(at) * row_bytes));
      const auto kept = static_cast<__mmask16>(bits);
      store_bits(values, _mm512_maskz_compress_epi32(kept, vector));
      store_bits(offsets, _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(kept, bytes)));
      values += __builtin_popcount(bits);
      offsets += __builtin_popcount(bits);
    };
    const int step = whole ? kL : m;
    int64_t i = 0;
    for (; i + step <= size; i += step) {
      uint64_t bits = 0;
      for (int j = 0; j < step; j += kL) {
        const auto vector = load_bits<__m512i>(x + i + j);
        bits |= static_cast<uint64_t>(_mm512_test_epi32_mask(vector, vector)) << j;
      }
      if (whole) {
        bits = table.filled[bits & 0xff] | table.filled[bits >> 8] << 8;
      } else {
        bits = fill_bits(bits, n - __builtin_popcountll(bits));
      }
      for (int j = 0; j < step; j += kL, bits >>= kL) place(load_bits<__m512i>(x + i + j), i + j, bits & 0xffff);
    }
    if (i < size) {  // half a vector is left
      const __m512i vector = _mm512_castsi256_si512(load_bits<__m256i>(x + i));
      place(vector, i, table.filled[_mm512_test_epi32_mask(vector, vector) & 0xff]);
    }
    return values;
  }
#endif

  static SDGP_INLINE void store_offsets(uint64_t order, int64_t first, uint16_t row_bytes, uint16_t* offsets) {
    const auto lanes =
        __builtin_convertvector(load_bits<VecType<uint8_t, kPack>::type>(&order), VecType<uint16_t, 2 * kPack>::type);
    store_bits(offsets, (lanes + static_cast<uint16_t>(first)) * row_bytes);
  }

  // Returns the bits of the kept elements of a full group, filled up to n bits.
  SDGP_INLINE uint64_t group_bits(const T* x) const {
    uint64_t bits = 0;
    for (int j = 0; j < m; j += kPack) bits |= static_cast<uint64_t>(kept_bits(x + j)) << j;
    bits &= ~uint64_t{0} >> (64 - m);
    return fill_bits(bits, n - __builtin_popcountll(bits));
  }

  // Packs one full group, eight elements at a time. Writes up to kPack elements beyond it.
  SDGP_INLINE void pack_blocks(const T* x, T* values, uint8_t* indices) const {
    const uint64_t bits = group_bits(x);
    for (int j = 0; j < m; j += kPack) {
      const auto block = static_cast<uint32_t>(bits >> j & 0xff);
      const uint64_t order = table.order[block];
      store_in_order(x + j, order, values);
      const uint64_t index = order + static_cast<uint64_t>(j) * 0x0101010101010101u;
      std::memcpy(indices, &index, sizeof index);
      values += __builtin_popcount(block);
      indices += __builtin_popcount(block);
    }
  }
};

#if defined(__AVX512F__)
// place_block for 16-bit elements that are not +0, a vector at a time. Accepts any size, and returns the number of kept
// values. Writes up to 32 elements beyond them.
__attribute__((target("avx512vbmi2"))) inline int64_t place_words(const uint16_t* x, int64_t size, uint16_t* values,
                                                                  uint16_t* offsets, uint16_t row_bytes) {
  constexpr int kL = kLanes<uint16_t>;
  Vec<uint16_t> bytes;
  for (int i = 0; i < kL; ++i) bytes[i] = static_cast<uint16_t>(i * row_bytes);
  const auto step = static_cast<uint16_t>(kL * row_bytes);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i += kL, bytes += step) {
    const __mmask32 inside = size - i < kL ? (1u << (size - i)) - 1 : ~0u;
    const __m512i vector = _mm512_maskz_loadu_epi16(inside, x + i);
    const __mmask32 bits = _mm512_test_epi16_mask(vector, vector);
    store_bits(values + kept, _mm512_maskz_compress_epi16(bits, vector));
    store_bits(offsets + kept, _mm512_maskz_compress_epi16(bits, (__m512i)bytes));
    kept += __builtin_popcount(bits);
  }
  return kept;
}

// keep_row for 16-bit elements, a vector at a time.
__attribute__((target("avx512vbmi2"))) inline int64_t keep_words(const uint16_t* x, int64_t size,
                                                                 const uint32_t* places, uint16_t* values,
                                                                 uint32_t* kept_places) {
  constexpr int kL = kLanes<uint16_t>, kHalf = kL / 2;
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i += kL) {
    const __mmask32 inside = size - i < kL ? (1u << (size - i)) - 1 : ~0u;
    const __m512i vector = _mm512_maskz_loadu_epi16(inside, x + i);
    const __mmask32 bits = _mm512_test_epi16_mask(vector, vector);
    store_bits(values + kept, _mm512_maskz_compress_epi16(bits, vector));
    const auto lower = static_cast<__mmask16>(bits), upper = static_cast<__mmask16>(bits >> kHalf);
    store_bits(kept_places + kept, _mm512_maskz_compress_epi32(lower, load_bits<__m512i>(places + i)));
    store_bits(kept_places + kept + __builtin_popcount(lower),
               _mm512_maskz_compress_epi32(upper, load_bits<__m512i>(places + i + kHalf)));
    kept += __builtin_popcount(bits);
  }
  return kept;
}
#endif

// keep_row moves the elements of a row that are not +0 to the front, together with their entries in `places`, and
// returns their number. It reads and writes up to kKeep - 1 elements beyond them.
constexpr int kKeep = 32;

template <class T>
SDGP_INLINE int64_t keep_row(const T* x, int64_t size, const uint32_t* places, T* values, uint32_t* kept_places) {
  int64_t kept = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    constexpr int kL = kLanes<T>;
    for (int64_t i = 0; i < size; i += kL) {
      const auto element = load_bits<__m512i>(x + i);
      const uint32_t inside = size - i < kL ? (1u << (size - i)) - 1 : 0xffff;
      const auto bits = static_cast<__mmask16>(_mm512_test_epi32_mask(element, element) & inside);
      store_bits(values + kept, _mm512_maskz_compress_epi32(bits, element));
      store_bits(kept_places + kept, _mm512_maskz_compress_epi32(bits, load_bits<__m512i>(places + i)));
      kept += __builtin_popcount(bits);
    }
    return kept;
  }
#endif
  for (int64_t i = 0; i < size; i += kPack) {
    const uint32_t inside = size - i < kPack ? (1u << (size - i)) - 1 : 0xff;
    const uint32_t bits = kept_bits(x + i) & inside;
    store_in_order(x + i, kPackNonzeros.order[bits], values + kept);
    store_in_order(places + i, kPackNonzeros.order[bits], kept_places + kept);
    kept += __builtin_popcount(bits);
  }
  return kept;
}

}  // namespace sdgp::SDGP_ISA
