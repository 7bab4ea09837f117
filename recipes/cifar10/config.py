# SPDX-License-Identifier: BSD-3-Clause
"""The settings of the recipe and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.config import Count, Natural, NonNegative
from ..common.errors import UserError
from ..common.images import ImageSettings


@dataclass(frozen=True)
class Config(ImageSettings):
    """The recipe as the publication describes it. The published code had its peak at epoch 2 instead of 5."""

    net: Literal["resnet", "vit"] = "resnet"  # the published network, or a vision transformer trained with AdamW
    width: Count = 128  # channels of the first convolution, or values per patch
    epochs: Count = 150
    batch_size: Count = 512
    lr: NonNegative = 0.5
    peak_epoch: float = 5.0
    weight_decay: NonNegative = 5e-4
    flip: bool = True
    translate: Natural = 2  # pixels
    cutout: Natural = 4  # pixels per side
    epoch_images: int = 0  # images per epoch, drawn at random from all images; 0: all
    validate_every: Count = 1  # epochs from one validation to the next; the last epoch always has a validation

    def epoch_size(self, images: int) -> int:
        """Returns the number of images in an epoch, if the data set has ``images`` images.

        Raises:
            UserError: if there are fewer than ``epoch_images`` images.
        """
        if not 0 <= self.epoch_images <= images:
            raise UserError(f"config: expected 0 <= epoch_images <= {images} images, got {self.epoch_images}")
        return self.epoch_images or images
