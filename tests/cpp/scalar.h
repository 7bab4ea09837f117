// SPDX-License-Identifier: BSD-3-Clause
//
// Scalar code for one group of prune_nm, which follows the specification. The specification is Note [Magnitude order],
// Note [Random numbers], Note [mvue] and Note [Unstructured] in cpp/kernels/.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace scalar {

template <class T>
using Group = std::vector<T>;

// The bits without the sign. Their order is the order of the magnitudes.
template <class T>
uint64_t magnitude_key(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits & ((uint64_t{1} << (8 * sizeof x - 1)) - 1);
}

inline Group<bool> largest(const Group<uint64_t>& key, int n) {
  Group<bool> keep(key.size());
  for (size_t i = 0; i < key.size(); ++i) {
    int ahead = 0;
    for (size_t j = 0; j < key.size(); ++j) ahead += key[j] > key[i] || (key[j] == key[i] && j < i);
    keep[i] = ahead < n;
  }
  return keep;
}

template <class T>
Group<bool> largest_magnitudes(const Group<T>& x, int n) {
  Group<uint64_t> key;
  for (const T value : x) key.push_back(magnitude_key(value));
  return largest(key, n);
}

template <class T>
Group<T> masked(Group<T> x, const Group<bool>& keep) {
  for (size_t j = 0; j < x.size(); ++j) x[j] = keep[j] ? x[j] : T{0};
  return x;
}

struct Random {
  uint32_t a;
  uint32_t b;

  static uint32_t start(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    return x ^ (x >> 15);
  }
  static uint32_t finish(uint32_t x) {
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
  }

  Random(uint64_t seed, uint64_t index) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    a = finish(start(static_cast<uint32_t>(index) ^ static_cast<uint32_t>(z)));
    b = finish(start(a + (static_cast<uint32_t>(index >> 32) ^ static_cast<uint32_t>(z >> 32))));
  }

  uint64_t key(uint32_t j) const { return finish(start(b + j * 0x9e3779b9u) ^ a) >> 1; }
  double uniform() const { return static_cast<double>((b >> 9) * 2 + 1) * 0x1p-24; }
};

template <class T>
Group<T> random(const Group<T>& x, int n, uint64_t seed, uint64_t index) {
  const Random state(seed, index);
  Group<uint64_t> key;
  for (size_t j = 0; j < x.size(); ++j) key.push_back(state.key(static_cast<uint32_t>(j)));
  return masked(x, largest(key, n));
}

template <class E>
Group<E> mvue(const Group<E>& x, int n, uint64_t seed, uint64_t index) {
  E rest = 0;
  for (const E value : x) rest += std::abs(value);
  if (!std::isfinite(rest)) return masked(x, largest_magnitudes(x, n));
  E step = std::numeric_limits<E>::infinity();
  E places = static_cast<E>(n);
  for (int round = 0; round < n && places > 0 && rest > 0; ++round) {
    E mean = rest / places;
    if (mean == 0) mean = std::numeric_limits<E>::denorm_min();
    if (!(mean < step)) break;
    step = mean;
    rest = 0;
    places = static_cast<E>(n);
    for (const E value : x) {
      if (std::abs(value) >= step) {
        --places;
      } else {
        rest += std::abs(value);
      }
    }
  }
  // Use volatile, because a fused multiply-add with the step below would round once, and the specification rounds
  // twice.
  volatile E point = static_cast<E>(Random(seed, index).uniform()) * step;
  E reached = 0;
  int left = n;
  Group<E> out(x.size());
  for (size_t j = 0; j < x.size(); ++j) {
    const bool above = std::abs(x[j]) >= step;
    if (!above) reached += std::abs(x[j]);
    const bool hit = reached > point;
    if (hit) point = point + step;
    if (left == 0 || !(above || hit)) continue;
    --left;
    out[j] = above ? x[j] : std::copysign(step, x[j]);
  }
  return out;
}

template <class E>
bool all_finite(const Group<E>& x) {
  for (const E value : x) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <class E>
Group<E> unstructured(const Group<E>& x, int n, E step, uint64_t seed, uint64_t index) {
  if (!all_finite(x)) return masked(x, largest_magnitudes(x, n));
  const E shares = static_cast<E>(1 << 24) / step;
  uint32_t end = Random(seed, index).b >> 8;
  Group<E> out(x.size());
  for (size_t j = 0; j < x.size(); ++j) {
    const bool above = std::abs(x[j]) >= step;
    const uint32_t begin = end;
    if (!above) end += static_cast<uint32_t>(std::abs(x[j]) * shares);
    if (above || begin >> 24 != end >> 24) out[j] = above ? x[j] : std::copysign(step, x[j]);
  }
  return out;
}

template <class E>
Group<E> rescale_group(const Group<E>& x, int n) {
  const Group<bool> keep = largest_magnitudes(x, n);
  E all = 0;
  E kept = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    all += std::abs(x[j]);
    if (keep[j]) kept += std::abs(x[j]);
  }
  const E factor = kept == 0 ? E{1} : all / kept;
  Group<E> out(x.size());
  for (size_t j = 0; j < x.size(); ++j) out[j] = keep[j] ? x[j] * factor : E{0};
  return out;
}

}  // namespace scalar
