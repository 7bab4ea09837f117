# SPDX-License-Identifier: BSD-3-Clause
"""Maps each plain layer to its pruning layer."""

from __future__ import annotations

import sys

from torch import nn

from ._layer import PruningLayer
from ._layers import Conv2d, Linear


def twin_of(module: nn.Module) -> type[PruningLayer] | None:
    """Returns the class that a layer has when it prunes, or None if sdgp does not know the layer."""
    kind = type(module)
    if issubclass(kind, PruningLayer):
        return kind if "_plain" in vars(kind) else None  # a parametrization makes a subclass
    if kind in transformers_conv1d():
        from ._conv1d import Conv1D

        return Conv1D
    twins: dict[type[nn.Module], type[PruningLayer]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
    return twins.get(kind)


def transformers_conv1d() -> tuple[type[nn.Module], ...]:
    """Returns the Conv1D of transformers, or nothing if its module is not imported: then no such layer can exist."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if conv1d is None else (conv1d,)
