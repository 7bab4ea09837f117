// SPDX-License-Identifier: BSD-3-Clause
//
// The checks that ops make on their arguments. Each check and its message stands here once and serves every device. A
// message reads `op: requirement, got actual`.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels/args.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // missing before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace sdgp {

using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// These messages are for the caller. STD_TORCH_CHECK would put the function, the file and the line before the message.
template <class... Args>
void check(bool ok, const Args&... message) {
  if (ok) [[likely]] {
    return;
  }
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// Lists the names of a table's rows for a message: "a, b or c".
template <class Table>
std::string names_of(const Table& table, const char* last = " or ") {
  std::string text;
  size_t left = std::size(table);
  for (const auto& row : table) {
    text += row.name;
    if (--left > 0) text += left == 1 ? last : ", ";
  }
  return text;
}

inline Method check_method(const char* op, std::string_view name) {
  for (const MethodTraits& known : kMethods) {
    if (name == known.name) return known.value;
  }
  check(false, op, ": expected method to be one of ", names_of(kMethods, ", "), ", got \"", name, "\"");
  __builtin_unreachable();
}

inline void check_pattern(const char* op, int64_t n, int64_t m) {
  check(1 <= n && n <= m && m <= kMaxGroupSize, op, ": expected 1 <= n <= m <= ", kMaxGroupSize, ", got n=", n,
        ", m=", m);
}

inline void check_strided(const char* op, const Tensor& input) {
  const char* name = "another";
  int32_t layout = 0;  // torch 2.10 has no Tensor::layout()
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(input.get(), &layout));
  switch (static_cast<Layout>(layout)) {
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

struct Device {
  int32_t type;
  int32_t index;
  bool operator==(const Device&) const = default;
};

// Uses the C shim because Tensor::device() throws its own message for device types that it does not know.
inline Device device_of(const Tensor& tensor) {
  Device device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

inline std::string name_of(const Device& device) {
  std::string text = "a device of type ";
  text += std::to_string(device.type);
  for (const char* name : {"cpu", "cuda", "meta", "xpu", "mps", "xla", "hpu", "mtia", "lazy", "privateuseone"}) {
    uint32_t type = 0;
    int32_t no_index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parse_device_string(name, &type, &no_index));
    if (static_cast<int32_t>(type) == device.type) text = name;
  }
  if (device.index >= 0) text.append(":").append(std::to_string(device.index));
  return text;
}

// Uses the C shim because Tensor::scalar_type() throws its own message for dtypes that it does not know.
inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Returns the name that Python prints. The switch translates names that are different in C++ ("Long"). All other names
// differ only in case.
inline std::string name_of_dtype(int32_t dtype) {
  const auto type = static_cast<ScalarType>(dtype);
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  std::string name = torch::headeronly::toString(type);
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return name;
}

inline DType check_dtype(const char* op, const Tensor& input) {
  const std::string name = name_of_dtype(dtype_of(input));
  for (const DTypeTraits& known : kDTypes) {
    if (name == known.name) return known.value;
  }
  check(false, op, ": expected ", names_of(kDTypes), ", got ", name);
  __builtin_unreachable();
}

// Checks `dim` and returns it counted from the front.
inline int64_t check_dim(const char* op, const Tensor& input, int64_t dim) {
  const int64_t ndim = input.dim();
  check(ndim >= 1, op, ": expected at least 1 dimension, got a scalar");
  check(ndim <= kMaxDims, op, ": expected at most ", kMaxDims, " dimensions, got ", ndim);
  check(-ndim <= dim && dim < ndim, op, ": expected dim in [", -ndim, ", ", ndim - 1, "], got ", dim);
  return dim < 0 ? dim + ndim : dim;
}

inline void check_seed(const char* op, const Tensor& input, const std::optional<Tensor>& seed) {
  if (!seed) return;
  if (const int32_t dtype = dtype_of(*seed); dtype != aoti_torch_dtype_int64()) {
    check(false, op, ": expected seed to be int64, got ", name_of_dtype(dtype));
  }
  check(seed->numel() == 1, op, ": expected seed to have one element, got ", seed->numel());
  const Device expected = device_of(input), actual = device_of(*seed);
  if (actual != expected) {
    check(false, op, ": expected seed on the input's device (", name_of(expected), "), got ", name_of(actual));
  }
}

// `devices` names the devices that have a kernel of this op.
[[noreturn]] inline void refuse_device(const char* op, const Tensor& input, const char* devices = "cpu") {
  check(false, op, ": expected a tensor on a device with an sdgp kernel (", devices, "), got ",
        name_of(device_of(input)));
  __builtin_unreachable();
}

inline void check_same_device(const char* op, const Tensor& first, const char* name, const Tensor& other) {
  const Device expected = device_of(first), actual = device_of(other);
  if (actual != expected) {
    check(false, op, ": expected ", name, " on the same device (", name_of(expected), "), got ", name_of(actual));
  }
}

// `like` names `first` in the message, for example "the input is".
inline void check_same_dtype(const char* op, const Tensor& first, const char* name, const Tensor& other,
                             const char* like) {
  const int32_t expected = dtype_of(first), actual = dtype_of(other);
  if (actual != expected) {
    check(false, op, ": expected ", name, " to be ", name_of_dtype(expected), " as ", like, ", got ",
          name_of_dtype(actual));
  }
}

inline std::string name_of_shape(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline void check_group_size(const char* op, int64_t m) {
  check(1 <= m && m <= kMaxGroupSize, op, ": expected 1 <= m <= ", kMaxGroupSize, ", got ", m);
}

// Checks compressed tensors. Each group of m has the same number n of `values` and `indices` along `dim`, which is
// counted from the front. Returns n.
inline int64_t check_compressed(const char* op, const Tensor& values, const Tensor& indices, int64_t m, int64_t size,
                                int64_t dim) {
  check_strided(op, values);
  check_strided(op, indices);
  check_dtype(op, values);
  check_group_size(op, m);
  check(size >= 0, op, ": expected size >= 0, got ", size);
  if (const int32_t dtype = dtype_of(indices); dtype != aoti_torch_dtype_uint8()) {
    check(false, op, ": expected indices to be uint8, got ", name_of_dtype(dtype));
  }
  check_same_device(op, values, "indices", indices);
  bool same = values.dim() == indices.dim();
  for (int64_t d = 0; same && d < values.dim(); ++d) same = values.size(d) == indices.size(d);
  if (!same) {
    check(false, op, ": expected values and indices of one shape, got ", name_of_shape(values), " and ",
          name_of_shape(indices));
  }
  const int64_t kept = values.size(dim);
  const int64_t groups = (size + m - 1) / m;
  const bool whole = groups == 0 ? kept == 0 : kept % groups == 0 && 1 <= kept / groups && kept / groups <= m;
  check(whole, op, ": expected the size of values to be ceil(", size, " / ", m, ") = ", groups,
        " groups times n, 1 <= n <= ", m, ", got ", kept);
  return groups == 0 ? 1 : kept / groups;
}

}  // namespace sdgp
