// SPDX-License-Identifier: BSD-3-Clause
//
// What the CPU kernels take and the table through which ops reach them. No torch here: raw pointers, sizes in
// elements, a seed. One table is compiled per instruction set; `kernels()` picks one at first use.
#pragma once

#include <cstdint>

namespace sdgp {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class Method { kMagnitude, kRandom, kRescale, kRescaleGroup, kMvue };

struct MethodName {
  const char* name;
  Method method;
};
inline constexpr MethodName kMethods[] = {{"magnitude", Method::kMagnitude},
                                          {"random", Method::kRandom},
                                          {"rescale", Method::kRescale},
                                          {"rescale_group", Method::kRescaleGroup},
                                          {"mvue", Method::kMvue}};

constexpr int kMaxGroupSize = 64;
constexpr int kMaxDims = 64;

// One dimension other than the pruned one. Strides are in elements; `row_step` is how far one step along it moves the
// logical row index, the row-major index over all the other dimensions.
struct Dim {
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t row_step;
  bool per_factor;  // rescale: a factor is not shared along this dimension
};

struct PruneArgs {
  const void* in;
  void* out;
  DType dtype;
  Method method;
  bool scale;  // write the multipliers (0 where pruned), not the pruned values
  int n;
  int m;
  uint64_t seed;
  int64_t size;  // along the pruned dimension
  int64_t in_stride;
  int64_t out_stride;
  bool dim_per_factor;  // rescale: a factor is not shared along the pruned dimension
  int ndim;
  Dim dims[kMaxDims];  // the other dimensions, coalesced, outermost stride first
};

struct Kernels {
  const char* isa;
  // Work is cut into units that depend on the arguments alone, so that no result depends on the number of threads.
  int64_t (*prune_nm_units)(const PruneArgs&);
  void (*prune_nm)(const PruneArgs&, int64_t begin, int64_t end);
};

// The best table that this CPU runs, or the one that the environment variable SDGP_FORCE_ISA names.
// Throws std::runtime_error where that name is unknown or the CPU lacks the instruction set.
const Kernels& kernels();

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

}  // namespace sdgp
