// SPDX-License-Identifier: BSD-3-Clause
//
// Code that the sparse products on the CPU share: it checks arguments, allocates the output and calls the kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "prune_args.h"

namespace sdgp {

constexpr Axis2d kPoint{1, 1, 1, 1, 0, 1};

// A product as the kernel sees it: the data gradient of a convolution. A matrix product has one pixel per sample and
// one tap.
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

// The names of an op's operands in messages.
struct OperandNames {
  const char* like;  // "the input is"
  const char* dense;
};

// Checks the arguments that are common to all products that prune their left operand on the way.
PruneCall validate_product(const char* op, const OperandNames& names, const Tensor& input, const Tensor& dense,
                           const Settings& settings);

// Allocates a tensor (..., cols) with the leading dimensions of `rows`.
Tensor empty_rows(const Tensor& rows, int64_t cols);
int64_t count_rows(const Tensor& rows);

// Prepares an output for writing. Returns false if nothing is left to do: either the output is empty, or its sums have
// no terms and it is now zero.
bool prepare_output(Tensor& output, bool has_terms);

// `dense` is (groups x size, cols) or, for a convolution, (groups x size, cols, height, width), with any strides.
void multiply(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output);
void multiply(const Product& product, const CompressedRows& rows, const Tensor& dense, Tensor& output);

// Returns whether `multiply` uses the permute kernel. The kernel is equally fast if
// the rows of the gradient lie side by side in memory.
bool permutes(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output);

}  // namespace sdgp
