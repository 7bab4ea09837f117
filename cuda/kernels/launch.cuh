// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sdgp::cuda {

constexpr int kThreads = 256;

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": CUDA could not launch the kernel: " + cudaGetErrorString(error));
}

inline unsigned blocks_of(uint64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace sdgp::cuda
