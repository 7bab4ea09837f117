# SPDX-License-Identifier: BSD-3-Clause
"""Helpers that all functions with a model argument share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from ._layer import PruningLayer
from ._twins import layers_of_libraries

# The modules that multiply by weights. sdgp.report lists them.
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


# A layer that stays plain stores the reason under this name: the layer's class at that time, and the sentence.
REASON = "_sdgp_plain"
NOT_PLANNED = "not in the plan"


def check_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{op}: expected an nn.Module, got {type(model).__name__}")


def check_eager(op: str, model: nn.Module) -> None:
    """Raises ValueError if torch.compile compiled the model: a compiled model runs no hooks."""
    dynamo = sys.modules.get("torch._dynamo")  # to import it takes seconds
    compiled = dynamo is not None and isinstance(model, dynamo.OptimizedModule)
    if compiled or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{op}: expected a model that is not compiled, got a compiled one, which runs no hooks")


def is_sharded(module: nn.Module) -> bool:
    """Returns whether FSDP shards the module, so that its weights are whole only while it runs."""
    return type(module).__name__.startswith(("FSDP", "FullySharded"))


def check_whole(op: str, model: nn.Module) -> None:
    """Raises ValueError if FSDP shards a part of the model: nothing can be measured with shards of weights."""
    for name, module in model.named_modules():
        if is_sharded(module):
            kind = type(module).__name__
            raise ValueError(f"{op}: expected a model that is not sharded, got {kind} {name or '(model)'}")


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields each module that multiplies by weights once, with its first name."""
    kinds: tuple[type[nn.Module], ...] = (*_LAYERS, *layers_of_libraries())
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def pruning_layers(op: str, model: object) -> dict[PruningLayer, str]:
    """Returns the converted layers of a model and their names.

    Raises:
        ValueError: If the model has no converted layer, unless an empty plan converted it. The message reads
            ``op: requirement, got actual``.
    """
    check_module(op, model)
    assert isinstance(model, nn.Module)
    layers = {layer: name or "(model)" for name, layer in model.named_modules() if isinstance(layer, PruningLayer)}
    by_plan = any(vars(module).get(REASON, ("", ""))[1] == NOT_PLANNED for module in model.modules())
    if not layers and not by_plan:
        raise ValueError(f"{op}: expected a model with converted layers, got none: call sdgp.convert(model) first")
    return layers


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table with aligned columns."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]
