// SPDX-License-Identifier: BSD-3-Clause
//
// What is pruned and how, in the words that the ops and the kernels of every device share: element types, methods and
// what is known of each, the settings of a call. No torch here.
#pragma once

#include <cstdint>
#include <iterator>

#include "visit.h"

namespace sdgp {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct DTypeTraits {
  DType value;
  const char* name;  // PyTorch's
  int size;          // bytes of an element
  int sum_size;      // of the type that its sums run in
};
inline constexpr DTypeTraits kDTypes[] = {{DType::kFloat32, "float32", 4, 4},
                                          {DType::kFloat64, "float64", 8, 8},
                                          {DType::kFloat16, "float16", 2, 4},
                                          {DType::kBFloat16, "bfloat16", 2, 4}};
using DTypes = EnumValues<DType, std::size(kDTypes)>;

constexpr const DTypeTraits& traits(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

enum class Method { kMagnitude, kRandom, kRescale, kRescaleGroup, kMvue };

struct MethodTraits {
  Method value;
  const char* name;
  bool draws;     // random numbers: it takes a seed
  bool by_group;  // pruning a group needs that group alone, no sums over all of the tensor
};
inline constexpr MethodTraits kMethods[] = {{Method::kMagnitude, "magnitude", false, true},
                                            {Method::kRandom, "random", true, true},
                                            {Method::kRescale, "rescale", false, false},
                                            {Method::kRescaleGroup, "rescale_group", false, true},
                                            {Method::kMvue, "mvue", true, true}};

constexpr const MethodTraits& traits(Method method) { return kMethods[static_cast<int>(method)]; }

constexpr bool prunes_by_group(Method method) { return traits(method).by_group; }

using Methods = EnumValues<Method, std::size(kMethods)>;
using GroupMethods = Filtered<Methods, prunes_by_group>;

// A table lists its enum's values in their order.
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

// How a call prunes. It travels whole from the op to the kernel.
struct Pruning {
  Method method;
  int n;
  int m;
  uint64_t seed;  // for methods that draw; on CUDA it is read on the device
  bool scale;     // write the multipliers (0 where pruned), not the pruned values

  // Inlined without optimization too: code that instruction sets share may be compiled for one that the CPU lacks.
  __attribute__((always_inline)) constexpr bool keeps_all() const { return n == m; }
};

}  // namespace sdgp
