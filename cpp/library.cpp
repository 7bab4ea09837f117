// SPDX-License-Identifier: BSD-3-Clause
//
// Every op of sdgp. A leading underscore: not API.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sdgp, library) {
  library.def(
      "prune_nm(Tensor input, int n, int m, int dim=-1, str method=\"magnitude\", Tensor? seed=None) -> Tensor");
  library.def(
      "_prune_nm_scale(Tensor input, int n, int m, int dim=-1, str method=\"magnitude\", Tensor? seed=None) -> Tensor");
}
