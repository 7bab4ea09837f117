// SPDX-License-Identifier: BSD-3-Clause
#define SDGP_ISA baseline
#define SDGP_ISA_NAME "baseline"
#include "isa-inl.h"
