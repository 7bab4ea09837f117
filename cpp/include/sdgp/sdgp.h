// SPDX-License-Identifier: BSD-3-Clause
//
// The ops of libsdgp for C++ programs. They go through the dispatcher of the LibTorch that the program is built with
// (>= 2.10). They do the same as sdgp.prune_nm and the related functions in Python, with the same checks and messages
// (std::exception, not always c10::Error), but they have no gradient. To train, use autograd.h.
//
//   at::Tensor x = torch::tensor({3.0f, -1.0f, 0.5f, -4.0f});
//   sdgp::prune_nm(x, 2, 4);  // 3, 0, 0, -4
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "sdgp/build_info.h"

namespace sdgp {

namespace detail {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

}  // namespace detail

// Prunes `input` to N:M sparsity: at most n of every m consecutive values along `dim` stay, 1 <= n <= m <= 64.
//
//   input   float32, float64, float16 or bfloat16. It may have any strides and any shape except a scalar. It is on the
//           CPU, or on CUDA if the program also links sdgp::sdgp_cuda.
//   method  "magnitude", "random", "rescale", "rescale_group" or "mvue". On the CPU also "unstructured", with which
//           n of m values stay only in the mean over the tensor.
//   seed    For "random", "mvue" and "unstructured": int64, one element, on the input's device. By default the device's
//           generator draws it, as in Python: torch::manual_seed(s) and torch.manual_seed(s) lead to the same choices.
//
// Returns a tensor with the input's shape, dtype and strides.
inline at::Tensor prune_nm(const at::Tensor& input, int64_t n, int64_t m, int64_t dim = -1,
                           std::string_view method = "magnitude", const std::optional<at::Tensor>& seed = {}) {
  static const auto op = detail::find<at::Tensor(const at::Tensor&, int64_t, int64_t, int64_t, std::string_view,
                                                 const std::optional<at::Tensor>&)>("sdgp::prune_nm");
  return op.call(input, n, m, dim, method, seed);
}

// Packs what prune_nm keeps and returns (values, indices), n of each per group. The indices are uint8 and count within
// the group. Both tensors have the input's shape, except ceil(size / m) * n along `dim`, which is innermost in memory.
// Runs only on the CPU.
inline std::tuple<at::Tensor, at::Tensor> compress_nm(const at::Tensor& input, int64_t n, int64_t m, int64_t dim = -1,
                                                      std::string_view method = "magnitude",
                                                      const std::optional<at::Tensor>& seed = {}) {
  static const auto op =
      detail::find<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t, int64_t, std::string_view,
                                                      const std::optional<at::Tensor>&)>("sdgp::compress_nm");
  return op.call(input, n, m, dim, method, seed);
}

// Inverts compress_nm: returns bit for bit what prune_nm returns. The result has the size `size` along `dim`, which is
// innermost in memory.
inline at::Tensor decompress_nm(const at::Tensor& values, const at::Tensor& indices, int64_t m, int64_t size,
                                int64_t dim = -1) {
  static const auto op = detail::find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, c10::SymInt, int64_t)>(
      "sdgp::decompress_nm");
  return op.call(values, indices, m, size, dim);
}

// Multiplies a tensor (..., ceil(size / m) * n), compressed along its last dimension, by `dense` (size, cols). Returns
// (..., cols), which equals decompress_nm(values, indices, m, size).matmul(dense) up to rounding. Pruned values cost
// nothing.
inline at::Tensor spmm_nm(const at::Tensor& values, const at::Tensor& indices, int64_t m, const at::Tensor& dense) {
  static const auto op =
      detail::find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&)>("sdgp::spmm_nm");
  return op.call(values, indices, m, dense);
}

}  // namespace sdgp
