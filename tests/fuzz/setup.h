// SPDX-License-Identifier: BSD-3-Clause
//
// Shared code of the cases of every kernel: the instruction sets of this CPU, the number of calls, and the size limit
// of a case.
#pragma once

#include <cstdint>
#include <vector>

#include "values.h"

namespace sdgp::test {

inline int64_t calls = 0;

inline std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&sdgp::avx512::table);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&sdgp::avx512::bfloat16_table);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&sdgp::avx2::table);
#endif
  found.push_back(&sdgp::baseline::table);
  return found;
}

inline const std::vector<const Kernels*> kTables = tables();

// Cases that take milliseconds are rare. Most are faster.
inline int64_t draw_limit(const Bytes& bytes) { return bytes.one_in(2048) ? 80000 : bytes.one_in(32) ? 4000 : 600; }

}  // namespace sdgp::test
