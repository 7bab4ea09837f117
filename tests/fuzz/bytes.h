// SPDX-License-Identifier: BSD-3-Clause
//
// Decodes a fuzzer's bytes: first choices of one or two bytes each, then the bits of values. After the last byte, a
// generator that is seeded by all bytes draws the bits.
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

  // Returns true for one in `count` inputs, however similar they are. So slow cases stay rare whatever the fuzzer
  // seeks.
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
