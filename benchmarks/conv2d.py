# SPDX-License-Identifier: BSD-3-Clause
"""Compares the sparse product with PyTorch's convolution_backward, for data gradients of channels_last convolutions.

Prints one line per shape (kernel, batch, in -> out, height and width of the input) and pattern, like spmm_nm.py.

    python benchmarks/conv2d.py                                 # everything, ten minutes or so
    python benchmarks/conv2d.py --shape 1x1 --pattern 2:4 4:32
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from gradients import Case, main
from torch import Tensor

from sdgp._autograd import Conv2dProducts, Conv2dWeightProducts, Geometry


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
    Shape(1, 24, 512, 128, 28),
)


def name(shape: Shape) -> str:
    kernel, batch, channels_in, channels_out, size, stride = shape
    text = f"{kernel}x{kernel} {batch}, {channels_in} -> {channels_out}, {size}x{size}"
    return text if stride == 1 else f"{text} / {stride}"


def geometry(shape: Shape) -> Geometry:
    padding = shape.kernel // 2
    return Geometry((shape.stride, shape.stride), (padding, padding), (1, 1), 1)


def tensors(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns input, output gradient and weight."""
    kernel, batch, channels_in, channels_out, size, stride = shape
    input, grad_output, weight = (
        torch.randn(sizes, dtype=dtype).to(memory_format=torch.channels_last)
        for sizes in (
            (batch, channels_in, size, size),
            (batch, channels_out, size // stride, size // stride),
            (channels_out, channels_in, kernel, kernel),
        )
    )
    return input, grad_output, weight


def cases(dtype: torch.dtype, *, of_weight: bool = False) -> Iterator[Case]:
    """Yields the data gradient of each layer, or the weight gradient."""
    products = Conv2dWeightProducts if of_weight else Conv2dProducts
    for shape in SHAPES:
        input, grad_output, weight = tensors(shape, dtype)
        yield Case(
            name=name(shape),
            grad_output=grad_output,
            operand=input if of_weight else weight,
            result_bytes=(weight if of_weight else input).nbytes,
            flop=2 * grad_output.numel() * shape.channels_in * shape.kernel**2,
            products=partial(products, grad_output, input, weight, geometry(shape)),
        )


if __name__ == "__main__":
    main("conv2d", __doc__, cases)
