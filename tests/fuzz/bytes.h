// SPDX-License-Identifier: BSD-3-Clause
//
// What a fuzzer's bytes say: choices first, one byte or two each, then the bits of values; after the last byte, bits
// that a generator draws, seeded by all of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdgp::test {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {
    for (size_t i = 0; i < size; ++i) hash_ = (hash_ ^ data[i]) * 0x100000001b3u;
    state_ = hash_;
  }

  // True for one of `count` inputs, however alike they are: what is slow stays rare, whatever a fuzzer looks for.
  bool one_in(uint64_t count) const { return (hash_ >> 32) % count == 0; }

  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  bool flag() { return byte() & 1; }

  int64_t below(int64_t end) {
    int64_t choice = byte();
    if (end > 256) choice = choice << 8 | byte();
    return choice % end;
  }

  uint64_t word() {
    uint64_t bits = 0;
    if (at_ < size_) {
      for (int i = 0; i < 8; ++i) bits = bits << 8 | byte();
      return bits;
    }
    state_ = state_ * 0x5851f42d4c957f2du + 0x14057b7ef767814fu;
    return state_ ^ state_ >> 33;
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint64_t hash_ = 0xcbf29ce484222325u;
  uint64_t state_;
};

}  // namespace sdgp::test
