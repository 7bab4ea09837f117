# SPDX-License-Identifier: BSD-3-Clause
"""The settings of the recipe and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.config import Count, NonNegative
from ..common.images import ImageSettings


@dataclass(frozen=True)
class Config(ImageSettings):
    """The published recipe for 4 GPUs. configs/resnet50.toml sets the batch size, lr and weight decay of ResNet-50."""

    net: Literal["resnet18", "resnet50", "regnet_x_400mf"] = "resnet18"
    epochs: Count = 88
    batch_size: Count = 4096
    lr: NonNegative = 1.0
    peak_epoch: float = 2.0
    weight_decay: NonNegative = 5e-5  # none on BatchNorm
    blurpool: bool = True
    resolution: Count = 160  # until epoch grow_from
    last_resolution: Count = 192  # from epoch grow_to; in between, the resolution grows in steps of 32
    grow_from: int = 65
    grow_to: int = 76
    eval_resolution: Count = 256
    classes: Count = 1000
    workers: int = -1  # per process; -1: the processes share all cores
