# SPDX-License-Identifier: BSD-3-Clause
r"""Trains ResNet-18, ResNet-50 and RegNetX-400MF on ImageNet with pruned data gradients, by the published recipe.

    torchrun --nproc-per-node 4 -m recipes.imagenet.train recipes/pruning/mvue_2_4.toml --data DIR
    torchrun --nproc-per-node 4 -m recipes.imagenet.train recipes/pruning/mvue_2_4.toml \
        recipes/imagenet/configs/resnet50.toml --data DIR

DIR: train/CLASS/* and val/CLASS/*, or the train.beton and val.beton that `python -m recipes.pack` makes of them.
All networks here have BlurPool, so that they are comparable. The published plain ResNet-18 had no BlurPool, but the
published pruned networks did.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from ..common.images import is_pruned
from ..common.launch import launch
from ..common.process import World
from ..common.recipe import Recipe
from ..common.run import classify
from ..common.transformer import decay_matrices
from .config import Config
from .data import ImageNet, load, train_batches, val_batches


class Blur(nn.Module):
    """Blurs each channel with (1, 2, 1) in both directions before it is sampled with stride 2 (Zhang, ICML 2019)."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row).expand(channels, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), padding=1, groups=x.shape[1])


def add_blurpool(model: nn.Module) -> None:
    """Inserts a blur before every strided convolution, except those with few input channels at the start."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
                setattr(module, name, nn.Sequential(Blur(child.in_channels), child))


def prepare(config: Config, data: ImageNet, world: World) -> nn.Module:
    model: nn.Module = getattr(models, config.net)(num_classes=config.classes)
    if config.blurpool:
        add_blurpool(model)
    model = model.to(world.device, memory_format=config.memory_format)  # type: ignore[call-overload]
    return config.convert(model, is_pruned)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(decay_matrices(model, config.weight_decay), 0.0, config.momentum)


def resolution(config: Config, epoch: int) -> int:
    if epoch <= config.grow_from:
        return config.resolution
    if epoch >= config.grow_to:
        return config.last_resolution
    part = (epoch - config.grow_from) / (config.grow_to - config.grow_from)
    return round((config.resolution + part * (config.last_resolution - config.resolution)) / 32) * 32


@torch.no_grad()
def validate(model: nn.Module, data: ImageNet, config: Config, world: World, epoch: int) -> dict[str, float]:
    """Returns top-1 and top-5 in percent, and the resolution of the epoch.

    The scores of each image and its mirror image are added.
    """
    model.eval()
    sums = torch.zeros(3, device=world.device)
    for images, labels in val_batches(data.val, config, world):
        with config.autocast(world.device):
            scores = model(images) + model(images.flip(3))
        hits = scores.topk(min(5, config.classes)).indices == labels.unsqueeze(1)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=world.device)])
    top1, top5, count = world.sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "resolution": resolution(config, epoch)}


def batches(
    config: Config, data: ImageNet, seed: int, epoch: int, first: int, world: World
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    size = resolution(config, epoch)
    return ([batch] for batch in train_batches(data.train, config, seed, epoch, first, size, world))


RECIPE = Recipe(
    name="imagenet",
    config=Config,
    metrics=("top1",),
    load=load,
    prepare=prepare,
    is_pruned=lambda config, module, name: is_pruned(module, name),
    make_optimizer=make_optimizer,
    steps=lambda config, data, world: config.steps(data.train.size, world),
    batches=batches,
    forward=lambda config: partial(classify, label_smoothing=config.label_smoothing),
    validate=validate,
)

main = partial(launch, RECIPE, __doc__)

if __name__ == "__main__":
    main()
