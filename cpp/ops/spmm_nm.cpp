// SPDX-License-Identifier: BSD-3-Clause
//
// spmm_nm multiplies compressed rows by a dense matrix.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "multiply.h"

namespace sdgp {
namespace {

constexpr const char* kOp = "spmm_nm";

// Checks the arguments and returns n.
int64_t validate(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  check_strided(kOp, dense);
  check(dense.dim() == 2, kOp, ": expected dense (size, cols), got ", name_of_shape(dense));
  check_dim(kOp, values, -1);
  const int64_t n = check_compressed(kOp, values, indices, m, dense.size(0), values.dim() - 1);
  check_same_dtype(kOp, values, "dense", dense, "the values are");
  check_same_device(kOp, values, "dense", dense);
  return n;
}

Tensor spmm_nm_cpu(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  const int64_t n = validate(values, indices, m, dense);
  Tensor output = empty_rows(values, dense.size(1));
  if (!prepare_output(output, dense.size(0) > 0)) return output;
  const Tensor kept = torch::stable::contiguous(values);
  const Tensor kept_indices = torch::stable::contiguous(indices);
  const int64_t kept_size = values.size(values.dim() - 1);
  const Pruning pruning{.method = Method::kMagnitude,  // whatever method pruned the values
                        .n = static_cast<int>(n),
                        .m = static_cast<int>(m),
                        .seed = 0,
                        .scale = false};
  multiply({.op = kOp, .dtype = check_dtype(kOp, values), .pruning = pruning, .samples = count_rows(values)},
           CompressedRows{.values = kept.const_data_ptr(),
                          .indices = kept_indices.const_data_ptr<uint8_t>(),
                          .sample_stride = kept_size,
                          .row_stride = kept_size,
                          .group_stride = 0},
           dense, output);
  return output;
}

Tensor spmm_nm_unsupported(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  validate(values, indices, m, dense);
  refuse_device(kOp, values);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) { library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_unsupported));
}
