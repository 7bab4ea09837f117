# SPDX-License-Identifier: BSD-3-Clause
"""Saves and loads checkpoints. A checkpoint is one safetensors file with the weights and the other training state.

Nothing is pickled, so a file of unknown origin can do no harm. Any reader of safetensors can read the weights. A save
is atomic: after a crash or on a full disk the previous checkpoint remains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from .errors import UserError
from .files import replacing

_PREFIX = "training/"
_TENSOR = "tensor "  # a string in the JSON with this prefix stands for a tensor


class Checkpoint(NamedTuple):
    weights: dict[str, Tensor]
    training: dict[str, Any]


def save(path: Path, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
    """Replaces the checkpoint at ``path``, or leaves the old one unchanged if this fails.

    Args:
        weights: a state_dict.
        training: the other state that a resumed run needs: dictionaries with string keys, lists, numbers, strings, None
            and tensors.

    Raises:
        UserError: if the file cannot be written.
    """
    tensors = {name: _plain(tensor) for name, tensor in weights.items()}
    skeleton = json.dumps(_flatten(training, tensors))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"training": skeleton})
            temporary.chmod(0o644)  # safetensors creates files that only the owner can read
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: the path is not UTF-8
        kept = "the previous checkpoint remains" if path.exists() else "there is none yet"
        raise UserError(f"checkpoint: could not be saved as {path}: {error}; {kept}") from None


def load(path: Path) -> Checkpoint:
    """Loads a checkpoint that ``save`` wrote.

    Raises:
        UserError: if the file is missing, incomplete or not such a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint: expected a file, got {path}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            training = _unflatten(json.loads((file.metadata() or {}).get("training", "{}")), tensors)
    except (SafetensorError, OSError, ValueError, RecursionError, KeyError) as error:
        raise UserError(f"checkpoint: expected a whole safetensors file, got {path}: {error}") from None
    if not isinstance(training, dict) or not isinstance(training.get("config", {}), dict):
        raise UserError(f"checkpoint: expected a checkpoint of a recipe, got {path} with other metadata")
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    return Checkpoint(weights, training)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads the weights of a checkpoint that ``--eval`` names. A checkpoint has no frozen parameters.

    Raises:
        UserError: if they are not those of the model.
    """
    check_names("--eval", model, weights)
    try:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, cast(dict[str, Any], weights), options=options)
    except RuntimeError as error:
        raise UserError(f"--eval: {error}") from None


def check_names(option: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError unless ``weights`` has exactly the weights that the checkpoint of a model has."""
    expected = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True)).keys()
    if wrong := sorted(expected ^ weights.keys()):
        raise UserError(
            f"{option}: expected a checkpoint with the weights of this model, got one that differs in "
            f"{', '.join(wrong[:3])}"
        )


def _plain(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy on the CPU that shares no memory, because safetensors cannot store views."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _flatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns ``tree`` in types that JSON can store, and moves its tensors to ``tensors``."""
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
