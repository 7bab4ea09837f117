# SPDX-License-Identifier: BSD-3-Clause
"""What the image recipes share: the settings of both published ones, and the normalization of a batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import UserError
from .process import World
from .settings import Settings

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ImageSettings(Settings):
    """The fields that both have; each sets its own values."""

    epochs: int = 1
    batch_size: int = 1  # of all processes
    lr: float = 1.0
    peak_epoch: float = 0.5  # the learning rate is a triangle: 0, lr, 0
    momentum: float = 0.9
    label_smoothing: float = 0.1
    amp: Literal["off", "bfloat16", "float16"] = "float16"
    channels_last: bool = True
    classes: int = 10
    bad_images: Literal["error", "skip"] = "error"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def steps(self, images: int, world: World) -> int:
        """The steps of an epoch of so many images.

        Raises:
            UserError: the batch does not fit them or the processes; the learning rate has no peak within the epochs.
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


def is_pruned(module: nn.Module, name: str) -> bool:
    """Whether the published runs pruned a layer: every convolution but the first, and no linear layer."""
    return isinstance(module, nn.Conv2d) and module.in_channels > 3


def normalize(images: Tensor, mean: RGB, std: RGB, memory_format: torch.memory_format) -> Tensor:
    """(N, 3, height, width) of bytes to float32."""
    mean_, std_ = _on(images.device, mean, std)
    return ((images - mean_) / std_).contiguous(memory_format=memory_format)


@functools.cache
def _on(device: torch.device, mean: RGB, std: RGB) -> tuple[Tensor, Tensor]:
    """Copied to a device once: a copy in every step would wait for a GPU."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)
