// SPDX-License-Identifier: BSD-3-Clause
//
// What the sparse products on the CPU share: their checks, their output, and the call of the kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "prune_args.h"

namespace sdgp {

constexpr Axis2d kPoint{1, 1, 1, 1, 0, 1};

// A product as the kernel knows it, a convolution's data gradient; a plain one has 1 x 1 pixels and taps.
struct Product {
  const char* op;  // begins the message about an index out of range
  DType dtype;
  Pruning pruning;
  int64_t samples;
  int64_t groups = 1;
  Axis2d height = kPoint;
  Axis2d width = kPoint;
  bool channels_first = false;
};

// What the messages of an op call its operands.
struct OperandNames {
  const char* like;  // "the input is"
  const char* dense;
};

// The arguments of a product whose left operand is pruned on the way, checked as far as they are alike.
PruneCall validate_product(const char* op, const OperandNames& names, const Tensor& input, const Tensor& dense,
                           const Settings& settings);

// (..., cols), with the leading dimensions of `rows`.
Tensor empty_rows(const Tensor& rows, int64_t cols);
int64_t count_rows(const Tensor& rows);

// Makes an output ready to be written to. False where nothing is left to do: it is empty, or every sum in it is.
bool begin_output(Tensor& output, bool has_terms);

// `dense`: (groups x size, cols) or, of a convolution, (groups x size, cols, height, width), any strides.
void multiply(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output);
void multiply(const Product& product, const CompressedRows& rows, const Tensor& dense, Tensor& output);

// Whether `multiply` takes the permute kernel, which is as fast for gradients whose rows lie side by side.
bool permutes(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output);

}  // namespace sdgp
