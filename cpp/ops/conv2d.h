// SPDX-License-Identifier: BSD-3-Clause
//
// Code that the two gradients of a convolution share: it checks the geometry and describes the output gradient to the
// kernels.
#pragma once

#include <vector>

#include "multiply.h"

namespace sdgp {

// The arguments of a convolution other than its tensors. Each vector is a pair of height and width.
struct Window {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

inline void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair, int64_t least) {
  check(pair.size() == 2, op, ": expected ", name, " to be a pair, got ", pair.size(), " numbers");
  for (const int64_t value : pair) check(value >= least, op, ": expected ", name, " >= ", least, ", got ", value);
}

inline void check_window(const char* op, const Window& window, int64_t channels) {
  check(window.groups >= 1 && channels % window.groups == 0, op, ": expected groups that divide ", channels,
        " output channels, got ", window.groups);
  check_pair(op, "stride", window.stride, 1);
  check_pair(op, "padding", window.padding, 0);
  check_pair(op, "dilation", window.dilation, 1);
}

// Returns the output gradient (N, C, H, W) with one stride from pixel to pixel. Copies it if it has no such stride.
inline Tensor with_pixel_stride(const Tensor& grad_output) {
  const bool has_one = grad_output.size(2) == 1 || grad_output.size(3) == 1 ||
                       grad_output.stride(2) == grad_output.size(3) * grad_output.stride(3);
  return has_one ? grad_output : torch::stable::contiguous(grad_output);
}

inline Gradient describe_gradient(const Tensor& grad_output, bool by_conv_group = false) {
  return {.data = grad_output.const_data_ptr(),
          .sample_stride = grad_output.stride(0),
          .pixel_stride = grad_output.size(3) == 1 ? grad_output.stride(2) : grad_output.stride(3),
          .channel_stride = grad_output.stride(1),
          .by_conv_group = by_conv_group};
}

}  // namespace sdgp
