// SPDX-License-Identifier: BSD-3-Clause
//
// Arrays between guard pages. They detect an access outside the array without AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace sdgp::test {

// `size` elements that begin right after a guard page or end right before one.
template <class T>
class Guarded {
 public:
  Guarded(int64_t size, bool at_end) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    const size_t inside = (bytes + page - 1) / page * page;
    length_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    data = reinterpret_cast<T*>(base_ + page + (at_end ? inside - bytes : 0));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, length_); }

  T* data;

 private:
  char* base_;
  size_t length_;
};

}  // namespace sdgp::test
