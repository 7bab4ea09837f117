# SPDX-License-Identifier: BSD-3-Clause
"""Loads ImageNet, or any folder of images with its layout. PyTorch's workers or ffcv decode the images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..common.errors import UserError
from ..common.files import printable
from ..common.images import check_same_classes, decode, list_images, normalize
from ..common.process import World, derive_seed
from .config import Config

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_CROP = 224 / 256  # the part of an image's shorter side that evaluation uses


class Part(NamedTuple):
    """Training or validation data: a folder of class folders, or one ffcv file."""

    path: Path
    listing: ImageFolder | None  # None: ffcv
    size: int


class ImageNet(NamedTuple):
    name: str  # the name in the results
    train: Part
    val: Part


def load(config: Config, folder: Path | None, world: World) -> ImageNet:
    """Loads the data in ``folder``: train/ and val/, or train.beton and val.beton.

    Raises:
        UserError: if the folder has neither, or another number of classes.
    """
    if folder is None:
        raise UserError("--data: expected a folder with train/ and val/, or train.beton and val.beton, got none")
    if (folder / "train.beton").is_file() and (folder / "val.beton").is_file():
        parts = [Part(path, None, _beton_size(path)) for path in (folder / "train.beton", folder / "val.beton")]
        return ImageNet(f"{folder.name}, ffcv", *parts)
    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise UserError(f"--data: expected train/ and val/, or train.beton and val.beton in {folder}, got neither")
    check_same_classes(folder / "train", folder / "val")
    listings = [list_images(folder / part, config.classes) for part in ("train", "val")]
    return ImageNet(printable(folder.name), *(Part(Path(listing.root), listing, len(listing)) for listing in listings))


def train_batches(
    part: Part, config: Config, seed: int, epoch: int, first: int, resolution: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this process's part of each full batch of an epoch, from batch ``first`` on: images and classes."""
    order = torch.randperm(part.size, generator=torch.Generator().manual_seed(derive_seed("epoch", seed, epoch)))
    whole = order[: part.size // config.batch_size * config.batch_size].view(-1, config.batch_size)
    mine = whole[first:, world.rank :: world.size]
    if part.listing is None:
        yield from _ffcv(part, mine, config, world, resolution, augment=True)
    else:
        crop = v2.Compose([v2.RandomResizedCrop(resolution, antialias=True), v2.RandomHorizontalFlip()])
        yield from _workers(
            _Decoded(part.listing, crop, derive_seed("crop", seed, epoch)), mine.tolist(), config, world
        )


def val_batches(part: Part, config: Config, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this process's part of all images, in batches of at most 256."""
    mine = torch.arange(world.rank, part.size, world.size).split(256)
    if part.listing is None:
        yield from _ffcv(part, mine, config, world, config.eval_resolution, augment=False)
    else:
        resize = v2.Resize(round(config.eval_resolution / _CROP), antialias=True)
        center = v2.Compose([resize, v2.CenterCrop(config.eval_resolution)])
        yield from _workers(_Decoded(part.listing, center, 0), [batch.tolist() for batch in mine], config, world)


class _Decoded(Dataset[tuple[Tensor | None, int, str]]):
    """A data set of tuples (image, class, reason); reason says why an image is None.

    The random augmentation of an image depends only on the seed, the epoch and the image, not on the worker.
    """

    def __init__(self, listing: ImageFolder, transform: v2.Transform, seed: int) -> None:
        self._samples, self._transform, self._seed = listing.samples, transform, seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        path, label = self._samples[index]
        try:
            image = decode(path)
        except ValueError as error:
            return None, label, str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._seed, index))
            return self._transform(image), label, ""


def _collate(samples: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    good = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return images, torch.tensor([label for _, label in good]), [reason for _, _, reason in samples if reason]


def _worker_count(config: Config, world: World) -> int:
    return config.workers if config.workers >= 0 else max((os.cpu_count() or 2) // world.size, 1)


def _workers(data: _Decoded, batches: list[list[int]], config: Config, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=_worker_count(config, world),
        collate_fn=_collate,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # else starting workers would advance the generator of the training step
    )
    for images, labels, bad in loader:
        for reason in bad:
            config.skip(reason)
        if not len(labels):  # without it, another process would wait for this one forever
            raise UserError("--data: expected a good image in every batch of every process, got none in one")
        yield (
            normalize(images.to(world.device, non_blocking=True), _MEAN, _STD, config.memory_format),
            labels.to(world.device),
        )


def _beton_size(path: Path) -> int:
    try:
        from ffcv.reader import Reader
    except ImportError as error:
        raise UserError(f"--data: .beton files need ffcv (pip install ffcv): {error}") from None
    return int(Reader(str(path)).num_samples)


def _ffcv(
    part: Part, batches: Any, config: Config, world: World, resolution: int, *, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    size = (resolution, resolution)
    crop = RandomResizedCropRGBImageDecoder(size) if augment else CenterCropRGBImageDecoder(size, _CROP)
    images = [crop, *([RandomHorizontalFlip()] if augment else []), ToTensor(), ToTorchImage(channels_last=False)]
    loader = Loader(
        str(part.path),
        batch_size=len(batches[0]),
        num_workers=max(_worker_count(config, world), 1),
        order=OrderOption.SEQUENTIAL,
        indices=torch.cat(list(batches)).numpy(),
        pipelines={"image": images, "label": [IntDecoder(), ToTensor()]},
        drop_last=False,
    )
    for pixels, labels in loader:
        on_device = pixels.to(world.device, non_blocking=True)
        yield normalize(on_device, _MEAN, _STD, config.memory_format), labels.flatten().to(world.device)
