// SPDX-License-Identifier: BSD-3-Clause
#include "weight_grad.h"

#include <torch/csrc/stable/ops.h>

#include "../kernels/table.h"

namespace sdgp {

void multiply(const WeightProduct& product, const Gradient& gradient, const Tensor& input, Tensor& output) {
  const bool has_taps = input.dim() == 4;
  // The kernel takes one stride from tap to tap. If a row has only one tap, this is the stride along the height.
  const bool one_column = has_taps && output.size(3) == 1;
  const WeightGradArgs args{.dtype = product.dtype,
                            .pruning = product.pruning,
                            .gradient = gradient,
                            .input = input.const_data_ptr(),
                            .sample_stride = has_taps ? input.stride(0) : 0,
                            .col_stride = input.stride(1),
                            .line_stride = has_taps ? input.stride(2) : 0,
                            .pixel_stride = has_taps ? input.stride(3) : input.stride(0),
                            .out = output.mutable_data_ptr(),
                            .out_row_stride = output.stride(0),
                            .out_col_stride = output.stride(1),
                            .out_tap_stride = !has_taps    ? 0
                                              : one_column ? output.stride(2)
                                                           : output.stride(3),
                            .rows = product.rows,
                            .cols = product.cols,
                            .groups = product.groups,
                            .samples = product.samples,
                            .height = product.height,
                            .width = product.width,
                            .threads = torch::stable::get_num_threads()};
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, table.weight_grad_nm_units(args), 1,
                              [&](int64_t begin, int64_t end) { table.weight_grad_nm(args, begin, end); });
}

}  // namespace sdgp
