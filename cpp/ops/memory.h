// SPDX-License-Identifier: BSD-3-Clause
//
// Note [Huge pages]
// glibc maps an allocation of 32 MiB or more (its largest mmap threshold) fresh from the system. The first use of this
// memory takes one page fault per 4 KiB, which costs more than writing the page. With huge pages, it is one page fault
// per 2 MiB. The allocation is a mapping of its own, so nothing else changes. A system may ignore this hint.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdgp {

inline void prefer_huge_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kFresh = uintptr_t{32} << 20;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  if (bytes < kFresh) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace sdgp
