// SPDX-License-Identifier: BSD-3-Clause
//
// How a layer prunes its data gradient, and which product it takes: what autograd.h stands on. Of it, PruningOptions is
// for callers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/arg.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "sdgp/sdgp.h"

namespace sdgp {

// The settings of a layer, in the manner of LibTorch's options:
// sdgp::PruningOptions("4:8").method("rescale").backend("pruned").
//
//   pattern  "n:m": groups of m output features or channels
//   method   see prune_nm; "mvue" is unbiased
//   backend  "auto": the faster of the sparse product and the exact dense one, measured at the first backward of a
//            shape; "pruned": always prunes, then takes the faster product; "sparse", "dense": prunes and forces that
//            product. From C++ there is a sparse product on the CPU alone: on CUDA "auto" is exact, "pruned" dense.
struct PruningOptions {
  PruningOptions() = default;
  PruningOptions(std::string pattern) : pattern_(std::move(pattern)) {}  // NOLINT: converting, as options are
  PruningOptions(const char* pattern) : pattern_(pattern) {}             // NOLINT
  TORCH_ARG(std::string, pattern) = "2:4";
  TORCH_ARG(std::string, method) = "mvue";
  TORCH_ARG(std::string, backend) = "auto";
};

namespace detail {

struct Pruning {
  int64_t n;
  int64_t m;
  std::string method;
  std::string backend;

  bool prunes() const { return n < m; }
};

// The settings, checked; `op` begins the message of what is wrong.
inline Pruning parse(const char* op, const PruningOptions& options) {
  const std::string& text = options.pattern();
  const char *begin = text.data(), *end = begin + text.size();
  int64_t n = 0, m = 0;
  const auto [colon, n_error] = std::from_chars(begin, end, n);
  const bool has_colon = n_error == std::errc() && colon != end && *colon == ':';
  const auto [rest, m_error] = has_colon ? std::from_chars(colon + 1, end, m) : std::from_chars_result{begin, {}};
  TORCH_CHECK_VALUE(has_colon && m_error == std::errc() && rest == end, op, ": expected pattern \"n:m\", got \"", text,
                    "\"");
  constexpr std::array backends = {"auto", "pruned", "sparse", "dense"};
  TORCH_CHECK_VALUE(std::find(backends.begin(), backends.end(), options.backend()) != backends.end(), op,
                    ": expected backend to be one of auto, pruned, sparse, dense, got \"", options.backend(), "\"");
  prune_nm(at::empty({0}, at::device(at::kMeta).dtype(at::kFloat)), n, m, -1, options.method());  // checks the rest
  return {n, m, options.method(), options.backend()};
}

// Multiply-adds below which "auto" looks at nothing, the margin by which the sparse product must win (less is measuring
// noise), and what a layer that may prune costs besides.
constexpr int64_t kLeastWork = 16 << 20;
constexpr double kMargin = 0.95;
constexpr double kCallsMs = 0.02;
constexpr int kRounds = 5;

template <class Call>
double elapsed_ms(const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// Times both in turn, and compares their medians.
template <class Dense, class Sparse>
bool measure(const Dense& dense, const Sparse& sparse) {
  std::array<std::array<double, kRounds>, 2> times{};
  dense();
  sparse();
  for (int round = 0; round < kRounds; ++round) {
    times[0][round] = elapsed_ms(dense);
    times[1][round] = elapsed_ms(sparse);
  }
  for (auto& each : times) std::nth_element(each.begin(), each.begin() + kRounds / 2, each.end());
  return times[1][kRounds / 2] + kCallsMs < kMargin * times[0][kRounds / 2];
}

// What a choice depends on: shapes, geometry, dtype, settings, threads.
using Key = std::pair<std::string, std::vector<int64_t>>;

// Whether the sparse product was the faster, the first time that this key was seen.
template <class Dense, class Sparse>
bool is_sparse_faster(Key key, const Dense& dense, const Sparse& sparse) {
  static std::mutex mutex;
  static std::map<Key, bool> choices;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = choices.find(key); found != choices.end()) return found->second;
  }
  const bool faster = measure(dense, sparse);
  const std::lock_guard lock(mutex);
  return choices.emplace(std::move(key), faster).first->second;
}

// The data gradient by the product that the settings name, or by the faster one. `pruned` and `sparse` take a seed;
// `work` is in multiply-adds.
template <class Dense, class Pruned, class Sparse>
at::Tensor data_gradient(const char* op, const Pruning& pruning, const at::Tensor& grad_output, int64_t work, Key key,
                         const Dense& dense, const Pruned& pruned, const Sparse& sparse) {
  const std::optional<at::Tensor> drawn;
  const bool on_cpu = grad_output.is_cpu(), exact_is_possible = pruning.backend == "auto";
  if (pruning.backend == "sparse") {
    TORCH_CHECK_VALUE(on_cpu, op, ": backend=\"sparse\" expected a gradient on the CPU, got ", grad_output.device(),
                      "; use \"pruned\" for the same gradients");
    return sparse(drawn);
  }
  if (pruning.backend == "dense" || !on_cpu || work < kLeastWork) return exact_is_possible ? dense() : pruned(drawn);
  // Measured with a seed of its own: the generator is left alone.
  const std::optional<at::Tensor> seed = at::zeros({1}, at::kLong);
  key.first = pruning.method + " " + pruning.backend;
  key.second.insert(key.second.end(),
                    {pruning.n, pruning.m, at::get_num_threads(), static_cast<int64_t>(grad_output.scalar_type())});
  const bool faster =
      exact_is_possible ? is_sparse_faster(std::move(key), dense, [&] { return sparse(seed); })
                        : is_sparse_faster(std::move(key), [&] { return pruned(seed); }, [&] { return sparse(seed); });
  if (faster) return sparse(drawn);
  return exact_is_possible ? dense() : pruned(drawn);
}

}  // namespace detail
}  // namespace sdgp
