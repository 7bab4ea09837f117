# SPDX-License-Identifier: BSD-3-Clause
"""The data gradient of convolutions, channels_last: the sparse product beside PyTorch's convolution_backward.

One line per shape (kernel, batch, in -> out, height and width of the input) and pattern, as in spmm_nm.py.

    python benchmarks/conv2d.py                                 # everything, ten minutes or so
    python benchmarks/conv2d.py --shape 1x1 --pattern 2:4 4:32
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from data_gradient import Case, main
from torch import Tensor

from sdgp._autograd import Conv2dProducts
from sdgp._pattern import Pruning


class Shape(NamedTuple):
    kernel: int
    batch: int
    channels_in: int
    channels_out: int
    size: int  # height and width of the input
    stride: int = 1


SHAPES = (
    Shape(3, 64, 64, 64, 32),
    Shape(3, 64, 128, 128, 16),
    Shape(3, 64, 256, 256, 8),
    Shape(3, 64, 128, 256, 16, stride=2),
    Shape(1, 32, 256, 64, 56),
    Shape(1, 32, 64, 256, 56),
    Shape(1, 32, 1024, 256, 14),
)


def products(shape: Shape, grad_output: Tensor, input: Tensor, weight: Tensor, pruning: Pruning) -> Conv2dProducts:
    padding = shape.kernel // 2
    geometry = ((shape.stride, shape.stride), (padding, padding), (1, 1), 1)
    return Conv2dProducts(grad_output, input, weight, geometry, pruning)


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        kernel, batch, channels_in, channels_out, size, stride = shape
        name = f"{kernel}x{kernel} {batch}, {channels_in} -> {channels_out}, {size}x{size}"
        input, grad_output, weight = (
            torch.randn(sizes).to(memory_format=torch.channels_last)
            for sizes in (
                (batch, channels_in, size, size),
                (batch, channels_out, size // stride, size // stride),
                (channels_out, channels_in, kernel, kernel),
            )
        )
        yield Case(
            name=name if stride == 1 else f"{name} / {stride}",
            grad_output=grad_output,
            weight=weight,
            result_bytes=input.nbytes,
            flop=2 * grad_output.numel() * channels_in * kernel**2,
            products=partial(products, shape, grad_output, input, weight),
        )


if __name__ == "__main__":
    main("conv2d", __doc__, cases)
