// SPDX-License-Identifier: BSD-3-Clause
//
// Declares the schema of every op of sdgp. An op whose name begins with an underscore is not part of the public API.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sdgp, library) {
  library.def(
      "prune_nm(Tensor input, int n, int m, int dim=-1, str method=\"magnitude\", Tensor? seed=None) -> Tensor");
  library.def(
      "_prune_nm_scale(Tensor input, int n, int m, int dim=-1, str method=\"magnitude\", Tensor? seed=None) -> Tensor");
  library.def(
      "compress_nm(Tensor input, int n, int m, int dim=-1, str method=\"magnitude\", Tensor? seed=None) "
      "-> (Tensor values, Tensor indices)");
  library.def("decompress_nm(Tensor values, Tensor indices, int m, SymInt size, int dim=-1) -> Tensor");
  library.def("spmm_nm(Tensor values, Tensor indices, int m, Tensor dense) -> Tensor");
  library.def(
      "_prune_nm_matmul(Tensor input, Tensor dense, int n, int m, str method=\"magnitude\", Tensor? seed=None) "
      "-> Tensor");
  library.def(
      "_conv2d_input_grad_nm(Tensor grad_output, Tensor weight, int n, int m, str method, Tensor? seed, "
      "SymInt[] input_size, int[] stride, int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor");
  library.def(
      "_conv2d_weight_grad_nm(Tensor grad_output, Tensor input, int n, int m, str method, Tensor? seed, "
      "SymInt[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor");
  library.def(
      "_pack_24(Tensor input, int n, int m, str method=\"magnitude\", Tensor? seed=None, "
      "str layout=\"cusparselt_sm80\") -> Tensor");
}
