// SPDX-License-Identifier: BSD-3-Clause
//
// One input of a fuzzer is one case: arguments of the torch-free kernels, then values. Every instruction set that this
// CPU runs must give what scalar code gives, or what follows from the specification, bit for bit the same whatever the
// pieces that the work is cut into, and touch nothing outside its arrays.
#include "weight_grad_nm.h"

namespace {

using namespace sdgp::test;

template <class F>
void fuzz(Bytes& bytes) {
  const uint8_t kernel = bytes.byte();
  if (kernel >= 192) return fuzz_weight_grad<F>(bytes);
  switch (kernel % 3) {
    case 0: return fuzz_prune<F>(bytes);
    case 1: return fuzz_compress<F>(bytes);
    default: return fuzz_product<F>(bytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit([] { std::printf("%lld kernel calls\n", static_cast<long long>(calls)); });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.below(4)) {
    case 0: fuzz<Real<float>>(bytes); break;
    case 1: fuzz<Real<double>>(bytes); break;
    case 2: fuzz<Half>(bytes); break;
    default: fuzz<BFloat16>(bytes);
  }
  return 0;
}
