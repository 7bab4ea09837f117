# SPDX-License-Identifier: BSD-3-Clause
"""Compares the sparse product with PyTorch's `grad_output @ weight`, for data gradients of linear layers.

Prints one line per shape (tokens, in -> out) and pattern: the time of the exact product; for each method, the time of
the sparse product, pruning included, and its speed as a multiple of the exact one's; the time of a clone() of the
gradient.

    python benchmarks/spmm_nm.py                                # everything, ten minutes or so
    python benchmarks/spmm_nm.py --shape "768 -> 3072" --pattern 2:4
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gradients import Case, main

from sdgp._autograd import LinearProducts, LinearWeightProducts

SHAPES = ((4096, 768, 3072), (4096, 3072, 768), (2048, 1024, 4096))  # tokens, in, out


def cases(dtype: torch.dtype, *, of_weight: bool = False) -> Iterator[Case]:
    """Yields the data gradient of each layer, or the weight gradient."""
    for tokens, features_in, features_out in SHAPES:
        input, grad_output, weight = (
            torch.randn(shape, dtype=dtype)
            for shape in ((tokens, features_in), (tokens, features_out), (features_out, features_in))
        )
        data_products = partial(LinearProducts, grad_output, weight)
        weight_products = partial(LinearWeightProducts, grad_output, input, weight, False)
        yield Case(
            name=f"linear {tokens}, {features_in} -> {features_out}",
            grad_output=grad_output,
            operand=input if of_weight else weight,
            result_bytes=(weight if of_weight else input).nbytes,
            flop=2 * tokens * features_in * features_out,
            products=weight_products if of_weight else data_products,
        )


if __name__ == "__main__":
    main("spmm_nm", __doc__, cases)
