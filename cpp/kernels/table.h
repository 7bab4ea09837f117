// SPDX-License-Identifier: BSD-3-Clause
//
// The table through which ops call the CPU kernels. Each instruction set has one. `kernels()` chooses one at its first
// call.
#pragma once

#include "args.h"

namespace sdgp {

struct Kernels {
  const char* isa;
  // Work is divided into units that depend only on the arguments, so no result depends on the number of threads.
  int64_t (*prune_nm_units)(const PruneArgs&);
  void (*prune_nm)(const PruneArgs&, int64_t begin, int64_t end);
  int64_t (*compress_nm_units)(const CompressArgs&);
  void (*compress_nm)(const CompressArgs&, int64_t begin, int64_t end);
  // `begin` and `end` are rows. Returns false if an index is out of range.
  bool (*decompress_nm)(const DecompressArgs&, int64_t begin, int64_t end);
  // Whether the permute kernel computes this product.
  bool (*permutes)(const SpmmArgs&);
  int64_t (*packed_bytes)(const SpmmArgs&);
  int64_t (*pack_units)(const SpmmArgs&);
  void (*pack)(const SpmmArgs&, int64_t begin, int64_t end);
  int64_t (*spmm_nm_units)(const SpmmArgs&);
  bool (*spmm_nm)(const SpmmArgs&, int64_t begin, int64_t end);  // false: an index is out of range
  int64_t (*weight_grad_nm_units)(const WeightGradArgs&);
  void (*weight_grad_nm)(const WeightGradArgs&, int64_t begin, int64_t end);
};

// Returns the best table that this CPU runs, or the one that the environment variable SDGP_FORCE_ISA names. Throws
// std::runtime_error if that name is unknown or the CPU lacks the instruction set.
const Kernels& kernels();

// Returns the size of one core's L1 data cache, or 32 KiB if the system does not report it.
int64_t first_level_cache_bytes();

// Returns how many vectors of 64 bytes this CPU loads from its L1 cache in a cycle.
int wide_loads_per_cycle();

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
