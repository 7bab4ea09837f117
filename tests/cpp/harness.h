// SPDX-License-Identifier: BSD-3-Clause
//
// What the kernels' tests share: expectations that are counted, and a main that skips where the CPU lacks the
// instruction set.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace sdgp::test {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

inline int run(void (*test)()) {
  try {
    std::printf("kernels of %s\n", kernels().isa);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  test();
  std::printf(failures ? "%d failures\n" : "passed\n", failures);
  return failures != 0;
}

}  // namespace sdgp::test
