// SPDX-License-Identifier: BSD-3-Clause
//
// spmm_nm: compressed rows times a dense matrix.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "memory.h"
#include "multiply.h"

namespace sdgp {
namespace {

// The output's shape is known from the arguments alone: (..., cols).
int64_t validate_spmm(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  constexpr const char* kOp = "spmm_nm";
  check_strided(kOp, dense);
  check(dense.dim() == 2, kOp, ": expected dense (size, cols), got ", name_of_shape(dense));
  check_dim(kOp, values, -1);
  const int64_t n = check_compressed(kOp, values, indices, m, dense.size(0), values.dim() - 1);
  check_same_dtype(kOp, values, "dense", dense);
  check_same_device(kOp, values, "dense", dense);
  return n;
}

Tensor spmm_nm_cpu(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  const int64_t n = validate_spmm(values, indices, m, dense);
  const int64_t ndim = values.dim();
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < ndim; ++d) {
    sizes.push_back(values.size(d));
    rows *= values.size(d);
  }
  sizes.push_back(dense.size(1));
  Tensor output = torch::stable::new_empty(values, sizes);
  if (output.numel() == 0) return output;
  prefer_huge_pages(output);
  if (dense.size(0) == 0) return torch::stable::fill_(output, 0.0);
  const Tensor kept = torch::stable::contiguous(values);
  const Tensor kept_indices = torch::stable::contiguous(indices);
  const int64_t kept_size = values.size(ndim - 1);
  SpmmArgs args{.gradient = nullptr,
                .values = kept.const_data_ptr(),
                .indices = kept_indices.const_data_ptr<uint8_t>(),
                .sample_stride = kept_size,
                .row_stride = kept_size,
                .group_stride = 0,
                .dense = dense.const_data_ptr(),
                .dense_row_stride = dense.stride(0),
                .dense_col_stride = dense.stride(1),
                .dense_height_stride = 0,
                .dense_width_stride = 0,
                .packed = nullptr,
                .out = output.mutable_data_ptr(),
                .out_channels_first = false,
                .dtype = check_dtype("spmm_nm", values),
                .n = static_cast<int>(n),
                .m = static_cast<int>(m),
                .size = dense.size(0),
                .cols = dense.size(1),
                .groups = 1,
                .samples = rows,
                .height = {1, 1, 1, 1, 0, 1},
                .width = {1, 1, 1, 1, 0, 1},
                .threads = 1};
  multiply("spmm_nm", values, args);
  return output;
}

Tensor spmm_nm_unsupported(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  validate_spmm(values, indices, m, dense);
  refuse_device("spmm_nm", values);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) { library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_unsupported));
}
