// SPDX-License-Identifier: BSD-3-Clause
//
// The values that fuzzers fill tensors with, the arrays that hold the values, and the test that two of them are equal.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../cpp/guarded.h"
#include "../cpp/products.h"
#include "bytes.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // the name that GCC uses
#endif
#endif

namespace sdgp::test {

inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

// An array that detects any access outside it. Its first element may lie at any multiple of its size.
template <class T>
class Array {
 public:
  explicit Array(int64_t size, int64_t skew = 0) : size(size), memory_(size, skew) {
    data = memory_.data;
    std::memset(data, 77, static_cast<size_t>(size) * sizeof(T));
  }
  T& operator[](int64_t i) const { return data[i]; }

  T* data;
  const int64_t size;

 private:
#if defined(__SANITIZE_ADDRESS__)
  struct Memory {
    Memory(int64_t size, int64_t skew) : whole(new T[static_cast<size_t>(size + skew)]), data(whole.get() + skew) {}
    std::unique_ptr<T[]> whole;
    T* data;
  };
#else
  struct Memory : Guarded<T> {
    Memory(int64_t size, int64_t skew) : Guarded<T>(size, skew != 0) {}
  };
#endif
  const Memory memory_;
};

template <class F>
struct Bits;
template <>
struct Bits<Real<float>> {
  using Word = uint32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct Bits<Real<double>> {
  using Word = uint64_t;
  static constexpr int kMantissa = 52;
};
template <DType dtype, int kExponent>
struct Bits<Short<dtype, kExponent>> {
  using Word = uint16_t;
  static constexpr int kMantissa = 15 - kExponent;
};

template <class F>
bool is_nan(typename F::Type x) {
  if constexpr (sizeof x > 2) {
    return x != x;
  } else {
    return (x & 0x7fff) > 0x8000 - (1 << F::kMantissa);
  }
}

// Returns eighths / 8 for a result of at most 16, which every type holds exactly.
template <class F>
typename F::Type from_eighths(int eighths) {
  if constexpr (sizeof(typename F::Type) > 2) {
    return static_cast<typename F::Type>(eighths) / 8;
  } else {
    if (eighths == 0) return 0;
    const int magnitude = std::abs(eighths);
    const int top = 31 - __builtin_clz(static_cast<unsigned>(magnitude));
    const int fraction = (magnitude << (F::kMantissa - top)) - (1 << F::kMantissa);
    return static_cast<uint16_t>((eighths < 0) << 15 | (F::kBias + top - 3) << F::kMantissa | fraction);
  }
}

// Compares bit for bit, except that any two NaNs are equal.
template <class F>
bool same(typename F::Type a, typename F::Type b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (is_nan<F>(a) && is_nan<F>(b));
}

template <class F>
bool same(const Array<typename F::Type>& a, const Array<typename F::Type>& b) {
  if (std::memcmp(a.data, b.data, static_cast<size_t>(a.size) * sizeof(*a.data)) == 0) return true;
  for (int64_t i = 0; i < a.size; ++i) {
    if (!same<F>(a[i], b[i])) return false;
  }
  return true;
}

// kTame: multiples of 1/8 of at most 16, with ties and zeros. Their sums are equal in any order.
enum Values : uint8_t { kTame, kAnyBits, kSpecial, kMixed, kMostlyZero };

template <class F>
typename F::Type draw_value(Values values, uint64_t bits) {
  using Word = typename Bits<F>::Word;
  constexpr int kMantissa = Bits<F>::kMantissa;
  constexpr auto kSign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  constexpr auto kSmallest = static_cast<Word>(Word{1} << kMantissa);  // smallest normal value
  constexpr auto kInf = static_cast<Word>(kSign - kSmallest);
  constexpr Word kSpecials[] = {0,        1,    kSmallest - 1,        kSmallest,
                                kInf - 1, kInf, kInf | kSmallest / 2, kInf | 1 /* a signalling NaN */};
  const auto choice = static_cast<int>(bits >> 60);
  if (values == kMixed) values = choice < 2 ? kSpecial : choice < 6 ? kTame : kAnyBits;
  if (values == kMostlyZero) {
    if (choice < 11) return typename F::Type{};
    values = choice == 15 ? kSpecial : kTame;
  }
  if (values == kTame) return from_eighths<F>(static_cast<int>(bits & 0xff) - 128);
  auto word = static_cast<Word>(bits);
  if (values == kSpecial) word = kSpecials[bits % 8] | (bits & 8 ? kSign : 0);
  typename F::Type value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class F>
void fill(const Array<typename F::Type>& x, Values values, Bytes& bytes) {
  for (int64_t i = 0; i < x.size; ++i) x[i] = draw_value<F>(values, bytes.word());
}

}  // namespace sdgp::test
