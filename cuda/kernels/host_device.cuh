// SPDX-License-Identifier: BSD-3-Clause
//
// Macros and helpers for device functions that also run on the host. Everything that a kernel's thread computes is in
// these functions, so the tests can run it without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SDGP_HOST_DEVICE __host__ __device__ __forceinline__
#define SDGP_PRAGMA(text) _Pragma(#text)
#define SDGP_UNROLL _Pragma("unroll")
#define SDGP_UNROLL_BY(times) SDGP_PRAGMA(unroll times)
#else
#define SDGP_HOST_DEVICE inline
#define SDGP_UNROLL
#define SDGP_UNROLL_BY(times)
#endif

namespace sdgp::cuda {

template <class To, class From>
SDGP_HOST_DEVICE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
SDGP_HOST_DEVICE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace sdgp::cuda
