// SPDX-License-Identifier: BSD-3-Clause
//
// What ops require of their arguments, each requirement and its message once, for every device. A message reads
// `op: requirement, got actual`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/kernels.h"

namespace sdgp {

using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK: it puts the function, file and line before the message, which here is for the caller.
template <class... Args>
void check(bool ok, const Args&... message) {
  if (ok) [[likely]] {
    return;
  }
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline Method check_method(const char* op, std::string_view name) {
  std::string known;
  for (const auto& [text, method] : kMethods) {
    if (text == name) return method;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  check(false, op, ": expected method to be one of ", known, ", got \"", name, "\"");
  __builtin_unreachable();
}

inline bool is_random(Method method) { return method == Method::kRandom || method == Method::kMvue; }

inline void check_pattern(const char* op, int64_t n, int64_t m) {
  check(1 <= n && n <= m && m <= kMaxGroupSize, op, ": expected 1 <= n <= m <= ", kMaxGroupSize, ", got n=", n,
        ", m=", m);
}

inline void check_strided(const char* op, const Tensor& input) {
  const char* name = "another";
  switch (input.layout()) {
    case Layout::Strided: return;
    case Layout::Sparse: name = "sparse_coo"; break;
    case Layout::SparseCsr: name = "sparse_csr"; break;
    case Layout::SparseCsc: name = "sparse_csc"; break;
    case Layout::SparseBsr: name = "sparse_bsr"; break;
    case Layout::SparseBsc: name = "sparse_bsc"; break;
    case Layout::Mkldnn: name = "mkldnn"; break;
    default: break;
  }
  check(false, op, ": expected a strided tensor, got layout ", name, "; call .to_dense() first");
}

inline const char* device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "another device";
}

// The dtype is read through the C shim: Tensor::scalar_type() throws its own message for those it does not know.
inline DType check_dtype(const char* op, const Tensor& input) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  const std::pair<int32_t, const char*> others[] = {
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"}};
  const char* name = "another dtype";
  for (const auto& [other, text] : others) {
    if (dtype == other) name = text;
  }
  check(false, op, ": expected float32, float64, float16 or bfloat16, got ", name);
  __builtin_unreachable();
}

// Returns `dim` counted from the front.
inline int64_t check_dim(const char* op, const Tensor& input, int64_t dim) {
  const int64_t ndim = input.dim();
  check(ndim >= 1, op, ": expected at least 1 dimension, got a scalar");
  check(ndim <= kMaxDims, op, ": expected at most ", kMaxDims, " dimensions, got ", ndim);
  check(-ndim <= dim && dim < ndim, op, ": expected dim in [", -ndim, ", ", ndim - 1, "], got ", dim);
  return dim < 0 ? dim + ndim : dim;
}

inline void check_seed(const char* op, const Tensor& input, const std::optional<Tensor>& seed) {
  if (!seed) return;
  check(seed->scalar_type() == ScalarType::Long, op, ": expected seed to be int64, got ",
        torch::headeronly::toString(seed->scalar_type()));
  check(seed->numel() == 1, op, ": expected seed to have one element, got ", seed->numel());
  check(seed->device() == input.device(), op, ": expected seed on the input's device (", device_name(input), "), got ",
        device_name(*seed));
}

}  // namespace sdgp
