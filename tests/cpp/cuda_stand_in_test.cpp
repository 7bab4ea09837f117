// SPDX-License-Identifier: BSD-3-Clause
//
// Tests the stand-in for CUDA's runtime with correct kernels, and with kernels that a GPU would hang on or refuse. The
// argument names the case to run.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr unsigned kThreads = 64;

// Each thread reads a value that another thread wrote.
template <bool kBarrier>
__global__ void reverse(unsigned* out) {
  unsigned* const shared = cuda_stand_in::shared<unsigned, kThreads, decltype([] {})>();
  shared[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void sum_warp(unsigned* out) {
  unsigned sum = threadIdx.x;
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  out[threadIdx.x] = sum;
}

__global__ void half_at_the_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void a_lane_has_left() {
  if (threadIdx.x != 7) __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void half_a_warp() { __shfl_xor_sync(0xffffu, 1, 1); }
__global__ void nothing() {}

int check(bool right) { return right ? 0 : 1; }

int run(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  unsigned out[2 * kThreads] = {};
  if (is("barrier") || is("no_barrier")) {
    cuda_stand_in::launch(is("barrier") ? &reverse<true> : &reverse<false>, 2, kThreads, &out[0]);
    bool right = true, poisoned = false;
    for (unsigned i = 0; i < 2 * kThreads; ++i) {
      right = right && out[i] == kThreads - 1 - i % kThreads;
      poisoned = poisoned || out[i] == 0xa5a5a5a5u;
    }
    return check(is("barrier") ? right : !right && poisoned);
  }
  if (is("shuffle")) {
    cuda_stand_in::launch(&sum_warp, 1, kThreads, &out[0]);
    return check(out[0] == 496 && out[31] == 496 && out[32] == 496 + 32 * 32 && cudaGetLastError() == cudaSuccess);
  }
  if (is("limits")) {
    cuda_stand_in::launch(&nothing, 0, kThreads);
    const bool no_blocks = cudaGetLastError() != cudaSuccess;
    cuda_stand_in::launch(&nothing, 1, 1025);
    return check(no_blocks && cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess);
  }
  if (is("half_at_the_barrier")) cuda_stand_in::launch(&half_at_the_barrier, 1, kThreads);
  if (is("a_lane_has_left")) cuda_stand_in::launch(&a_lane_has_left, 1, kThreads);
  if (is("half_a_warp")) cuda_stand_in::launch(&half_a_warp, 1, kThreads);
  return 1;  // not reached: launching one of these kernels ends the process
}

}  // namespace

int main(int, char** arguments) { return run(arguments[1]); }
