// SPDX-License-Identifier: BSD-3-Clause
//
// C functions that return facts about the built library. They tell a program whether this machine's driver can run the
// library. They do not initialize CUDA.
#include <cuda_runtime_api.h>

#include "driver.h"

#define SDGP_EXPORT extern "C" __attribute__((visibility("default")))

// Returns the version of the CUDA runtime in CUDA's notation: 13000 is 13.0.
SDGP_EXPORT int sdgp_cuda_runtime() { return CUDART_VERSION; }

// Returns the newest version of CUDA that the driver supports, or 0 if there is no driver.
SDGP_EXPORT int sdgp_cuda_driver() { return sdgp::cuda::driver_version(); }
