// SPDX-License-Identifier: BSD-3-Clause
//
// _pack_24: a matrix pruned along its rows, as the operand of PyTorch's semi-structured product. One dimension of
// [kept values (rows, cols / 2)][metadata], rows and cols rounded up to whole tiles, the missing elements zero.
#include "../../cpp/ops/pack_24.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels.h"
#include "prune_cuda.h"

namespace sdgp {
namespace {

int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

Tensor pack_24_cuda(const Tensor& input, int64_t n, int64_t m, std::string_view method,
                    const std::optional<Tensor>& seed, std::string_view layout) {
  PackCall call = validate_pack(input, n, m, method, seed, layout);
  const torch::stable::accelerator::DeviceGuard guard(device_of(input).index);
  cuda::PackArgs args{};
  args.rows = round_up(input.size(0), cuda::kTileRows);
  args.cols = round_up(input.size(1), cuda::kTileCols);
  const int64_t size = args.rows * args.cols / 16 * 9;  // half the values, and two bits for each of them
  Tensor packed = torch::stable::new_empty(input, {&size, 1});
  if (size == 0) return packed;

  // What one pass cannot do is pruned first; packing then keeps what is left.
  Tensor source = input;
  if (call.prune.method == Method::kRescale || !cuda::packs(m)) {
    source = torch::stable::empty_like(input);
    prune_into_cuda(input, source, call.prune, n, m, seed, false);
    call.prune.method = Method::kMagnitude;
    n = 2;
    m = 4;
  }
  if (source.stride(1) != 1) source = torch::stable::contiguous(source);
  std::optional<Tensor> drawn;
  args.seed = seed_pointer(input, call.prune, seed, drawn);
  args.in = source.const_data_ptr();
  args.in_rows = source.size(0);
  args.in_cols = source.size(1);
  args.row_stride = source.stride(0);
  args.dtype = call.prune.dtype;
  args.method = call.prune.method;
  args.n = static_cast<int>(n);
  args.m = static_cast<int>(m);
  args.layout = call.layout;
  args.packed = packed.mutable_data_ptr();
  cuda::pack_24(args, current_stream(input));
  return packed;
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CUDA, library) { library.impl("_pack_24", TORCH_BOX(&sdgp::pack_24_cuda)); }
