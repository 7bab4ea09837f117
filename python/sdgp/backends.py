# SPDX-License-Identifier: BSD-3-Clause
"""Which product a layer's data gradient takes: the one place that would ask for the device."""

from __future__ import annotations

from .pattern import Pruning


def prunes(pruning: Pruning) -> bool:
    """Whether the data gradient is pruned at all; if not, the layer is exact.

    ``auto`` never makes a layer slower: as long as there is no sparse product to win with, it stays exact.
    """
    return pruning.backend != "auto" and pruning.pattern.n < pruning.pattern.m


def describe(pruning: Pruning) -> str:
    """What :func:`prunes` decided, for a person."""
    if prunes(pruning):
        return "pruned, dense product"
    if pruning.backend == "auto":
        return "exact: no sparse product yet"
    return "exact: n == m"
