// SPDX-License-Identifier: BSD-3-Clause
//
// What every sparse product on the CPU ends with.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "../checks.h"
#include "../kernels/kernels.h"

namespace sdgp {

// Packs the dense operand, then multiplies. `like` is of the operands' device; `op` begins the message about an index
// out of range.
inline void multiply(const char* op, const Tensor& like, SpmmArgs& args) {
  constexpr int64_t kAlignment = 64;
  const Kernels& table = kernels();
  const bool is_double = args.dtype == DType::kFloat64;
  const int64_t element_size = is_double ? sizeof(double) : sizeof(float);
  const int64_t packed_size = table.packed_size(args) + kAlignment / element_size;
  Tensor packed = torch::stable::new_empty(like, {&packed_size, 1}, is_double ? ScalarType::Double : ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(packed.mutable_data_ptr());
  args.packed = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  torch::stable::parallel_for(0, table.pack_units(args), 1,
                              [&](int64_t begin, int64_t end) { table.pack(args, begin, end); });
  args.threads = torch::stable::get_num_threads();
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, table.spmm_nm_units(args), 1, [&](int64_t begin, int64_t end) {
    if (!table.spmm_nm(args, begin, end)) valid = false;
  });
  check(valid, op, ": expected every index below ", args.m, " and inside the size ", args.size,
        ", got one that is not");
}

}  // namespace sdgp
