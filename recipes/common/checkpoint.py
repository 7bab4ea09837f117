# SPDX-License-Identifier: BSD-3-Clause
"""One safetensors file a checkpoint: the weights under their own names, the rest of the training state beside them.

Nothing is pickled, so that a file of unknown origin can do no harm, and any reader of safetensors can use the weights.
A save is atomic: a crash or a full disk leaves the checkpoint that was there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError
from .files import replacing

_PREFIX = "training/"
_TENSOR = "tensor "  # in the JSON, a string that starts so stands for a tensor


class Checkpoint(NamedTuple):
    weights: dict[str, Tensor]
    training: dict[str, Any]


def save(path: Path, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
    """Writes a checkpoint in place of ``path``, or leaves that untouched.

    Args:
        weights: a state_dict.
        training: what else is needed to go on: dictionaries with string keys, lists, numbers, strings, None, tensors.

    Raises:
        UserError: it could not be written.
    """
    tensors = {name: _plain(tensor) for name, tensor in weights.items()}
    skeleton = json.dumps(_flatten(training, tensors))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"training": skeleton})
            temporary.chmod(0o644)  # safetensors lets nobody else read it
    except (OSError, SafetensorError) as error:
        kept = "the one of the last save stays" if path.exists() else "there is none yet"
        raise UserError(f"checkpoint: could not be saved as {path}: {error}; {kept}") from None


def load(path: Path) -> Checkpoint:
    """What :func:`save` wrote.

    Raises:
        UserError: no such file, or not a whole one of ours.
    """
    if not path.is_file():
        raise UserError(f"checkpoint: expected a file, got {path}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            skeleton = json.loads((file.metadata() or {}).get("training", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint: expected a whole safetensors file, got {path}: {error}") from None
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    return Checkpoint(weights, _unflatten(skeleton, tensors))


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and sharing memory with nothing: safetensors stores no views."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _flatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """``tree`` as JSON can hold it; its tensors go into ``tensors``."""
    if isinstance(tree, Tensor):
        name = f"{_PREFIX}{len(tensors)}"
        tensors[name] = _plain(tree)
        return _TENSOR + name
    if isinstance(tree, Mapping):
        return {key: _flatten(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_flatten(value, tensors) for value in tree]
    return tree


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, str) and tree.startswith(_TENSOR):
        return tensors[tree[len(_TENSOR) :]]
    if isinstance(tree, dict):
        return {key: _unflatten(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    return tree
