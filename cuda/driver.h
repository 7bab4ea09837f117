// SPDX-License-Identifier: BSD-3-Clause
//
// Asks the driver itself which version of CUDA it supports. The runtime would initialize CUDA on its first call, and a
// process that has initialized CUDA can no longer fork workers that use it.
#pragma once

#include <dlfcn.h>

namespace sdgp::cuda {

// Returns the version in CUDA's notation (13000 is 13.0), or 0 if there is no driver.
inline int driver_version() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver) return 0;
  int version = 0;
  // This is the only driver function that needs no cuInit first. The library stays open because torch loads it too.
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  return get && get(&version) == 0 ? version : 0;
}

}  // namespace sdgp::cuda
