// SPDX-License-Identifier: BSD-3-Clause
//
// Selects in two groups of 16-bit floats at once. A word holds element j of both groups, one in each half.
//
// Note [Pairs of groups]
// The magnitudes have 15 bits, so a 32-bit subtraction compares two pairs of them: bit 15 of each half of
// (a | 0x8000) - b is set where a >= b, and no half borrows from the other. The other bits of such a flag word are
// meaningless.
#pragma once

#include "element.cuh"

namespace sdgp::cuda {

constexpr uint32_t kFlags = 0x80008000u;  // the bit of each half that holds its flag

// Returns four of the eight bytes of x (0 to 3) and y (4 to 7). Each of the lower four nibbles of `selector` names a
// byte; a nibble with bit 3 set fills its byte with the sign bit of the named byte.
SDGP_HOST_DEVICE uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(selector));
  return result;
#else
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const auto byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7)) & 0xff);
    result |= (nibble < 8 ? byte : byte & 0x80 ? 0xffu : 0u) << (8 * i);
  }
  return result;
#endif
}

// Converts between consecutive elements of a group, two per word, and pairs. a and b hold kM / 2 words each.
template <int kM>
SDGP_HOST_DEVICE void to_pairs(const uint32_t* a, const uint32_t* b, uint32_t* pair) {
  SDGP_UNROLL
  for (int i = 0; i < kM / 2; ++i) {
    pair[2 * i] = permute(a[i], b[i], 0x5410);
    pair[2 * i + 1] = permute(a[i], b[i], 0x7632);
  }
}

template <int kM>
SDGP_HOST_DEVICE void from_pairs(const uint32_t* pair, uint32_t* a, uint32_t* b) {
  SDGP_UNROLL
  for (int i = 0; i < kM / 2; ++i) {
    a[i] = permute(pair[2 * i], pair[2 * i + 1], 0x5410);
    b[i] = permute(pair[2 * i], pair[2 * i + 1], 0x7632);
  }
}

// Flags where at least n of three flags are set.
SDGP_HOST_DEVICE uint32_t at_least(int n, uint32_t a, uint32_t b, uint32_t c) {
  if (n == 2) return (a & b) | (a & c) | (b & c);  // one instruction, as is each of the others
  return n == 1 ? a | b | c : a & b & c;
}

// Flags the n elements of each group with the largest magnitudes, 0 < n < kM. Ties go to the lower index.
template <int kM>
SDGP_HOST_DEVICE void flag_largest(const uint32_t* pair, int n, uint32_t* kept) {
  uint32_t magnitude[kM];
  uint32_t above[kM];
  SDGP_UNROLL
  for (int j = 0; j < kM; ++j) {
    magnitude[j] = pair[j] & ~kFlags;
    above[j] = pair[j] | kFlags;
  }
  if constexpr (kM == 4) {  // an element stays if it is larger than at least 4 - n of the other three
    const uint32_t c01 = above[0] - magnitude[1], c02 = above[0] - magnitude[2], c03 = above[0] - magnitude[3];
    const uint32_t c12 = above[1] - magnitude[2], c13 = above[1] - magnitude[3], c23 = above[2] - magnitude[3];
    kept[0] = at_least(4 - n, c01, c02, c03);
    kept[1] = at_least(4 - n, ~c01, c12, c13);
    kept[2] = at_least(4 - n, ~c02, ~c12, c23);
    kept[3] = at_least(4 - n, ~c03, ~c13, ~c23);
  } else {  // counts the larger ones of each element, in both halves
    uint32_t rank[kM];
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) rank[j] = static_cast<uint32_t>(j) * 0x10001u;
    SDGP_UNROLL
    for (int i = 0; i < kM; ++i) {
      SDGP_UNROLL
      for (int j = i + 1; j < kM; ++j) {
        const uint32_t first = (above[i] - magnitude[j]) >> 15 & 0x10001u;  // i goes before j
        rank[i] += 0x10001u - first;
        rank[j] -= 0x10001u - first;
      }
    }
    SDGP_UNROLL
    for (int j = 0; j < kM; ++j) kept[j] = (static_cast<uint32_t>(n - 1) * 0x10001u | kFlags) - rank[j];
  }
}

// Fills each half with its flag.
SDGP_HOST_DEVICE uint32_t spread(uint32_t flags) { return permute(flags, 0, 0xbb99); }

// Returns the larger of two magnitudes in each half.
SDGP_HOST_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  const uint32_t first = spread((a | kFlags) - b);
  return (a & first) | (b & ~first);
#endif
}

// Raises the magnitudes of two elements to `least`, which is a pair, too.
SDGP_HOST_DEVICE uint32_t raised(uint32_t pair, uint32_t least) {
  return (pair & kFlags) | larger_pair(pair & ~kFlags, least);
}

}  // namespace sdgp::cuda
