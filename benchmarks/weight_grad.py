# SPDX-License-Identifier: BSD-3-Clause
"""Compares the sparse product with PyTorch's, for weight gradients of linear layers and channels_last convolutions.

Prints one line per shape and pattern, like spmm_nm.py and conv2d.py. The output gradient is pruned along the tokens or
pixels.

    python benchmarks/weight_grad.py                            # everything, ten minutes or so
    python benchmarks/weight_grad.py --shape 3x3 --pattern 8:16 4:16
"""

from __future__ import annotations

from collections.abc import Iterator

import conv2d
import spmm_nm
import torch
from gradients import Case, main


def cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from spmm_nm.cases(dtype, of_weight=True)
    yield from conv2d.cases(dtype, of_weight=True)


if __name__ == "__main__":
    main("weight_grad", __doc__, cases)
