# SPDX-License-Identifier: BSD-3-Clause
"""Remembers the earlier settings of layers, for forwards that a reentrant checkpoint repeats.

Note [Settings of a recomputation]
Reentrant checkpointing repeats a forward and stores nothing about the first run. A pause or a schedule may have ended
since then. So each change of a layer's settings is kept for a while, with the sequence number that autograd's next
node was to get. A forward inside a backward looks up the settings by the sequence number of the running node. This
node belongs to the checkpoint and was made in the first run. A checkpoint inside another checkpoint is made in the
recomputation of the outer one, so it gets the current settings. So does a forward in a node that changed the settings
itself, such as a backward that runs a model inside `paused`, until the change is undone.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch

from ._pattern import Pruning

_CHANGES_KEPT = 64


class _Layer(Protocol):
    """The settings of a layer: how it prunes, and why it is exact in spite of that; empty if it is not."""

    @property
    def pruning(self) -> Pruning: ...
    @property
    def held(self) -> str: ...


class _Change(NamedTuple):
    """The settings before a change.

    Attributes:
        until: the sequence number of the first node that autograd made after the change.
        node: the node in which the change happened, or None outside a backward.
    """

    until: int
    node: int | None
    pruning: Pruning
    held: str


_changes: WeakKeyDictionary[_Layer, deque[_Change]] = WeakKeyDictionary()


def remember(layer: _Layer) -> None:
    """Keeps the settings of a layer that are about to change."""
    if torch.compiler.is_compiling():
        return  # the traced code would depend on every layer of the process
    changes = _changes.setdefault(layer, deque(maxlen=_CHANGES_KEPT))
    until, node = torch._C._autograd._get_sequence_nr(), _running_node()
    if not changes or changes[-1][:2] != (until, node):  # otherwise no node has used the last settings
        changes.append(_Change(until, node, layer.pruning, layer.held))


def forget_undone(layer: _Layer) -> None:
    """Forgets the changes of the running node after they ended, as those of a pause in a recomputation do.

    The later forwards of the node then get the settings of their first run.
    """
    if torch.compiler.is_compiling():
        return
    node, changes = _running_node(), _changes.get(layer)
    if node is None or changes is None:
        return
    own = len(changes)
    while own and changes[own - 1].node == node:
        own -= 1
    if own < len(changes) and changes[own][2:] == (layer.pruning, layer.held):
        while len(changes) > own:
            changes.pop()
    if not changes:
        del _changes[layer]


def settings_of(layer: _Layer) -> tuple[Pruning, str]:
    """Returns the settings of a forward and why it is held. A repeated forward gets those of its first run."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1 and layer in _changes:
        node, changes = _running_node(), _changes[layer]
        if node is not None and changes[-1].node != node:
            for change in changes:
                if node < change.until:
                    return change.pruning, change.held
    return layer.pruning, layer.held


def _running_node() -> int | None:
    """Returns the sequence number of the autograd node that runs now, or None outside a backward."""
    node = None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
