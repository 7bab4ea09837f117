// SPDX-License-Identifier: BSD-3-Clause
//
// The settings of pruning, shared by the ops and the kernels of every device: element types, methods with their
// properties, and the settings of a call. This header does not use torch.
#pragma once

#include <cstdint>
#include <iterator>

#include "visit.h"

namespace sdgp {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct DTypeTraits {
  DType value;
  const char* name;  // PyTorch's name
  int size;          // bytes of an element
  int sum_size;      // bytes of the type of its sums
};
inline constexpr DTypeTraits kDTypes[] = {{DType::kFloat32, "float32", 4, 4},
                                          {DType::kFloat64, "float64", 8, 8},
                                          {DType::kFloat16, "float16", 2, 4},
                                          {DType::kBFloat16, "bfloat16", 2, 4}};
using DTypes = EnumValues<DType, std::size(kDTypes)>;

constexpr const DTypeTraits& traits(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

enum class Method { kMagnitude, kRandom, kRescale, kRescaleGroup, kMvue, kUnstructured };

struct MethodTraits {
  Method value;
  const char* name;
  bool draws;     // draws random numbers, so it takes a seed
  bool by_group;  // pruning a group needs only that group and the settings, no sums over the tensor
  bool fixed;     // every group keeps n values; otherwise n of m is a mean
  bool unbiased;  // the mean over the draws is the input
};
inline constexpr MethodTraits kMethods[] = {{Method::kMagnitude, "magnitude", false, true, true, false},
                                            {Method::kRandom, "random", true, true, true, false},
                                            {Method::kRescale, "rescale", false, false, true, false},
                                            {Method::kRescaleGroup, "rescale_group", false, true, true, false},
                                            {Method::kMvue, "mvue", true, true, true, true},
                                            {Method::kUnstructured, "unstructured", true, true, false, true}};

constexpr const MethodTraits& traits(Method method) { return kMethods[static_cast<int>(method)]; }

constexpr bool prunes_by_group(Method method) { return traits(method).by_group; }

using Methods = EnumValues<Method, std::size(kMethods)>;
using GroupMethods = Filtered<Methods, prunes_by_group>;

constexpr bool keeps_n(Method method) { return traits(method).fixed; }

// The methods of the CUDA kernels.
using FixedMethods = Filtered<Methods, keeps_n>;
using FixedGroupMethods = Filtered<GroupMethods, keeps_n>;

// A table lists the values of its enum in their order.
template <class Table>
constexpr bool is_in_order(const Table& table) {
  int count = 0;
  for (const auto& row : table) {
    if (static_cast<int>(row.value) != count++) return false;
  }
  return true;
}
static_assert(is_in_order(kDTypes) && is_in_order(kMethods));

constexpr int kMaxGroupSize = 64;

// How a call prunes. Ops pass this struct to the kernel unchanged.
struct Pruning {
  Method method;
  int n;
  int m;
  uint64_t seed;    // for methods that draw; CUDA kernels read it on the device
  bool scale;       // write the multipliers (0 where pruned) instead of the pruned values
  double step = 0;  // unstructured: larger values stay unchanged

  // Inlined even in builds without optimization: the linker may keep one shared copy, compiled for an instruction set
  // that this CPU lacks.
  __attribute__((always_inline)) constexpr bool keeps_all() const { return n == m; }

  // Returns whether all groups of a size keep equally many values.
  __attribute__((always_inline)) constexpr bool fixed() const {
    return kMethods[static_cast<int>(method)].fixed || keeps_all();
  }
};

}  // namespace sdgp
