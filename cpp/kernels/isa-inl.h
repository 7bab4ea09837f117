// SPDX-License-Identifier: BSD-3-Clause
//
// The kernel tables of one instruction set. isa_<name>.cpp compiles this file with the flags of that instruction set
// and SDGP_ISA = <name>. Everything here is in namespace SDGP_ISA and calls no inline function of the standard library:
// the linker would keep a single copy of that function, perhaps one with instructions that this CPU lacks.
#include "compress_nm-inl.h"
#include "permute_nm-inl.h"
#include "permute_weight_grad-inl.h"
#include "spmm_nm-inl.h"
#include "table.h"
#include "weight_grad_nm-inl.h"

namespace sdgp::SDGP_ISA {
// kPairs: products of bfloat16 multiply in pairs, by the permute kernel where it supports them, or by the row kernel.
template <bool kPairs>
constexpr Kernels make_table(const char* isa) {
  Kernels made{
      .isa = isa,
      .prune_nm_units = &prune_nm_units,
      .prune_nm = &prune_nm_kernel,
      .compress_nm_units = &compress_nm_units,
      .compress_nm = &compress_nm_kernel,
      .decompress_nm = &decompress_nm_kernel,
      .permutes = [](const SpmmArgs&) { return false; },
      .packed_bytes = &packed_bytes<kPairs>,
      .pack_units = &pack_units<kPairs>,
      .pack = &pack<kPairs>,
      .spmm_nm_units = &spmm_nm_units<kPairs>,
      .spmm_nm = &spmm_nm_kernel<kPairs>,
      .weight_grad_nm_units = &weight_grad_nm_units<kPairs>,
      .weight_grad_nm = &weight_grad_nm_kernel<kPairs>,
  };
#if defined(__AVX512F__)
  if constexpr (kPairs) {
    made.permutes = &permutes;
    made.packed_bytes = [](const SpmmArgs& args) {
      return permutes(args) ? table_bytes(args) : packed_bytes<true>(args);
    };
    made.pack_units = [](const SpmmArgs& args) { return permutes(args) ? table_units(args) : pack_units<true>(args); };
    made.pack = [](const SpmmArgs& args, int64_t begin, int64_t end) {
      permutes(args) ? make_tables(args, begin, end) : pack<true>(args, begin, end);
    };
    made.spmm_nm_units = [](const SpmmArgs& args) {
      return permutes(args) ? permute_nm_units(args) : spmm_nm_units<true>(args);
    };
    made.spmm_nm = [](const SpmmArgs& args, int64_t begin, int64_t end) {
      return permutes(args) ? permute_nm_kernel(args, begin, end) : spmm_nm_kernel<true>(args, begin, end);
    };
    made.weight_grad_nm_units = [](const WeightGradArgs& args) {
      return permutes_weight(args) ? permute_weight_grad_units(args) : weight_grad_nm_units<true>(args);
    };
    made.weight_grad_nm = [](const WeightGradArgs& args, int64_t begin, int64_t end) {
      permutes_weight(args) ? permute_weight_grad_kernel(args, begin, end)
                            : weight_grad_nm_kernel<true>(args, begin, end);
    };
  }
#endif
  return made;
}

const Kernels table = make_table<false>(SDGP_ISA_NAME);

}  // namespace sdgp::SDGP_ISA
