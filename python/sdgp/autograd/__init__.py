# SPDX-License-Identifier: BSD-3-Clause
"""linear and conv2d with a pruned data gradient, as Python autograd over ATen's operators."""

from ._conv2d import conv2d, conv2d_geometry, conv2d_products, prune_conv2d_grad, pruned_conv2d
from ._linear import linear, linear_products, pruned_linear

__all__ = [
    "conv2d",
    "conv2d_geometry",
    "conv2d_products",
    "linear",
    "linear_products",
    "prune_conv2d_grad",
    "pruned_conv2d",
    "pruned_linear",
]
