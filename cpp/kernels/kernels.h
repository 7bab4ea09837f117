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
  // Where this is a part of a larger tensor: the logical index of its first group, and the groups of a whole row; 0: of
  // these rows.
  uint64_t first_group;
  int64_t row_groups;
  int ndim;
  Dim dims[kMaxDims];  // the other dimensions, coalesced, outermost stride first
};

// Every group's kept values, in ascending order of their index, then pruned ones with the lowest index until there are
// n; what a shorter last group lacks is value 0, index 0. A row is groups x n, rows in logical order.
struct CompressArgs {
  PruneArgs prune;  // its `out` and output strides are not used
  bool pruned;      // the input is: pack it as it is
  void* values;
  uint8_t* indices;
};

struct DecompressArgs {
  const void* values;  // (rows, groups x n)
  const uint8_t* indices;
  void* out;  // (rows, size)
  int element_size;
  int n;
  int m;
  int64_t size;
  int64_t rows;
};

// One spatial dimension of a convolution: `in` is the result of the data gradient, `out` its operand.
struct Axis2d {
  int64_t in;
  int64_t out;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

// The gradient that enters a product, pruned on the way. Strides in elements.
struct Gradient {
  const void* data;
  Method method;  // not rescale, whose sums want all of it
  uint64_t seed;
  int64_t sample_stride;
  int64_t pixel_stride;
  int64_t channel_stride;
  bool by_group;  // logical rows are (sample, convolution group, pixel), else (sample, pixel)
};

// The data gradient of a convolution. A plain product is the one with 1 x 1 pixels and taps.
struct SpmmArgs {
  const Gradient* gradient;  // or null, then:
  const void* values;        // kept values, and their indices alike: strides in elements, a row's values consecutive
  const uint8_t* indices;
  int64_t sample_stride;
  int64_t row_stride;  // from pixel to pixel
  int64_t group_stride;
  const void* dense;  // the weight
  int64_t dense_row_stride;
  int64_t dense_col_stride;
  int64_t dense_height_stride;
  int64_t dense_width_stride;
  void* packed;
  void* out;
  bool out_channels_first;  // (samples, channels, height, width), else channels last
  DType dtype;
  int n;
  int m;
  int64_t size;  // of the reduction, per convolution group
  int64_t cols;  // of the result, per convolution group
  int64_t groups;
  int64_t samples;
  Axis2d height;
  Axis2d width;
  int64_t threads;  // that share the units
};

struct Kernels {
  const char* isa;
  // Work is cut into units that depend on the arguments alone, so that no result depends on the number of threads.
  int64_t (*prune_nm_units)(const PruneArgs&);
  void (*prune_nm)(const PruneArgs&, int64_t begin, int64_t end);
  int64_t (*compress_nm_units)(const CompressArgs&);
  void (*compress_nm)(const CompressArgs&, int64_t begin, int64_t end);
  bool (*decompress_nm)(const DecompressArgs&, int64_t begin, int64_t end);  // of rows; false: an index out of range
  int64_t (*packed_size)(const SpmmArgs&);  // elements: float64 for float64, else float32
  int64_t (*pack_units)(const SpmmArgs&);
  void (*pack)(const SpmmArgs&, int64_t begin, int64_t end);
  int64_t (*spmm_nm_units)(const SpmmArgs&);
  bool (*spmm_nm)(const SpmmArgs&, int64_t begin, int64_t end);  // false: an index out of range
};

// The best table that this CPU runs, or the one that the environment variable SDGP_FORCE_ISA names.
// Throws std::runtime_error where that name is unknown or the CPU lacks the instruction set.
const Kernels& kernels();

// Of one core, as the system tells; 32 KiB where it does not.
int64_t first_level_cache_bytes();

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
