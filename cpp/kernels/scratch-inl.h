// SPDX-License-Identifier: BSD-3-Clause
//
// A buffer that a kernel reuses from one unit to the next.
#pragma once

#include <cstdint>
#include <new>

namespace sdgp::SDGP_ISA {

// The buffer only grows, and growing loses its content. It is aligned to a cache line.
template <class T>
struct Scratch {
  T* data = nullptr;
  int64_t size = 0;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete[](data, std::align_val_t{64}); }

  T* reserve(int64_t wanted) {
    if (wanted > size) {
      ::operator delete[](data, std::align_val_t{64});
      data = nullptr;
      size = 0;
      data = static_cast<T*>(::operator new[](static_cast<size_t>(wanted) * sizeof(T), std::align_val_t{64}));
      size = wanted;
    }
    return data;
  }
};

}  // namespace sdgp::SDGP_ISA
