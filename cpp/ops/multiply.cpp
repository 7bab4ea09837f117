// SPDX-License-Identifier: BSD-3-Clause
#include "multiply.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "../kernels/table.h"
#include "memory.h"

namespace sdgp {
namespace {

SpmmArgs describe(const Product& product, const Tensor& dense, Tensor& output) {
  const bool has_taps = dense.dim() == 4;
  return {.dtype = product.dtype,
          .pruning = product.pruning,
          .gradient = nullptr,
          .compressed = {},
          .dense = {.data = dense.const_data_ptr(),
                    .row_stride = dense.stride(0),
                    .col_stride = dense.stride(1),
                    .height_stride = has_taps ? dense.stride(2) : 0,
                    .width_stride = has_taps ? dense.stride(3) : 0},
          .packed = nullptr,
          .out = output.mutable_data_ptr(),
          .out_channels_first = product.channels_first,
          .size = dense.size(0) / product.groups,
          .cols = dense.size(1),
          .groups = product.groups,
          .samples = product.samples,
          .height = product.height,
          .width = product.width,
          .threads = torch::stable::get_num_threads()};
}

// Packs the dense operand and then multiplies.
void run(const char* op, const Tensor& like, SpmmArgs& args) {
  constexpr int64_t kAlignment = 64;
  const Kernels& table = kernels();
  const int64_t bytes = table.packed_bytes(args) + kAlignment;
  Tensor packed = torch::stable::new_empty(like, {&bytes, 1}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(packed.mutable_data_ptr());
  args.packed = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  torch::stable::parallel_for(0, table.pack_units(args), 1,
                              [&](int64_t begin, int64_t end) { table.pack(args, begin, end); });
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, table.spmm_nm_units(args), 1, [&](int64_t begin, int64_t end) {
    if (!table.spmm_nm(args, begin, end)) valid = false;
  });
  check(valid, op, ": expected every index below ", args.pruning.m, " and inside the size ", args.size,
        ", got a larger one");
}

}  // namespace

PruneCall validate_product(const char* op, const OperandNames& names, const Tensor& input, const Tensor& dense,
                           const Settings& settings) {
  const PruneCall call = validate_prune(op, input, settings);
  const MethodTraits& known = traits(call.pruning.method);
  check(known.by_group, op, ": expected a method that needs one group at a time, got ", known.name,
        "; prune by it, then call this by magnitude");
  check_strided(op, dense);
  check_same_dtype(op, input, names.dense, dense, names.like);
  check_same_device(op, input, names.dense, dense);
  return call;
}

Tensor empty_rows(const Tensor& rows, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < rows.dim(); ++d) sizes.push_back(rows.size(d));
  sizes.push_back(cols);
  return torch::stable::new_empty(rows, sizes);
}

int64_t count_rows(const Tensor& rows) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < rows.dim(); ++d) count *= rows.size(d);
  return count;
}

bool prepare_output(Tensor& output, bool has_terms) {
  if (output.numel() == 0) return false;
  prefer_huge_pages(output);
  if (!has_terms) torch::stable::fill_(output, 0.0);
  return has_terms;
}

void multiply(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output) {
  SpmmArgs args = describe(product, dense, output);
  args.gradient = &rows;
  run(product.op, output, args);
}

bool permutes(const Product& product, const Gradient& rows, const Tensor& dense, Tensor& output) {
  SpmmArgs args = describe(product, dense, output);
  args.gradient = &rows;
  return kernels().permutes(args);
}

void multiply(const Product& product, const CompressedRows& rows, const Tensor& dense, Tensor& output) {
  SpmmArgs args = describe(product, dense, output);
  args.compressed = rows;
  run(product.op, output, args);
}

}  // namespace sdgp
