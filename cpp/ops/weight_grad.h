// SPDX-License-Identifier: BSD-3-Clause
//
// The call of the weight-gradient kernel, for the ops that are one.
#pragma once

#include "multiply.h"

namespace sdgp {

// A convolution's weight gradient as the kernel knows it; a plain product has 1 x 1 taps and the pixels of one sample.
struct WeightProduct {
  DType dtype;
  Pruning pruning;
  int64_t rows;  // output channels, per group
  int64_t cols;  // input channels, per group
  int64_t samples = 1;
  int64_t groups = 1;
  Axis2d height = kPoint;
  Axis2d width = kPoint;
};

// `input`: (samples, groups x cols, height, width), `output`: (groups x rows, cols, kernel height, kernel width); or
// (pixels, cols) and (rows, cols).
void multiply(const WeightProduct& product, const Gradient& gradient, const Tensor& input, Tensor& output);

}  // namespace sdgp
