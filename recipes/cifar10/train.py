# SPDX-License-Identifier: BSD-3-Clause
"""Trains on CIFAR-10 with pruned data gradients: the published network and recipe, a small network for a CPU, or a
vision transformer.

    python -m recipes.cifar10.train recipes/pruning/rescale_2_4.toml --data DIR
    python -m recipes.cifar10.train recipes/pruning/mvue_2_4.toml recipes/cifar10/configs/small.toml --data DIR
    torchrun --nproc-per-node 4 -m recipes.cifar10.train recipes/pruning/mvue_2_4.toml --data DIR

DIR: the download of torchvision.datasets.CIFAR10, or train/CLASS/*.jpg and test/CLASS/*.jpg, or train.beton and
test.beton (with ffcv). All images are decoded into memory, on the GPU if there is one, and augmented there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.images import is_pruned as is_pruned_convolution
from ..common.launch import launch
from ..common.process import World, derive_seed
from ..common.recipe import Recipe
from ..common.run import classify
from ..common.transformer import Block, decay_matrices
from .config import Config
from .data import Cifar, load


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ViT(nn.Module):
    """A vision transformer for images of 32 x 32 pixels: patches of 4 x 4 pixels, four blocks, the mean of all patches.

    Args:
        width: values per patch; there is one attention head for each 32 of them.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.zeros(64, width))
        self.blocks = nn.Sequential(*(Block(max(1, width // 32), width, causal=False) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # (batch, 64, width)
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return scores


def make_model(config: Config) -> nn.Module:
    """Returns the network of the config.

    The published one has ``width`` channels in the first layer and up to four times as many inside.
    """
    if config.net == "vit":
        if config.width > 32 and config.width % 32:
            raise UserError(f"config: expected net = vit to have a width that is a multiple of 32, got {config.width}")
        return ViT(config.width, config.classes)

    def block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))

    width = config.width
    return nn.Sequential(
        block(3, width),  # (N, width, 32, 32)
        block(width, 2 * width, 5, 2, 2),  # (N, 2 width, 16, 16)
        Residual(block(2 * width, 2 * width), block(2 * width, 2 * width)),
        block(2 * width, 4 * width),
        nn.MaxPool2d(2),  # (N, 4 width, 8, 8)
        Residual(block(4 * width, 4 * width), block(4 * width, 4 * width)),
        block(4 * width, 2 * width, padding=0),  # (N, 2 width, 6, 6)
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, config.classes, bias=False),
        Scale(0.2),
    )


def augment(images: Tensor, config: Config) -> Tensor:
    """Flips, translates and cuts out each image at random.

    Args:
        images: (N, 3, H, W), with mean 0. Gaps are filled with 0.
    """
    device, (samples, _, height, width) = images.device, images.shape
    if config.flip:
        images = torch.where(torch.rand(samples, 1, 1, 1, device=device) < 0.5, images, images.flip(3))
    if (pad := config.translate) > 0:
        padded = F.pad(images, (pad, pad, pad, pad))
        row, column = torch.randint(0, 2 * pad + 1, (2, samples, 1, 1), device=device)
        rows = row + torch.arange(height, device=device).view(1, -1, 1)
        columns = column + torch.arange(width, device=device)
        images = padded[torch.arange(samples, device=device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)
    if (side := config.cutout) > 0:
        top, left = torch.randint(0, height - side + 1, (2, samples, 1, 1), device=device)
        rows, columns = torch.arange(height, device=device).view(-1, 1), torch.arange(width, device=device)
        hole = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        images = images.masked_fill(hole.unsqueeze(1), 0)
    return images


def batches(
    config: Config, data: Cifar, seed: int, epoch: int, first: int, world: World
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields this process's part of each full batch of an epoch, from batch ``first`` on."""
    images = data.train
    generator = torch.Generator().manual_seed(derive_seed("epoch", seed, epoch))
    count = config.epoch_size(len(images.labels))
    order = torch.randperm(len(images.labels), generator=generator)[:count].to(world.device)
    for index in range(first, len(order) // config.batch_size):
        batch = order[index * config.batch_size : (index + 1) * config.batch_size]
        mine = batch[world.rank :: world.size]
        yield [(augment(images.normalized(mine, config.memory_format), config), images.labels[mine])]


@torch.no_grad()
def validate(model: nn.Module, data: Cifar, config: Config, world: World, epoch: int) -> dict[str, float]:
    """Returns top-1 in percent and the cross-entropy, or nothing if the config validates after later epochs.

    The scores of each image and its mirror image are averaged.
    """
    if epoch + 1 < config.epochs and (epoch + 1) % config.validate_every:
        return {}
    images = data.test
    model.eval()
    sums = torch.zeros(2, device=world.device)
    mine = torch.arange(world.rank, len(images.labels), world.size, device=world.device)
    for batch in mine.split(512):
        x, labels = images.normalized(batch, config.memory_format), images.labels[batch]
        with config.autocast(world.device):
            scores = (model(x) + model(x.flip(3))).float() / 2
        sums += torch.stack([(scores.argmax(1) == labels).sum(), F.cross_entropy(scores, labels, reduction="sum")])
    hits, loss = (world.sum(sums) / len(images.labels)).tolist()
    return {"top1": 100 * hits, "test_loss": loss}


def is_pruned(config: Config, module: nn.Module, name: str) -> bool:
    """Prunes what the published runs pruned, and all linear layers of a transformer's blocks."""
    return is_pruned_convolution(module, name) or (isinstance(module, nn.Linear) and name.startswith("blocks."))


def prepare(config: Config, data: Cifar, world: World) -> nn.Module:
    model = make_model(config).to(world.device, memory_format=config.memory_format)  # type: ignore[call-overload]
    return config.convert(model, partial(is_pruned, config))


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    if config.net == "vit":
        return torch.optim.AdamW(decay_matrices(model, config.weight_decay), config.lr)
    return torch.optim.SGD(model.parameters(), 0.0, config.momentum, weight_decay=config.weight_decay)


def steps(config: Config, data: Cifar, world: World) -> int:
    if config.cutout > (size := min(data.train.pixels.shape[1:3])):
        raise UserError(f"config: expected cutout <= {size}, the size of an image, got {config.cutout}")
    return config.steps(config.epoch_size(len(data.train.labels)), world)


RECIPE = Recipe(
    name="cifar10",
    config=Config,
    metrics=("top1", "test_loss"),
    load=load,
    prepare=prepare,
    is_pruned=is_pruned,
    make_optimizer=make_optimizer,
    steps=steps,
    batches=batches,
    forward=lambda config: partial(classify, label_smoothing=config.label_smoothing),
    validate=validate,
)

main = partial(launch, RECIPE, __doc__)

if __name__ == "__main__":
    main()
