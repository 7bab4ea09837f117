// SPDX-License-Identifier: BSD-3-Clause
//
// Batcher's odd-even merge sort for kM inputs (a power of two), as a list of comparators that the compiler unrolls.
#pragma once

namespace sdgp {

struct Comparator {
  int low;
  int high;
};

template <int kM>
struct SortingNetwork {
  static_assert(kM >= 2 && (kM & (kM - 1)) == 0);

  template <class Emit>
  static constexpr void generate(Emit emit) {
    for (int p = 1; p < kM; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int j = k % p; j + k < kM; j += 2 * k) {
          for (int i = 0; i < k; ++i) {
            if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) emit(Comparator{i + j, i + j + k});
          }
        }
      }
    }
  }
  static constexpr int count() {
    int n = 0;
    generate([&](Comparator) { ++n; });
    return n;
  }
  struct List {
    Comparator at[count()];
  };
  static constexpr List list() {
    List list{};
    int n = 0;
    generate([&](Comparator c) { list.at[n++] = c; });
    return list;
  }
};

}  // namespace sdgp
