// SPDX-License-Identifier: BSD-3-Clause
//
// Facts about the built library, in C, for whoever loads it: they tell whether this machine's driver can run it. Asking
// leaves CUDA uninitialized.
#include <cuda_runtime_api.h>

#include "driver.h"

#define SDGP_EXPORT extern "C" __attribute__((visibility("default")))

// As CUDA writes versions: 13000 is 13.0.
SDGP_EXPORT int sdgp_cuda_runtime() { return CUDART_VERSION; }

// The newest CUDA that the driver knows; 0: there is no driver.
SDGP_EXPORT int sdgp_cuda_driver() { return sdgp::cuda::driver_version(); }
