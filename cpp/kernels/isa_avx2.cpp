// SPDX-License-Identifier: BSD-3-Clause
#define SDGP_ISA avx2
#define SDGP_ISA_NAME "avx2"
#include "isa-inl.h"
