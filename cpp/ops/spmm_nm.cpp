// SPDX-License-Identifier: BSD-3-Clause
//
// spmm_nm and _conv2d_input_grad_nm: compressed rows times a dense matrix, and the same for a convolution's data
// gradient. Both describe themselves as a convolution; a plain product has 1 x 1 pixels and one tap.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks.h"
#include "../kernels/kernels.h"
#include "memory.h"
#include "views.h"

namespace sdgp {
namespace {

constexpr int64_t kAlignment = 64;

// Packs the dense operand, then multiplies. `op` begins the message about an index out of range.
void multiply(const char* op, const Tensor& values, SpmmArgs& args) {
  const Kernels& table = kernels();
  const bool is_double = args.dtype == DType::kFloat64;
  const int64_t element_size = is_double ? sizeof(double) : sizeof(float);
  const int64_t packed_size = table.packed_size(args) + kAlignment / element_size;
  Tensor packed =
      torch::stable::new_empty(values, {&packed_size, 1}, is_double ? ScalarType::Double : ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(packed.mutable_data_ptr());
  args.packed = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  torch::stable::parallel_for(0, table.pack_units(args), 1,
                              [&](int64_t begin, int64_t end) { table.pack(args, begin, end); });
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, table.spmm_nm_units(args), 1, [&](int64_t begin, int64_t end) {
    if (!table.spmm_nm(args, begin, end)) valid = false;
  });
  check(valid, op, ": expected every index below ", args.m, " and inside the size ", args.size,
        ", got one that is not");
}

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
  SpmmArgs args{.values = kept.const_data_ptr(),
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
                .width = {1, 1, 1, 1, 0, 1}};
  multiply("spmm_nm", values, args);
  return output;
}

Tensor spmm_nm_unsupported(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& dense) {
  validate_spmm(values, indices, m, dense);
  refuse_device("spmm_nm", values);
}

constexpr const char* kConvOp = "_conv2d_input_grad_nm";

int64_t pair_at(const char* name, const std::vector<int64_t>& pair, size_t at, int64_t least) {
  check(pair.size() == 2, kConvOp, ": expected ", name, " to be a pair, got ", pair.size(), " numbers");
  check(pair[at] >= least, kConvOp, ": expected ", name, " >= ", least, ", got ", pair[at]);
  return pair[at];
}

// Values are (samples, groups x kept, out height, out width), or (samples x groups, kept, ...) where a convolution
// group is no whole number of pruning groups.
SpmmArgs validate_conv2d(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& weight,
                         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check(values.dim() == 4, kConvOp, ": expected values (N, C, H, W), got ", name_of_shape(values));
  check_strided(kConvOp, weight);
  check(weight.dim() == 4, kConvOp, ": expected weight (out, in / groups, kH, kW), got ", name_of_shape(weight));
  check(groups >= 1 && weight.size(0) % groups == 0, kConvOp, ": expected groups that divide ", weight.size(0),
        " output channels, got ", groups);
  check_group_size(kConvOp, m);
  const int64_t size = weight.size(0) / groups;
  const bool apart = groups > 1 && size % m != 0;
  check(!apart || values.size(0) % groups == 0, kConvOp, ": expected samples x groups values, got ",
        name_of_shape(values), " for ", groups, " groups");
  const int64_t whole = apart ? size : weight.size(0);
  SpmmArgs args{};
  args.n = static_cast<int>(check_compressed(kConvOp, values, indices, m, whole, 1));
  check_same_dtype(kConvOp, values, "weight", weight);
  check_same_device(kConvOp, values, "weight", weight);
  args.dtype = check_dtype(kConvOp, values);
  args.m = static_cast<int>(m);
  args.size = size;
  args.cols = weight.size(1);
  args.groups = groups;
  args.samples = values.size(0) / (apart ? groups : 1);
  const auto axis = [&](size_t at) {
    const int64_t d = 2 + static_cast<int64_t>(at);
    return Axis2d{.in = pair_at("input_size", input_size, at, 0),
                  .out = values.size(d),
                  .kernel = weight.size(d),
                  .stride = pair_at("stride", stride, at, 1),
                  .padding = pair_at("padding", padding, at, 0),
                  .dilation = pair_at("dilation", dilation, at, 1)};
  };
  args.height = axis(0);
  args.width = axis(1);
  const int64_t kept = values.size(1);
  const int64_t pixels = args.height.out * args.width.out;
  args.row_stride = kept;
  args.sample_stride = pixels * kept * (apart ? groups : 1);
  args.group_stride = apart ? pixels * kept : kept / groups;
  return args;
}

Tensor conv2d_input_grad_nm_cpu(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& weight,
                                const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                int64_t groups, bool channels_last) {
  SpmmArgs args = validate_conv2d(values, indices, m, weight, input_size, stride, padding, dilation, groups);
  const int64_t channels = args.cols * groups;
  const std::vector<int64_t> sizes = channels_last ? std::vector{args.samples, args.height.in, args.width.in, channels}
                                                   : std::vector{args.samples, channels, args.height.in, args.width.in};
  Tensor output = torch::stable::new_empty(values, sizes);
  if (channels_last) output = movedim(output, -1, 1);
  if (output.numel() == 0) return output;
  prefer_huge_pages(output);
  if (values.numel() == 0 || weight.numel() == 0) return torch::stable::fill_(output, 0.0);
  const Tensor kept = torch::stable::contiguous(movedim(values, 1, -1));
  const Tensor kept_indices = torch::stable::contiguous(movedim(indices, 1, -1));
  args.values = kept.const_data_ptr();
  args.indices = kept_indices.const_data_ptr<uint8_t>();
  args.dense = weight.const_data_ptr();
  args.dense_row_stride = weight.stride(0);
  args.dense_col_stride = weight.stride(1);
  args.dense_height_stride = weight.stride(2);
  args.dense_width_stride = weight.stride(3);
  args.out = output.mutable_data_ptr();
  args.out_channels_first = !channels_last;
  multiply(kConvOp, values, args);
  return output;
}

Tensor conv2d_input_grad_nm_unsupported(const Tensor& values, const Tensor& indices, int64_t m, const Tensor& weight,
                                        const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        int64_t groups, bool) {
  validate_conv2d(values, indices, m, weight, input_size, stride, padding, dilation, groups);
  refuse_device(kConvOp, values);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_cpu));
  library.impl("_conv2d_input_grad_nm", TORCH_BOX(&sdgp::conv2d_input_grad_nm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("spmm_nm", TORCH_BOX(&sdgp::spmm_nm_unsupported));
  library.impl("_conv2d_input_grad_nm", TORCH_BOX(&sdgp::conv2d_input_grad_nm_unsupported));
}
