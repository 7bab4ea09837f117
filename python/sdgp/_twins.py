# SPDX-License-Identifier: BSD-3-Clause
"""Maps each plain layer to its pruning layer."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from ._layer import PruningLayer
from ._layers import Conv2d, Linear

# The layers of other libraries: where each is defined, and the module and name of its pruning layer.
_OF_LIBRARIES = {
    ("transformers.pytorch_utils", "Conv1D"): ("sdgp._conv1d", "Conv1D"),
    ("torchao.float8.float8_linear", "Float8Linear"): ("sdgp._float8", "Float8Linear"),
}


def twin_of(module: nn.Module) -> type[PruningLayer] | None:
    """Returns the class that a layer has when it prunes, or None if sdgp does not know the layer."""
    kind = type(module)
    if issubclass(kind, PruningLayer):
        return kind if "_plain" in vars(kind) else None  # a parametrization makes a subclass
    if (names := _OF_LIBRARIES.get((kind.__module__, kind.__qualname__))) is not None:
        try:
            twin: type[PruningLayer] = getattr(importlib.import_module(names[0]), names[1])
        except ImportError:  # another version of the library, with other names
            return None
        return twin
    twins: dict[type[nn.Module], type[PruningLayer]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
    return twins.get(kind)


def layers_of_libraries() -> tuple[type[nn.Module], ...]:
    """Returns the layers of other libraries that sdgp knows and that somebody imported. Others cannot exist."""
    layers = (getattr(sys.modules.get(module), name, None) for module, name in _OF_LIBRARIES)
    return tuple(layer for layer in layers if layer is not None)
