# SPDX-License-Identifier: BSD-3-Clause
"""Structured Data Gradient Pruning: N:M sparse data gradients for PyTorch; forward and weight gradient stay exact."""

from ._load import cmake_prefix_path as cmake_prefix_path
from ._load import version as __version__
from .autograd import conv2d, linear
from .convert import convert, paused, report, revert
from .modules import Conv2d, Linear
from .ops import prune_nm
from .pattern import Pattern

__all__ = [
    "Conv2d",
    "Linear",
    "Pattern",
    "__version__",
    "cmake_prefix_path",
    "conv2d",
    "convert",
    "linear",
    "paused",
    "prune_nm",
    "report",
    "revert",
]
