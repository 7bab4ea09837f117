// SPDX-License-Identifier: BSD-3-Clause
//
// One fuzzer input is one case: the arguments of the torch-free kernels, then values. Every instruction set of this CPU
// must agree with scalar code or with the specification. The results must be the same bit for bit however the work is
// cut into pieces. No access may lie outside the arrays.
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
