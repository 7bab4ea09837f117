# SPDX-License-Identifier: BSD-3-Clause
"""Loads CIFAR-10 decoded into memory, from torchvision's download, a folder of images, or ffcv files."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torchvision.datasets import CIFAR10

from ..common.errors import UserError
from ..common.images import check_same_classes, decode, list_images, normalize
from ..common.process import World
from .config import Config

_MEAN, _STD = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)


class Images(NamedTuple):
    """Decoded images and their classes, on the training device."""

    pixels: Tensor  # (N, height, width, 3), uint8
    labels: Tensor  # (N)

    def normalized(self, indices: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Returns float32 images, (len(indices), 3, height, width), with mean 0 and deviation 1 over the data set."""
        return normalize(self.pixels[indices].permute(0, 3, 1, 2), _MEAN, _STD, memory_format)


class Cifar(NamedTuple):
    name: str  # the name in the results
    train: Images
    test: Images


def load(config: Config, folder: Path | None, world: World) -> Cifar:
    """Loads the data in ``folder``, which may have any of the three forms.

    Raises:
        UserError: if the folder has none of the forms, a part is missing, the number of classes is wrong, or an image
            cannot be read.
    """
    if folder is None:
        raise UserError(
            "--data: expected a folder, got none: what torchvision's CIFAR10 downloaded, or train/ and test/"
        )
    if (folder / "cifar-10-batches-py").is_dir():
        name, read = "CIFAR-10", _read_torchvision
    elif (folder / "train").is_dir() and (folder / "test").is_dir():
        check_same_classes(folder / "train", folder / "test")
        name, read = "CIFAR-10, image files", _read_folder
    elif (folder / "train.beton").is_file() and (folder / "test.beton").is_file():
        name, read = "CIFAR-10, ffcv", _read_beton
    else:
        raise UserError(
            f"--data: expected cifar-10-batches-py/, train/ and test/, or train.beton and test.beton in {folder}, "
            "got none of these"
        )
    parts = [read(folder, part, config) for part in ("train", "test")]
    for part, images in zip(("train", "test"), parts, strict=True):
        if int(images.labels.max()) >= config.classes:
            raise UserError(f"--data: expected {config.classes} classes, got {int(images.labels.max()) + 1} in {part}")
    counts = [len(images.labels) for images in parts]
    if counts != [50000, 10000]:
        name += f", {counts[0]} + {counts[1]} images"
    return Cifar(name, *(Images(*(tensor.to(world.device) for tensor in part)) for part in parts))


def _read_torchvision(folder: Path, part: str, config: Config) -> Images:
    try:  # torchvision checks the hash of every file before it unpickles the file
        data = CIFAR10(str(folder), train=part == "train")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"--data: expected all of CIFAR-10 in {folder}, got: {error}") from None
    return Images(torch.from_numpy(data.data), torch.tensor(data.targets))


def _read_folder(folder: Path, part: str, config: Config) -> Images:
    def read(path: str) -> Tensor | None:
        try:
            return decode(path).permute(1, 2, 0)
        except ValueError as error:
            config.skip(str(error))
            return None

    paths, labels = zip(*list_images(folder / part, config.classes).samples, strict=True)
    with ThreadPoolExecutor() as pool:
        decoded = list(track(pool.map(read, paths), f"decoding {part}", len(paths), transient=True))
    good = [(pixels, label) for pixels, label in zip(decoded, labels, strict=True) if pixels is not None]
    by_size = {tuple(pixels.shape): path for pixels, path in zip(decoded, paths, strict=True) if pixels is not None}
    if len(by_size) != 1:
        raise UserError(f"--data: expected images of one size in {folder / part}, got {by_size or 'no good image'}")
    return Images(torch.stack([pixels for pixels, _ in good]), torch.tensor([label for _, label in good]))


def _read_beton(folder: Path, part: str, config: Config) -> Images:
    try:
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor
    except ImportError as error:
        raise UserError(f"--data: expected ffcv to be installed (pip install ffcv) for .beton files: {error}") from None
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(
        str(folder / f"{part}.beton"),
        batch_size=500,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines=pipelines,
        drop_last=False,
    )
    batches = [(images.clone(), labels.flatten().clone()) for images, labels in loader]  # the loader reuses its buffers
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return Images(images, labels)
