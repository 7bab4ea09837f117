// SPDX-License-Identifier: BSD-3-Clause
//
// The kernel table of one instruction set: what isa_<name>.cpp compiles, with that set's flags and SDGP_ISA = <name>.
// Everything here lives in namespace SDGP_ISA and calls no inline function of the standard library: the linker would
// keep one copy of it for all, perhaps the one with instructions that this CPU lacks.
#include "compress_nm-inl.h"
#include "spmm_nm-inl.h"
#include "table.h"
#include "weight_grad_nm-inl.h"

namespace sdgp::SDGP_ISA {
const Kernels table{
    .isa = SDGP_ISA_NAME,
    .prune_nm_units = &prune_nm_units,
    .prune_nm = &prune_nm,
    .compress_nm_units = &compress_nm_units,
    .compress_nm = &compress_nm,
    .decompress_nm = &decompress_nm,
    .packed_bytes = &packed_bytes,
    .pack_units = &pack_units,
    .pack = &pack,
    .spmm_nm_units = &spmm_nm_units,
    .spmm_nm = &spmm_nm,
    .weight_grad_nm_units = &weight_grad_nm_units,
    .weight_grad_nm = &weight_grad_nm,
};

}  // namespace sdgp::SDGP_ISA
