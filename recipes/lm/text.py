# SPDX-License-Identifier: BSD-3-Clause
"""The training text of the language models: the user's text, or the source of Python's standard library (PSF-2.0)."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.config import Count, NonNegative
from ..common.errors import UserError
from ..common.files import printable
from ..common.process import World
from ..common.settings import Settings

_HELD_OUT = 20  # one in this many files, or parts of a single file, is for validation
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}  # in the standard library


class Text(NamedTuple):
    """A text in two parts, as bytes or as tokens of a model."""

    name: str  # the name in the results, with the start of its hash: only runs on the same text are comparable
    train: Tensor  # (bytes), uint8
    validation: Tensor  # (bytes), uint8
    validation_bytes: int = 0  # if the validation part is tokens, its number of bytes


class Classes(NamedTuple):
    """A text for each class."""

    name: str  # the name in the results, as for a text
    texts: list[Text]


@dataclass(frozen=True)
class TextSettings(Settings):
    """The settings that the language models share. An epoch is ``epoch_steps`` steps and a validation."""

    context: Count = 128  # bytes or tokens
    epochs: Count = 12
    epoch_steps: Count = 100
    batch_size: Count = 32  # sequences, over all processes
    accumulate: Count = 1  # backward passes per step
    lr: NonNegative = 3e-3
    warmup: NonNegative = 1.0  # epochs; after it, the learning rate follows a cosine to a hundredth of lr
    clip: NonNegative = 1.0
    validation_bytes: Count = 2**17
    unit = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_bytes <= self.context:
            raise UserError(
                f"config: expected validation_bytes > context, got {self.validation_bytes} <= {self.context}"
            )
        if self.warmup > self.epochs:
            raise UserError(f"config: expected warmup <= epochs, got {self.warmup:g} > {self.epochs}")

    def sequences(self, world: World) -> int:
        """Returns the number of sequences in a micro-batch of one process.

        Raises:
            UserError: if the batch size is not a multiple of the number of processes.
        """
        if self.batch_size < world.size or self.batch_size % world.size:
            raise UserError(
                f"config: expected batch_size to be a multiple of {world.size} processes, got {self.batch_size}"
            )
        return self.batch_size // world.size

    def learning_rate(self, epoch: float) -> float:
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        cosine = (1 + math.cos(math.pi * (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9))) / 2
        return self.lr * (0.01 + 0.99 * cosine)


def load_text(path: Path | None, least: int) -> Text:
    """Loads the file at ``path``, all files in that folder, or the standard library.

    Args:
        least: the number of bytes that each part must have.

    Raises:
        UserError: if the file is not readable or too short.
    """
    if path is None:
        name, pieces = "Python standard library", _files(_STANDARD_LIBRARY, "*.py", _SKIPPED)
    else:
        name = printable(path.name)
        try:
            pieces = _files(path, "*", set()) if path.is_dir() else _parts(path.read_bytes())
        except OSError as error:
            raise UserError(f"--data: expected text, got {path}: {error.strerror}") from None
    hint = f"; one file in {_HELD_OUT} is for validation: name a single file itself" if path and path.is_dir() else ""
    train, validation = _split(name, pieces, least, hint)
    digest = hashlib.sha256(train + validation).hexdigest()[:8]
    return Text(f"{name}, {len(train) / 1e6:.1f} MB, sha256 {digest}", _numbers(train), _numbers(validation))


def load_classes(path: Path | None, least: int) -> Classes:
    """Loads each folder at ``path`` as a class, or the eight largest packages of the standard library.

    Args:
        least: the number of bytes that each part of a class must have.

    Raises:
        UserError: if there are fewer than two folders, or a file in them is not readable, or a class is too short.
    """
    root, pattern, skipped = (_STANDARD_LIBRARY, "*.py", _SKIPPED) if path is None else (path, "*", set())
    try:
        folders = sorted(child for child in root.iterdir() if child.is_dir() and child.name not in skipped)
        whole = {printable(folder.name): _joined(_files(folder, pattern, skipped)) for folder in folders}
    except OSError as error:
        raise UserError(f"--data: expected a folder of folders, got {root}: {error.strerror}") from None
    if path is None:
        whole = dict(sorted(sorted(whole.items(), key=lambda item: -len(item[1]))[:8]))
    if len(whole) < 2:
        raise UserError(f"--data: expected a folder for each of two or more classes, got {len(whole)} in {root}")
    texts, digest = [], hashlib.sha256()
    for name, text in whole.items():
        digest.update(text)
        train, validation = _split(name, _parts(text), least)
        texts.append(Text(name, _numbers(train), _numbers(validation)))
    source = "Python standard library" if path is None else printable(root.name)
    return Classes(f"{source}, {len(texts)} classes, sha256 {digest.hexdigest()[:8]}", texts)


def _split(name: str, pieces: list[tuple[int, bytes]], least: int, hint: str = "") -> tuple[bytes, bytes]:
    """Joins numbered pieces to a text to train on and one to validate with.

    Args:
        hint: what the error says in addition.

    Raises:
        UserError: if one of them has fewer than ``least`` bytes.
    """
    train = _joined(piece for piece in pieces if piece[0] % _HELD_OUT != _HELD_OUT - 1)
    validation = _joined(piece for piece in pieces if piece[0] % _HELD_OUT == _HELD_OUT - 1)
    if min(len(train), len(validation)) < least:
        raise UserError(
            f"--data: expected at least {least} bytes to train on and to validate with, "
            f"got {len(train)} and {len(validation)} in {name}{hint}"
        )
    return train, validation


def _joined(pieces: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(piece for _, piece in pieces)


def _numbers(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def mean_loss(
    loss: Callable[[Tensor, Tensor], Tensor], text: Tensor, config: TextSettings, world: World, batch: int
) -> float:
    """Returns the mean of ``loss``, which gets inputs and targets, over the adjacent windows of a text.

    Args:
        batch: the number of windows for one call of ``loss``.
    """
    windows = text.long().unfold(0, config.context + 1, config.context)
    rounds = -(-len(windows) // (batch * world.size))  # the same in each process, else FSDP would wait forever
    total = torch.zeros((), device=world.device)
    for index in range(rounds):
        at = batch * (index * world.size + world.rank)
        part = (windows[at : at + batch] if at < len(windows) else windows[:1]).to(world.device)
        with config.autocast(world.device):
            value = loss(part[:, :-1], part[:, 1:])
        total += value.float() * (len(part) if at < len(windows) else 0)
    return float(world.sum(total)) / len(windows)


def epoch_steps(config: TextSettings, text: Text | Classes, world: World) -> int:
    return config.epoch_steps


def batches(
    config: TextSettings, text: Text, seed: int, epoch: int, first: int, world: World
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields this process's micro-batches of each step of an epoch from step ``first`` on.

    They are random sequences, and the same sequences one value later. They depend on the seed of the generator alone,
    which ``Run`` sets for each step.
    """
    offsets, sequences = torch.arange(config.context + 1), config.sequences(world)
    for _ in range(first, config.epoch_steps):
        starts = torch.randint(0, len(text.train) - config.context, (config.accumulate, sequences, 1))
        chosen = text.train[starts + offsets].long().to(world.device, non_blocking=True)
        yield [(part[:, :-1], part[:, 1:]) for part in chosen]


def _files(root: Path, pattern: str, skipped: set[str]) -> list[tuple[int, bytes]]:
    """Returns the files below ``root`` without ``skipped`` folders. Each has a number that depends only on its name."""
    names = sorted(path.relative_to(root) for path in root.rglob(pattern) if path.is_file())
    kept = (name for name in names if skipped.isdisjoint(name.parts))
    return [(zlib.crc32(str(name).encode()), (root / name).read_bytes()) for name in kept]


def _parts(whole: bytes) -> list[tuple[int, bytes]]:
    """Splits a file into about 10 * _HELD_OUT numbered parts."""
    size = max(len(whole) // (10 * _HELD_OUT), 1)
    return [(at // size, whole[at : at + size]) for at in range(0, len(whole), size)]
