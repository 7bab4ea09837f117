// SPDX-License-Identifier: BSD-3-Clause
//
// Tests the code for a single group, select_nm-inl.h, against scalar code: every method, dtype and compiled group size,
// pruned values and multipliers, padded groups, ties, NaN, infinity and the smallest numbers.
#define SDGP_ISA baseline
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "harness.h"
#include "kernels/select_nm-inl.h"
#include "scalar.h"

namespace {

using namespace sdgp::baseline;
using sdgp::Method;
using sdgp::Pruning;
using sdgp::test::expect;

constexpr uint64_t kSeed = 0x0123456789abcdefu;

// Draws normal values, ties and zeros of both signs, values that are not finite, all zeros, or values so small that a
// mean underflows.
template <class E>
E sample(std::mt19937& generator, int kind) {
  std::normal_distribution<float> normal;
  const auto value = static_cast<E>(normal(generator));
  if (kind == 0) return value;
  if (kind == 1) return std::round(value);
  if (kind == 2) return generator() % 9 ? value : std::copysign(std::numeric_limits<E>::infinity(), value);
  if (kind == 3) return generator() % 9 ? value : std::numeric_limits<E>::quiet_NaN();
  if (kind == 4) return std::copysign(E{0}, value);
  if (kind == 5) return std::round(value) * std::numeric_limits<E>::denorm_min();
  return generator() % 5 ? E{0} : value;
}
constexpr int kKinds = 7;

template <class E>
std::vector<E> expected(const std::vector<E>& x, const Pruning& pruning, uint64_t index) {
  const auto [method, n, m, seed, scale, step] = pruning;
  const std::vector<bool> keep = scalar::largest_magnitudes(x, n);
  const std::vector<E> ones(x.size(), E{1});
  if (method == Method::kMagnitude) return scalar::masked(scale ? ones : x, keep);
  if (method == Method::kRandom) return scalar::random(scale ? ones : x, n, seed, index);
  if (method == Method::kRescaleGroup) {
    E all = 0;
    E kept = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      all += std::abs(x[j]);
      if (keep[j]) kept += std::abs(x[j]);
    }
    const E factor = kept == 0 ? E{1} : all / kept;
    std::vector<E> out = scale ? ones : x;
    for (E& value : out) value *= factor;
    return scalar::masked(out, keep);
  }
  const bool mvue = method == Method::kMvue;
  std::vector<E> out =
      mvue ? scalar::mvue(x, n, seed, index) : scalar::unstructured(x, n, static_cast<E>(step), seed, index);
  if (!scale) return out;
  E total = 0;
  for (const E value : x) total += std::abs(value);
  if (mvue ? !std::isfinite(total) : !scalar::all_finite(x)) return scalar::masked(ones, keep);
  for (size_t j = 0; j < x.size(); ++j) {
    if (out[j] != 0) out[j] = out[j] == x[j] ? E{1} : std::abs(out[j] / x[j]);
  }
  return out;
}

template <class E>
bool same(E a, E b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

// Prunes as many tiles as the method prunes together.
template <class C, Method kMethod, int kM>
void test_tiles(int n, int kind, bool scale, int length) {
  using E = typename C::E;
  constexpr int kL = kLanes<E>, kT = kTiles<kMethod>;
  std::mt19937 generator(static_cast<uint32_t>(100 * kM + 10 * kind + length));
  std::vector<std::vector<E>> groups(kT * kL, std::vector<E>(static_cast<size_t>(length)));
  LaneGroups<C> lanes[kT];
  Elem<C> x[kT][kM]{};
  for (int g = 0; g < kT * kL; ++g) {
    const int tile = g / kL, lane = g % kL;
    // The tiles differ in kind, so that they need different numbers of rounds.
    for (int j = 0; j < length; ++j) x[tile][j][lane] = groups[g][j] = sample<E>(generator, (kind + tile) % kKinds);
    const uint64_t index = (uint64_t{0x9876543210u} + generator()) * (lane + 1);
    lanes[tile].lo[lane] = static_cast<typename C::U>(index & 0xffffffffu);
    lanes[tile].hi[lane] = static_cast<typename C::U>(index >> 32 & 0xffffffffu);
    lanes[tile].length[lane] = static_cast<typename C::U>(length);
    lanes[tile].padded = length < kM;
  }
  const double step = kind == 5 ? std::ldexp(1, sizeof(E) == 8 ? -999 : -103) : 0.75;
  const Pruning pruning{.method = kMethod, .n = n, .m = kM, .seed = kSeed, .scale = scale, .step = step};
  prune_tiles<C, kMethod, kM>(x, with_mixed_seed(pruning), lanes);
  const std::string what = "method " + std::to_string(static_cast<int>(kMethod)) + ", " + std::to_string(n) + ":" +
                           std::to_string(kM) + ", kind " + std::to_string(kind) + ", scale " + std::to_string(scale) +
                           ", length " + std::to_string(length) + ", " + std::to_string(sizeof(E)) + " bytes";
  for (int g = 0; g < kT * kL; ++g) {
    const int tile = g / kL, lane = g % kL;
    const uint64_t index = static_cast<uint64_t>(lanes[tile].hi[lane]) << 32 | lanes[tile].lo[lane];
    const std::vector<E> wanted = expected(groups[g], pruning, index);
    for (int j = 0; j < length; ++j) expect(same<E>(x[tile][j][lane], wanted[j]), what);
  }
}

template <class C, int kM>
void test_size() {
  for (const int n : {1, 2, kM / 2, kM - 1}) {
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const int length : {kM, kM - 1, kM / 2 + 1}) {
        if (n > length) continue;
        for (const bool scale : {false, true}) {
          test_tiles<C, Method::kMagnitude, kM>(n, kind, scale, length);
          test_tiles<C, Method::kRandom, kM>(n, kind, scale, length);
          test_tiles<C, Method::kRescaleGroup, kM>(n, kind, scale, length);
          test_tiles<C, Method::kMvue, kM>(n, kind, scale, length);
          test_tiles<C, Method::kUnstructured, kM>(n, kind, scale, length);
        }
      }
    }
  }
}

