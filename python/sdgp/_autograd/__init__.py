# SPDX-License-Identifier: BSD-3-Clause
"""linear and conv2d with pruned data and weight gradients, as Python autograd Functions over ATen's operators."""

from ._backward import rows
from ._call import is_plain_again
from ._conv2d import conv2d, conv2d_geometry, pruned_conv2d
from ._conv2d_products import Conv2dProducts, Conv2dWeightProducts, Geometry, prune_conv2d_grad
from ._linear import LinearProducts, LinearWeightProducts, linear, pruned_linear

__all__ = [
    "Conv2dProducts",
    "Conv2dWeightProducts",
    "Geometry",
    "LinearProducts",
    "LinearWeightProducts",
    "conv2d",
    "conv2d_geometry",
    "is_plain_again",
    "linear",
    "prune_conv2d_grad",
    "pruned_conv2d",
    "pruned_linear",
    "rows",
]
