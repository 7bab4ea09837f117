# SPDX-License-Identifier: BSD-3-Clause
"""The settings of the recipe, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.images import ImageSettings


@dataclass(frozen=True)
class Config(ImageSettings):
    """The published recipe for 4 GPUs; ResNet-50's batch, lr and decay are in its configs."""

    net: Literal["resnet18", "resnet50", "regnet_x_400mf"] = "resnet18"
    epochs: int = 88
    batch_size: int = 4096
    lr: float = 1.0
    peak_epoch: float = 2.0
    weight_decay: float = 5e-5  # none on BatchNorm
    blurpool: bool = True
    resolution: int = 160  # up to epoch grow_from
    last_resolution: int = 192  # from epoch grow_to on; between them in steps of 32
    grow_from: int = 65
    grow_to: int = 76
    eval_resolution: int = 256
    classes: int = 1000
    workers: int = -1  # -1: all cores, shared by the processes