// For 16-bit floats, magnitude must select the same elements as for integers with the same bits.
template <int kM>
void test_bits(int n) {
  using C = Bits16<0x3f80>;
  std::mt19937 generator(kM);
  Elem<C> x[kM];
  std::vector<std::vector<uint16_t>> lanes(kLanes<int16_t>, std::vector<uint16_t>(kM));
  for (int lane = 0; lane < kLanes<int16_t>; ++lane) {
    for (int j = 0; j < kM; ++j) {
      lanes[lane][j] = static_cast<uint16_t>(generator() % 5 ? generator() : 0x8000 | generator() % 3);
      x[j][lane] = static_cast<int16_t>(lanes[lane][j]);
    }
  }
  Elem<C> ones[kM];
  std::copy_n(x, kM, ones);
  Pruning pruning{.method = Method::kMagnitude, .n = n, .m = kM, .seed = 0, .scale = false};
  prune_magnitude<C, kM>(x, pruning);
  pruning.scale = true;
  prune_magnitude<C, kM>(ones, pruning);
  for (int lane = 0; lane < kLanes<int16_t>; ++lane) {
    const std::vector<bool> keep = scalar::largest_magnitudes(lanes[lane], n);
    for (int j = 0; j < kM; ++j) {
      const std::string what = "bits, " + std::to_string(n) + ":" + std::to_string(kM);
      expect(x[j][lane] == static_cast<int16_t>(keep[j] ? lanes[lane][j] : 0), what);
      expect(ones[j][lane] == (keep[j] ? 0x3f80 : 0), what + ", multipliers");
    }
  }
}

// By the 0-1 principle, a network that sorts all sequences of zeros and ones sorts everything. It must be no larger
// than Batcher's network.
template <int kM>
void test_network() {
  constexpr auto kNetwork = sdgp::SortingNetwork<kM>::list();
  constexpr int kCount = sdgp::SortingNetwork<kM>::count();
  for (uint32_t input = 0; input < 1u << kM; ++input) {
    uint32_t x = input;
    for (int i = 0; i < kCount; ++i) {
      const auto [low, high] = kNetwork.at[i];
      expect(0 <= low && low < high && high < kM, "comparators in their place");
      const uint32_t swap = (x >> low & ~(x >> high)) & 1;
      x ^= swap << low | swap << high;
    }
    const int ones = __builtin_popcount(input);
    expect(x == ((1u << ones) - 1) << (kM - ones), "a network of " + std::to_string(kM) + " sorts");
  }
}

void test_all() {
  test_network<2>();
  test_network<8>();
  test_network<16>();
  expect(sdgp::SortingNetwork<16>::count() == 63, "63 comparators for 16");
  expect(sdgp::SortingNetwork<32>::count() == 191, "191 comparators for 32");
  expect(sdgp::SortingNetwork<64>::count() == 543, "543 comparators for 64");
  test_size<Float32, 4>();
  test_size<Float32, 16>();
  test_size<Float64, 4>();
#if !defined(SDGP_FEW)
  test_size<Float32, 2>();
  test_size<Float32, 8>();
  test_size<Float32, 64>();
  test_size<Float64, 16>();
#endif
  test_bits<4>(2);
  test_bits<16>(3);
}

}  // namespace

int main() {
  test_all();
  std::printf(sdgp::test::failures.empty() ? "passed\n" : "%zu failures\n", sdgp::test::failures.size());
  return !sdgp::test::failures.empty();
}
