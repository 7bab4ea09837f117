// SPDX-License-Identifier: BSD-3-Clause
//
// The arguments of the kernels: raw pointers, sizes and strides in elements, and the settings of a call. CUDA kernels
// share PruneArgs. This header does not use torch.
//
// The words for parts of the work, from the largest to the smallest:
//   unit    what one thread takes at a time: usually one part of one chunk
//   chunk   consecutive result rows (prune_nm: consecutive rows or groups)
//   part    a share of a chunk's columns; as PruneArgs and in rescale: some of a tensor
//   slab    the blocks or windows whose kept values are in memory at the same time (rescale: three nested axes)
//   span    the blocks of one sample that are pruned together (weight gradient)
//   panel   columns of a product, at most 8 vectors wide
//   block   what the L1 cache holds at a time: some of the reduction, for one panel (rescale: L2 cache, whole sums)
//   window  up to 32 reduction rows, whole groups, whose dense values fit one lookup table (permute kernel)
//   patch   the rectangle of input that some output pixels read (weight gradient)
//   piece   rows or groups that are pruned, copied or prefetched in one step
//   tile    one group per lane of a vector (permute kernel: what is pruned at a time; 2:4 operand: 128 x 64 elements)
//   sheet   two nested axes of a slab (rescale)
//   line    one row of an image; in sums, consecutive elements along one axis
//   strip   the elements that a packed line takes from one line of the input
//   run     consecutive elements in memory
//   group   m consecutive values, n of which stay
#pragma once

#include "pruning.h"

namespace sdgp {

constexpr int kMaxDims = 64;

// One dimension other than the pruned one. Strides are in elements. The logical row index is the row-major index over
// all the other dimensions; one step along this dimension adds `row_step` to it.
struct Dim {
  int64_t size;
  int64_t in_stride;
  int64_t out_stride;
  int64_t row_step;
  bool per_factor;  // rescale: each index along this dimension has its own factor
};

struct PruneArgs {
  const void* in;
  void* out;
  DType dtype;
  Pruning pruning;
  int64_t size;  // along the pruned dimension
  int64_t in_stride;
  int64_t out_stride;
  bool dim_per_factor;  // rescale: each index along the pruned dimension has its own factor
  // If these rows belong to a larger tensor: the logical index of their first group, and the groups in a whole row of
  // that tensor. 0 stands for the groups in a row here.
  uint64_t first_group;
  int64_t row_groups;
  int ndim;
  Dim dims[kMaxDims];  // the other dimensions, coalesced, outermost stride first
};

// Each group has n values in ascending order of their index: the kept values and, if there are fewer than n, pruned
// values with the lowest indices. A shorter last group is filled with value 0, index 0. A row is groups x n; rows are
// in logical order.
struct CompressArgs {
  PruneArgs prune;  // `out` and the output strides are not used
  bool pruned;      // the input is already pruned and is only packed
  void* values;
  uint8_t* indices;
};

struct DecompressArgs {
  const void* values;  // (rows, groups x n)
  const uint8_t* indices;
  void* out;  // (rows, size)
  DType dtype;
  int n;
  int m;
  int64_t size;
  int64_t rows;
};

// One spatial dimension of a convolution: `in` is the size of the data gradient, `out` is the size of the output
// gradient.
struct Axis2d {
  int64_t in;
  int64_t out;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

// The left operand of a product that prunes it on the way. The method must work group by group.
struct Gradient {
  const void* data;
  int64_t sample_stride;
  int64_t pixel_stride;
  int64_t channel_stride;
  bool by_conv_group;  // logical rows are (sample, convolution group, pixel), otherwise (sample, pixel)
};

// The left operand of a product if it is already compressed. Values and indices have the same strides; the kept values
// of a row are contiguous.
struct CompressedRows {
  const void* values;
  const uint8_t* indices;
  int64_t sample_stride;
  int64_t row_stride;  // from one pixel to the next
  int64_t group_stride;
};

// The right operand, the weight of a layer: (groups x size, cols, height, width).
struct DenseOperand {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
  int64_t height_stride;
  int64_t width_stride;
};

// The data gradient of a convolution. A plain product is a convolution with one pixel per sample and one tap.
struct SpmmArgs {
  DType dtype;
  Pruning pruning;
  const Gradient* gradient;  // if null, `compressed` is used
  CompressedRows compressed;
  DenseOperand dense;
  void* packed;  // memory for the packed dense operand, aligned to a cache line
  void* out;
  bool out_channels_first;  // (samples, channels, height, width), otherwise channels last
  int64_t size;             // length of the reduction, per convolution group
  int64_t cols;             // columns of the result, per convolution group
  int64_t groups;
  int64_t samples;
  Axis2d height;
  Axis2d width;
  int64_t threads;  // number of threads that share the units
};

// The weight gradient of a convolution: (groups x rows, cols, kernel height, kernel width). A plain product has one
// tap, and its reduction runs over the pixels of one sample.
struct WeightGradArgs {
  DType dtype;
  Pruning pruning;    // along the pixels of a sample; the method must work group by group
  Gradient gradient;  // the output gradient: (samples, groups x rows, pixels)
  const void* input;  // (samples, groups x cols, height, width)
  int64_t sample_stride;
  int64_t col_stride;
  int64_t line_stride;
  int64_t pixel_stride;
  void* out;
  int64_t out_row_stride;
  int64_t out_col_stride;
  int64_t out_tap_stride;  // from one tap to the next, row-major
  int64_t rows;            // output channels, per convolution group
  int64_t cols;            // input channels, per convolution group
  int64_t groups;
  int64_t samples;
  Axis2d height;
  Axis2d width;
  int64_t threads;  // number of threads that share the units
};

}  // namespace sdgp
