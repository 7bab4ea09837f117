// SPDX-License-Identifier: BSD-3-Clause
#define SDGP_ISA avx512
#define SDGP_ISA_NAME "avx512"
#include "isa-inl.h"

namespace sdgp::avx512 {
const Kernels bfloat16_table = make_table<true>("avx512_bf16");
}
