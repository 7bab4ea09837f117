# SPDX-License-Identifier: BSD-3-Clause
"""The settings of the recipe, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import UserError
from ..common.images import ImageSettings


@dataclass(frozen=True)
class Config(ImageSettings):
    """The published recipe as it was written; the code that came with it peaked at epoch 2 instead of 5."""

    width: int = 128  # channels of the first convolution
    epochs: int = 150
    batch_size: int = 512
    lr: float = 0.5
    peak_epoch: float = 5.0
    weight_decay: float = 5e-4
    flip: bool = True
    translate: int = 2  # pixels
    cutout: int = 4  # pixels a side
    epoch_images: int = 0  # images of an epoch, drawn at random from all of them; 0: all
    validate_every: int = 1  # epochs between validations; the last epoch always has one

    def epoch_size(self, images: int) -> int:
        """The images of an epoch, of so many that there are.

        Raises:
            UserError: there are fewer than ``epoch_images``, or ``validate_every`` is below 1.
        """
        if not 0 <= self.epoch_images <= images:
            raise UserError(f"config: expected 0 <= epoch_images <= {images} images, got {self.epoch_images}")
        if self.validate_every < 1:
            raise UserError(f"config: expected validate_every >= 1, got {self.validate_every}")
        return self.epoch_images or images
