// SPDX-License-Identifier: BSD-3-Clause
#include "sdgp/build_info.h"

#include "kernels/table.h"

const char* sdgp_version() { return SDGP_VERSION; }

const char* sdgp_isa() { return sdgp::kernels().isa; }
