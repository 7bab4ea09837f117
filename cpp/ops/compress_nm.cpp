// SPDX-License-Identifier: BSD-3-Clause
//
// compress_nm and decompress_nm. The pruned dimension of a compressed tensor is innermost in memory for any strides of
// the input, because products read whole rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "../kernels/table.h"
#include "memory.h"
#include "prune_cpu.h"
#include "views.h"

namespace sdgp {
namespace {

// Returns a tensor with `like`'s shape, except that `dim` has the size `size` and is innermost in memory.
Tensor empty_innermost(const Tensor& like, int64_t dim, int64_t size, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < like.dim(); ++d) {
    if (d != dim) sizes.push_back(like.size(d));
  }
  sizes.push_back(size);
  return movedim(torch::stable::new_empty(like, sizes, dtype), -1, dim);
}

PruneCall validate(const Tensor& input, const Settings& settings) {
  const PruneCall call = validate_prune("compress_nm", input, settings);
  check(call.pruning.fixed(), "compress_nm: expected a method that keeps n values of each group, got ",
        traits(call.pruning.method).name);
  return call;
}

std::tuple<Tensor, Tensor> compress_nm_cpu(const Tensor& input, const Settings& settings) {
  const PruneCall call = validate(input, settings);
  const int64_t n = call.pruning.n, m = call.pruning.m;
  const int64_t kept = (input.size(call.dim) + m - 1) / m * n;
  Tensor values = empty_innermost(input, call.dim, kept, input.scalar_type());
  Tensor indices = empty_innermost(input, call.dim, kept, ScalarType::Byte);
  if (values.numel() == 0) return {values, indices};
  prefer_huge_pages(values);
  prefer_huge_pages(indices);

  CompressArgs args{};
  Tensor source = input;
  if (!traits(call.pruning.method).by_group && n != m) {  // the order of its sums depends on the whole tensor
    source = torch::stable::empty_like(input);
    prune_into_cpu(input, source, call);
    args.pruned = true;
  }
  args.prune = describe_prune(source, source, call);
  args.prune.pruning = complete(input, call);
  args.values = values.mutable_data_ptr();
  args.indices = indices.mutable_data_ptr<uint8_t>();
  const Kernels& table = kernels();
  const int64_t units = table.compress_nm_units(args);
  torch::stable::parallel_for(0, units, grain_of(units, input.numel()),
                              [&](int64_t begin, int64_t end) { table.compress_nm(args, begin, end); });
  return {values, indices};
}

std::tuple<Tensor, Tensor> compress_nm_unsupported(const Tensor& input, const Settings& settings) {
  validate(input, settings);
  refuse_device("compress_nm", input);
}

struct DecompressCall {
  DType dtype;
  int64_t n;
  int64_t dim;
};

DecompressCall validate_decompress(const Tensor& values, const Tensor& indices, int64_t m, int64_t size, int64_t dim) {
  const int64_t front_dim = check_dim("decompress_nm", values, dim);
  const int64_t n = check_compressed("decompress_nm", values, indices, m, size, front_dim);
  return {check_dtype("decompress_nm", values), n, front_dim};
}

Tensor decompress_nm_cpu(const Tensor& values, const Tensor& indices, int64_t m, int64_t size, int64_t dim) {
  const DecompressCall call = validate_decompress(values, indices, m, size, dim);
  Tensor output = empty_innermost(values, call.dim, size, values.scalar_type());
  if (output.numel() == 0) return output;
  const Tensor rows = torch::stable::contiguous(movedim(values, call.dim, -1));
  const Tensor row_indices = torch::stable::contiguous(movedim(indices, call.dim, -1));
  const DecompressArgs args{.values = rows.const_data_ptr(),
                            .indices = row_indices.const_data_ptr<uint8_t>(),
                            .out = output.mutable_data_ptr(),
                            .dtype = call.dtype,
                            .n = static_cast<int>(call.n),
                            .m = static_cast<int>(m),
                            .size = size,
                            .rows = output.numel() / size};
  const Kernels& table = kernels();
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, args.rows, grain_of(args.rows, output.numel()), [&](int64_t begin, int64_t end) {
    if (!table.decompress_nm(args, begin, end)) valid = false;
  });
  check(valid, "decompress_nm: expected every index below ", m, " and inside the size ", size, ", got a larger one");
  return output;
}

Tensor decompress_nm_unsupported(const Tensor& values, const Tensor& indices, int64_t m, int64_t size, int64_t dim) {
  validate_decompress(values, indices, m, size, dim);
  refuse_device("decompress_nm", values);
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CPU, library) {
  library.impl("compress_nm", SDGP_BOX(&sdgp::compress_nm_cpu));
  library.impl("decompress_nm", TORCH_BOX(&sdgp::decompress_nm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sdgp, CompositeExplicitAutograd, library) {
  library.impl("compress_nm", SDGP_BOX(&sdgp::compress_nm_unsupported));
  library.impl("decompress_nm", TORCH_BOX(&sdgp::decompress_nm_unsupported));
}
