# SPDX-License-Identifier: BSD-3-Clause
"""What all functions that take a model share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from ._layer import PruningLayer
from ._twins import transformers_conv1d

# Modules that multiply by weights: what sdgp.report lists.
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def check_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{op}: expected an nn.Module, got {type(model).__name__}")


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that multiply by weights, each once, under its first name."""
    kinds: tuple[type[nn.Module], ...] = (*_LAYERS, *transformers_conv1d())
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def pruning_layers(op: str, model: object) -> dict[PruningLayer, str]:
    """The converted layers of a model, and their names.

    Raises:
        ValueError: ``op: requirement, got actual``, where there are none.
    """
    check_module(op, model)
    assert isinstance(model, nn.Module)
    layers = {layer: name or "(model)" for name, layer in model.named_modules() if isinstance(layer, PruningLayer)}
    if not layers:
        raise ValueError(f"{op}: expected a model with converted layers, got none: call sdgp.convert(model) first")
    return layers


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]
