// SPDX-License-Identifier: BSD-3-Clause
//
// The settings that tell a C++ layer how to prune its gradients and which products to use. Callers use only
// PruningOptions.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/arg.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <exception>
#include <string>
#include <utility>

#include "sdgp/sdgp.h"

namespace sdgp {

// The settings of a layer, written like LibTorch's options: sdgp::PruningOptions("8:16").weight_grad("4:16").
//
//   pattern             "n:m" of the data gradient. A group is m output features or channels. If n == m, the data
//                       gradient is exact.
//   method              A method of prune_nm. "mvue" and "unstructured" are unbiased.
//   backend             "pruned" always prunes, and uses the sparse product on the CPU and the dense product elsewhere.
//                       "sparse" and "dense" prune and use that product. "exact" does not prune.
//   weight_grad         "n:m" of the gradient that enters the weight gradient. A group is m rows or output pixels. The
//                       weight gradient is exact by default, and if there are fewer rows or pixels than m.
//   weight_grad_method  The method for the weight gradient, with the same choices as `method`.
//
// The layer measures nothing: only the device and the dtype decide which product it uses.
struct PruningOptions {
  PruningOptions() = default;
  PruningOptions(std::string pattern) : pattern_(std::move(pattern)) {}  // NOLINT: implicit, like LibTorch's options
  PruningOptions(const char* pattern) : pattern_(pattern) {}             // NOLINT
  TORCH_ARG(std::string, pattern) = "2:4";
  TORCH_ARG(std::string, method) = "mvue";
  TORCH_ARG(std::string, backend) = "pruned";
  TORCH_ARG(std::string, weight_grad) = "1:1";
  TORCH_ARG(std::string, weight_grad_method) = "mvue";
};

namespace detail {

// The parsed and checked settings of one product.
struct Settings {
  int64_t n;
  int64_t m;
  std::string method;
  std::string backend;

  bool prunes() const { return n < m && backend != "exact"; }
};

// The settings of a layer's two products.
struct Pruning {
  Settings data;
  Settings weight;
};

// Parses and checks the settings of one product. An error message begins with `op` and names the option `name`.
inline Settings parse(const char* op, const char* name, const std::string& text, const std::string& method,
                      const std::string& backend) {
  const char *begin = text.data(), *end = begin + text.size();
  int64_t n = 0, m = 0;
  const auto [colon, n_error] = std::from_chars(begin, end, n);
  const bool has_colon = n_error == std::errc() && colon != end && *colon == ':';
  const auto [rest, m_error] = has_colon ? std::from_chars(colon + 1, end, m) : std::from_chars_result{begin, {}};
  TORCH_CHECK_VALUE(has_colon && m_error == std::errc() && rest == end, op, ": expected ", name, " \"n:m\", got \"",
                    text, "\"");
  constexpr std::array backends = {"pruned", "sparse", "dense", "exact"};
  TORCH_CHECK_VALUE(std::find(backends.begin(), backends.end(), backend) != backends.end(), op,
                    ": expected backend to be one of pruned, sparse, dense, exact, got \"", backend, "\"");
  try {  // checks n, m and method
    prune_nm(at::empty({0}, at::device(at::kMeta).dtype(at::kFloat)), n, m, -1, method);
  } catch (const std::exception& error) {
    const std::string message = error.what();  // prune_nm: ...
    TORCH_CHECK_VALUE(false, op, message.substr(message.find(": ")), " (", name, ")");
  }
  return {n, m, method, backend};
}

inline Pruning parse(const char* op, const PruningOptions& options) {
  return {parse(op, "pattern", options.pattern(), options.method(), options.backend()),
          parse(op, "weight_grad", options.weight_grad(), options.weight_grad_method(), options.backend())};
}

inline bool has_sparse_product(at::Device device, at::ScalarType dtype) {
  return device.is_cpu() &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16);
}

// Returns whether the sparse product multiplies the pruned gradient.
inline bool takes_sparse_product(const char* op, const Settings& settings, const at::Tensor& grad_output) {
  if (settings.backend == "dense") return false;
  const bool has_one = has_sparse_product(grad_output.device(), grad_output.scalar_type());
  TORCH_CHECK_VALUE(has_one || settings.backend != "sparse", op,
                    ": backend=\"sparse\" expected a floating-point gradient on the CPU, got ",
                    grad_output.scalar_type(), " on ", grad_output.device(), "; use \"pruned\" for the same gradients");
  return has_one;
}

}  // namespace detail
}  // namespace sdgp
