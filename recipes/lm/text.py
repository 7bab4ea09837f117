# SPDX-License-Identifier: BSD-3-Clause
"""The training text of the language models: the user's text, or the source of Python's standard library (PSF-2.0)."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import zlib
from collections.abc import Iterator
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


class Text(NamedTuple):
    """A text in two parts, as bytes or as tokens of a model."""

    name: str  # the name in the results, with the start of its hash: only runs on the same text are comparable
    train: Tensor  # (bytes), uint8
    validation: Tensor  # (bytes), uint8
    validation_bytes: int = 0  # if the validation part is tokens, its number of bytes


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_bytes <= self.context:
            raise UserError(
                f"config: expected validation_bytes > context, got {self.validation_bytes} <= {self.context}"
            )

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
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        name, pieces = "Python standard library", _files(Path(sysconfig.get_path("stdlib")), "*.py", skipped)
    else:
        name = printable(path.name)
        try:
            pieces = _files(path, "*", set()) if path.is_dir() else _parts(path.read_bytes())
        except OSError as error:
            raise UserError(f"--data: expected text, got {path}: {error.strerror}") from None
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, piece in pieces:
        parts[number % _HELD_OUT == _HELD_OUT - 1].append(piece)
    train, validation = (b"".join(part) for part in parts)
    if min(len(train), len(validation)) < least:
        raise UserError(
            f"--data: expected at least {least} bytes to train on and to validate with, "
            f"got {len(train)} and {len(validation)} in {name}"
        )
    digest = hashlib.sha256(train + validation).hexdigest()[:8]
    numbers = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, validation)]
    return Text(f"{name}, {len(train) / 1e6:.1f} MB, sha256 {digest}", numbers[0], numbers[1])


def batches(text: Tensor, config: TextSettings, world: World, steps: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields this process's micro-batches for each step: random sequences, and the same sequences one value later."""
    offsets, sequences = torch.arange(config.context + 1), config.sequences(world)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - config.context, (config.accumulate, sequences, 1))
        chosen = text[starts + offsets].long().to(world.device, non_blocking=True)
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
