// SPDX-License-Identifier: BSD-3-Clause
//
// The table through which ops reach the CPU kernels. Each instruction set has one; `kernels()` picks one at
// first use.
#pragma once

#include "args.h"

namespace sdgp {

struct Kernels {
  const char* isa;
  // Work is cut into units that depend on the arguments alone, so that no result depends on the number of threads.
  int64_t (*prune_nm_units)(const PruneArgs&);
  void (*prune_nm)(const PruneArgs&, int64_t begin, int64_t end);
  int64_t (*compress_nm_units)(const CompressArgs&);
  void (*compress_nm)(const CompressArgs&, int64_t begin, int64_t end);
  bool (*decompress_nm)(const DecompressArgs&, int64_t begin, int64_t end);  // of rows; false: an index out of range
  // Whether spmm_nm multiplies these by the permute kernel, which is as fast for gradients whose rows lie side by side.
  bool (*permutes)(const SpmmArgs&);
  int64_t (*packed_bytes)(const SpmmArgs&);
  int64_t (*pack_units)(const SpmmArgs&);
  void (*pack)(const SpmmArgs&, int64_t begin, int64_t end);
  int64_t (*spmm_nm_units)(const SpmmArgs&);
  bool (*spmm_nm)(const SpmmArgs&, int64_t begin, int64_t end);  // false: an index out of range
  int64_t (*weight_grad_nm_units)(const WeightGradArgs&);
  void (*weight_grad_nm)(const WeightGradArgs&, int64_t begin, int64_t end);
};

// The best table that this CPU runs, or the one that the environment variable SDGP_FORCE_ISA names.
// Throws std::runtime_error where that name is unknown or the CPU lacks the instruction set.
const Kernels& kernels();

// Of one core, as the system tells; 32 KiB where it does not.
int64_t first_level_cache_bytes();

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
extern const Kernels bfloat16_table;
}  // namespace avx512

}  // namespace sdgp
