// SPDX-License-Identifier: BSD-3-Clause
//
// Chooses the kernel table of this process and reads the size of the L1 cache.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "table.h"

namespace sdgp {
namespace {

struct Candidate {
  const Kernels* table;
  bool runs;  // on this CPU
  bool by_default;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_bfloat16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  // Intel CPUs multiply pairs of bfloat16 at half the rate, so the row kernel is faster there (Note [Permute kernel]).
  const bool fast_bfloat16 = __builtin_cpu_is("amd");
  // From best to worst.
  const Candidate candidates[] = {{&avx512::bfloat16_table, has_bfloat16, fast_bfloat16},
                                  {&avx512::table, has_avx512, true},
                                  {&avx2::table, has_avx2, true},
                                  {&baseline::table, true, true}};
#else
  const Candidate candidates[] = {{&baseline::table, true, true}};
#endif
  const char* forced = std::getenv("SDGP_FORCE_ISA");
  std::string usable;
  for (const auto& [table, runs, by_default] : candidates) {
    if (!runs) continue;
    if (!forced || !*forced ? by_default : std::string(forced) == table->isa) return *table;
    usable += (usable.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::runtime_error("SDGP_FORCE_ISA: expected an instruction set that this CPU runs (" + usable + "), got " +
                           forced);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t first_level_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    if (const long found = sysconf(_SC_LEVEL1_DCACHE_SIZE); found > 0) return static_cast<int64_t>(found);
#endif
    return int64_t{32768};
  }();
  return bytes;
}

int wide_loads_per_cycle() {
  static const int loads = [] {
#if defined(__x86_64__)
    // Zen 4 (family 25) splits them. Intel's CPUs and later ones of AMD do not.
    unsigned int signature = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd") && __get_cpuid(1, &signature, &b, &c, &d)) {
      const unsigned int family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
      if (family <= 25) return 1;
    }
#endif
    return 2;
  }();
  return loads;
}

}  // namespace sdgp
