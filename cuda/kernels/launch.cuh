// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sdgp::cuda {

constexpr int kThreads = 256;
constexpr uint64_t kMostBlocks = 0x7fffffff;

// Declares an array that the threads of a block share.
#if defined(__CUDACC__)
#define SDGP_SHARED(type, name, count) __shared__ type name[count]
#else
#define SDGP_SHARED(type, name, count) \
  type* const name = cuda_stand_in::shared<type, static_cast<size_t>(count), decltype([] {})>()
#endif

// Launches a kernel. Every launch goes through this function, so that the tests can replace it on the host.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), uint64_t blocks, unsigned threads, void* stream,
            const Arguments&... arguments) {
  if (blocks > kMostBlocks) throw std::runtime_error("CUDA launches at most 2^31 - 1 blocks");
  const auto grid = static_cast<unsigned>(blocks);
#if defined(__CUDACC__)
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  static_cast<void>(stream);
  cuda_stand_in::launch(kernel, grid, threads, arguments...);
#endif
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": CUDA could not launch the kernel: " + cudaGetErrorString(error));
}

inline uint64_t blocks_of(uint64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace sdgp::cuda
