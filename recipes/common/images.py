# SPDX-License-Identifier: BSD-3-Clause
"""Code that the image recipes share: the settings of both published recipes, reading and normalizing images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from .config import Count, NonNegative, Share
from .errors import UserError
from .process import World
from .settings import Settings

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ImageSettings(Settings):
    """The settings that both image recipes have. Each recipe sets its own values."""

    batch_size: Count = 1  # over all processes
    lr: NonNegative = 1.0
    peak_epoch: float = 0.5  # the learning rate rises from 0 to lr until this epoch, then falls to 0
    momentum: Share = 0.9
    label_smoothing: Share = 0.1
    amp: Literal["off", "bfloat16", "float16"] = "float16"
    channels_last: bool = True
    classes: Count = 10
    bad_images: Literal["error", "skip"] = "error"
    unit = "images"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def steps(self, images: int, world: World) -> int:
        """Returns the number of steps in an epoch with ``images`` images.

        Raises:
            UserError: if the batch size does not fit the number of images or processes, or the peak of the learning
                rate is not within the epochs.
        """
        if not world.size <= self.batch_size <= images or self.batch_size % world.size:
            raise UserError(
                f"config: expected batch_size to be at most {images}, the number of images, and a multiple of the "
                f"{world.size} processes, got {self.batch_size}"
            )
        if not 0 < self.peak_epoch < self.epochs:
            raise UserError(f"config: expected 0 < peak_epoch < epochs = {self.epochs}, got {self.peak_epoch}")
        return images // self.batch_size

    def learning_rate(self, epoch: float) -> float:
        return self.lr * min(epoch / self.peak_epoch, (self.epochs - epoch) / (self.epochs - self.peak_epoch))

    def skip(self, reason: str) -> None:
        """Prints why an image is left out.

        Raises:
            UserError: if the config does not allow it.
        """
        if self.bad_images == "error":
            raise UserError(f"--data: expected an image, got {reason}; --set bad_images=skip leaves such files out")
        print(f"skipped {reason}")


def is_pruned(module: nn.Module, name: str) -> bool:
    """Whether the published runs pruned a layer: they pruned all convolutions except the first, and no linear layer."""
    return isinstance(module, nn.Conv2d) and module.in_channels > 3


def normalize(images: Tensor, mean: RGB, std: RGB, memory_format: torch.memory_format) -> Tensor:
    """Normalizes a batch of bytes, (N, 3, height, width), to float32."""
    mean_, std_ = _on(images.device, mean, std)
    return ((images - mean_) / std_).contiguous(memory_format=memory_format)


@functools.cache
def _on(device: torch.device, mean: RGB, std: RGB) -> tuple[Tensor, Tensor]:
    """Copies mean and deviation to a device once, because a copy in every step would synchronize with a GPU."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def list_images(folder: Path, classes: int) -> ImageFolder:
    """Lists the images of a folder of class folders.

    Raises:
        UserError: if a class has no images, or there is another number of classes.
    """
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"--data: {error}") from None
    if len(listing.classes) != classes:
        raise UserError(
            f"--data: expected {classes} class folders in {folder}, got {len(listing.classes)}; --set classes=N trains "
            "on another number"
        )
    return listing


def check_same_classes(train: Path, test: Path) -> None:
    """Raises UserError if the two folders do not have the same class folders."""
    one, other = ({entry.name for entry in part.iterdir() if entry.is_dir()} for part in (train, test))
    if odd := sorted(one ^ other):
        parts = f"{train.name}/ and {test.name}/"
        raise UserError(f"--data: expected the same classes in {parts}, got {', '.join(odd[:5])} in one only")


def decode(path: str) -> Tensor:
    """Decodes an image file to (3, height, width), uint8.

    Raises:
        ValueError: if the file cannot be decoded, or does not have 8 bits per channel, with the path and the reason.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # convert("RGB") would clip these values to 255 without a word
                raise ValueError(f"expected 8 bits per channel, got Pillow's mode {file.mode}")
            return pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ValueError(f"{path}: {error}") from None
