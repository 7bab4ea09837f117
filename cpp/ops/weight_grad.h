// SPDX-License-Identifier: BSD-3-Clause
//
// Calls the weight-gradient kernel for the ops that compute a weight gradient.
#pragma once

#include "multiply.h"

namespace sdgp {

// A convolution's weight gradient as the kernel sees it. A matrix product has one tap, and its reduction runs over the
// pixels of one sample.
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

// `input` is (samples, groups x cols, height, width), `output` is (groups x rows, cols, kernel height, kernel width).
// For a matrix product, they are (pixels, cols) and (rows, cols).
void multiply(const WeightProduct& product, const Gradient& gradient, const Tensor& input, Tensor& output);

}  // namespace sdgp
