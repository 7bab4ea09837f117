# SPDX-License-Identifier: BSD-3-Clause
"""Structured Data Gradient Pruning: N:M sparse data gradients for PyTorch.

The forward stays exact. By default the weight gradient stays exact too.
"""

# This import comes first: it reports a broken installation before anything else fails.
from ._load import cmake_prefix_path as cmake_prefix_path
from ._load import version as __version__

# isort: split
from ._advise import advise
from ._autograd import conv2d, linear
from ._budget import Budget
from ._choose import Chooser, chooser
from ._convert import convert, paused, revert
from ._decision import Decision
from ._layers import Conv2d, Linear
from ._ops import compress_nm, decompress_nm, prune_nm, spmm_nm
from ._pattern import Pattern
from ._plan import Plan
from ._plot import plot
from ._profile import profile
from ._report import report
from ._schedule import Schedule
from ._watch import Watch, watch

__all__ = [
    "Budget",
    "Chooser",
    "Conv2d",
    "Decision",
    "Linear",
    "Pattern",
    "Plan",
    "Schedule",
    "Watch",
    "__version__",
    "advise",
    "chooser",
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
