// SPDX-License-Identifier: BSD-3-Clause
//
// What the kernels take: raw pointers, sizes and strides in elements, the settings of a call. PruneArgs is CUDA's too.
// No torch here.
#pragma once

#include "pruning.h"

namespace sdgp {

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
  Pruning pruning;
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
  DType dtype;
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

// The left operand of a product where it is pruned on the way, by a method that works group by group.
struct Gradient {
  const void* data;
  int64_t sample_stride;
  int64_t pixel_stride;
  int64_t channel_stride;
  bool by_group;  // logical rows are (sample, convolution group, pixel), else (sample, pixel)
};

// The left operand where it is compressed already: values and indices alike, a row's kept values consecutive.
struct CompressedRows {
  const void* values;
  const uint8_t* indices;
  int64_t sample_stride;
  int64_t row_stride;  // from pixel to pixel
  int64_t group_stride;
};

// The right operand, a layer's weight: (groups x size, cols, height, width).
struct DenseOperand {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
  int64_t height_stride;
  int64_t width_stride;
};

// The data gradient of a convolution. A plain product is the one with 1 x 1 pixels and taps.
struct SpmmArgs {
  DType dtype;
  Pruning pruning;
  const Gradient* gradient;  // or null, then:
  CompressedRows compressed;
  DenseOperand dense;
  void* packed;  // the dense operand's room, aligned to a cache line
  void* out;
  bool out_channels_first;  // (samples, channels, height, width), else channels last
  int64_t size;             // of the reduction, per convolution group
  int64_t cols;             // of the result, per convolution group
  int64_t groups;
  int64_t samples;
  Axis2d height;
  Axis2d width;
  int64_t threads;  // that share the units
};

// The weight gradient of a convolution: (groups x rows, cols, kernel height, kernel width). A plain product is the one
// with 1 x 1 taps; its reduction is the pixels of one sample.
struct WeightGradArgs {
  DType dtype;
  Pruning pruning;    // along the pixels of a sample, by a method that works group by group
  Gradient gradient;  // of the output: (samples, groups x rows, pixels)
  const void* input;  // (samples, groups x cols, height, width)
  int64_t sample_stride;
  int64_t col_stride;
  int64_t line_stride;
  int64_t pixel_stride;
  void* out;
  int64_t out_row_stride;
  int64_t out_col_stride;
  int64_t out_tap_stride;  // from tap to tap, row-major
  int64_t rows;            // output channels, per convolution group
  int64_t cols;            // input channels, per convolution group
  int64_t groups;
  int64_t samples;
  Axis2d height;
  Axis2d width;
  int64_t threads;  // that share the units
};

}  // namespace sdgp
