# SPDX-License-Identifier: BSD-3-Clause
"""Compares the sparse product with PyTorch's, for weight gradients of linear layers and channels_last convolutions.

Prints one line per shape and pattern, like spmm_nm.py and conv2d.py. The output gradient is pruned along the tokens or
pixels.

    python benchmarks/weight_grad.py                            # everything, ten minutes or so
    python benchmarks/weight_grad.py --shape 3x3 --pattern 8:16 4:16
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import conv2d
import spmm_nm
import torch
from gradients import Case, main

from sdgp._autograd import Conv2dWeightProducts, LinearWeightProducts


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, features_in, features_out in spmm_nm.SHAPES:
        grad_output = torch.randn(tokens, features_out, dtype=dtype)
        input = torch.randn(tokens, features_in, dtype=dtype)
        weight = torch.empty(features_out, features_in, dtype=dtype)
        yield Case(
            name=f"linear {tokens}, {features_in} -> {features_out}",
            grad_output=grad_output,
            operand=input,
            result_bytes=weight.nbytes,
            flop=2 * tokens * features_in * features_out,
            products=partial(LinearWeightProducts, grad_output, input, weight, False),
        )
    for shape in conv2d.SHAPES:
        input, grad_output, weight = conv2d.tensors(shape, dtype)
        yield Case(
            name=conv2d.name(shape),
            grad_output=grad_output,
            operand=input,
            result_bytes=weight.nbytes,
            flop=2 * grad_output.numel() * shape.channels_in * shape.kernel**2,
            products=partial(Conv2dWeightProducts, grad_output, input, weight, conv2d.geometry(shape)),
        )


if __name__ == "__main__":
    main("weight_grad", __doc__, cases)
