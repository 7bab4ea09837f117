// SPDX-License-Identifier: BSD-3-Clause
//
// Shared code of the kernel tests: expectations that report each failure once, and a main function that skips the test
// if the CPU lacks the instruction set.
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

// Says whether to skip the next of many similar cases. SDGP_TEST_SHARE=k keeps one case in k, for tools that slow a
// test down.
inline bool skip() {
  static const char* share = std::getenv("SDGP_TEST_SHARE");
  static int64_t count = 0;
  return share && ++count % std::atoi(share) != 0;
}

inline int run(void (*test)()) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // show each failure at once
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
