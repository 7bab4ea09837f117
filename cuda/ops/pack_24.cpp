// SPDX-License-Identifier: BSD-3-Clause
//
// _pack_24 prunes a matrix along its rows and returns the operand of PyTorch's semi-structured product. The result has
// one dimension: [kept values (rows, cols / 2)][metadata]. Rows and cols are rounded up to whole tiles with zeros.
#include "../../cpp/ops/pack_24.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/cuda_kernels.h"
#include "prune_cuda.h"

namespace sdgp {
namespace {

int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

Tensor pack_24_cuda(const Tensor& input, const SettingsAlong<-1>& settings, std::string_view layout) {
  auto [call, known_layout] = validate_pack(input, settings, layout);
  const torch::stable::accelerator::DeviceGuard guard(device_of(input).index);
  const int64_t rows = round_up(input.size(0), kTileRows);
  const int64_t cols = round_up(input.size(1), kTileCols);
  const int64_t size = rows * cols / 16 * 9;  // half of the values, and 2 bits for each of these
  Tensor packed = torch::stable::new_empty(input, {&size, 1});
  if (size == 0) return packed;

  // If one pass cannot do it, the input is pruned first. Packing then keeps all that is left.
  Tensor source = input;
  if (!traits(call.pruning.method).by_group || !contains(PackedSizes{}, call.pruning.m)) {
    source = torch::stable::empty_like(input);
    prune_into_cuda(input, source, call);
    call.pruning = {.method = Method::kMagnitude, .n = 2, .m = 4, .seed = 0, .scale = false};
  }
  const bool columns = cuda::packs_columns(call.pruning.m) && source.stride(0) == 1;
  if (source.stride(1) != 1 && !columns) source = torch::stable::contiguous(source);
  std::optional<Tensor> held;
  const cuda::PackArgs args{.in = source.const_data_ptr(),
                            .in_rows = source.size(0),
                            .in_cols = source.size(1),
                            .row_stride = source.stride(0),
                            .col_stride = source.stride(1),
                            .dtype = call.dtype,
                            .pruning = call.pruning,
                            .seed = seed_on_device(input, call, held),
                            .layout = known_layout,
                            .rows = rows,
                            .cols = cols,
                            .packed = packed.mutable_data_ptr()};
  cuda::launch_pack_24(args, current_stream(input));
  return packed;
}

}  // namespace
}  // namespace sdgp

STABLE_TORCH_LIBRARY_IMPL(sdgp, CUDA, library) { library.impl("_pack_24", SDGP_BOX(&sdgp::pack_24_cuda)); }
