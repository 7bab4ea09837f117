// SPDX-License-Identifier: BSD-3-Clause
//
// The version of CUDA that the driver knows, asked of the driver itself. Not of the runtime: that initializes CUDA on
// its first call, and a process that has done so can no longer fork workers that use it.
#pragma once

#include <dlfcn.h>

namespace sdgp::cuda {

// As CUDA writes versions: 13000 is 13.0; 0: there is no driver.
inline int driver_version() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver) return 0;
  int version = 0;
  // The one function of the driver that needs no cuInit before it. The library stays open: torch loads it too.
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  return get && get(&version) == 0 ? version : 0;
}

}  // namespace sdgp::cuda
