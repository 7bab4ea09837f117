// SPDX-License-Identifier: BSD-3-Clause
//
// What the kernels' tests share: expectations, each failure told once, and a main that skips where the CPU lacks the
// instruction set.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#include "kernels/table.h"

namespace sdgp::test {

inline std::set<std::string> failures;

inline void expect(bool ok, const std::string& what) {
  if (!ok && failures.insert(what).second) std::printf("FAILED: %s\n", what.c_str());
}

// Whether to skip the next of many like cases: all but one in SDGP_TEST_SHARE, for tools that slow a test down.
inline bool skip() {
  static const char* share = std::getenv("SDGP_TEST_SHARE");
  static int64_t count = 0;
  return share && ++count % std::atoi(share) != 0;
}

inline int run(void (*test)()) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // who waits for the first failure sees it at once
  try {
    std::printf("kernels of %s\n", kernels().isa);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  test();
  std::printf(failures.empty() ? "passed\n" : "%zu failures\n", failures.size());
  return !failures.empty();
}

}  // namespace sdgp::test
