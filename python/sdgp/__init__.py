# SPDX-License-Identifier: BSD-3-Clause
"""Structured Data Gradient Pruning: N:M sparse data gradients for PyTorch; forward and weight gradient stay exact."""

from ._load import cmake_prefix_path as cmake_prefix_path
from ._load import version as __version__
from .advise import Plan, advise
from .autograd import conv2d, linear
from .convert import convert, paused, report, revert
from .modules import Conv2d, Linear
from .ops import compress_nm, decompress_nm, prune_nm, spmm_nm
from .pattern import Pattern
from .plot import plot
from .profile import profile
from .schedule import Schedule
from .watch import Watch, watch

__all__ = [
    "Conv2d",
    "Linear",
    "Pattern",
    "Plan",
    "Schedule",
    "Watch",
    "__version__",
    "advise",
    "cmake_prefix_path",
    "compress_nm",
    "conv2d",
    "convert",
    "decompress_nm",
    "linear",
    "paused",
    "plot",
    "profile",
    "prune_nm",
    "report",
    "revert",
    "spmm_nm",
    "watch",
]
