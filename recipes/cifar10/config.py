# SPDX-License-Identifier: BSD-3-Clause
"""The settings of the recipe, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

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
