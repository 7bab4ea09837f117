# SPDX-License-Identifier: BSD-3-Clause
"""Skips the recipe tests if a package that the recipes need is missing, as in the environment with the other torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

NEEDED = ("torchvision", "safetensors", "rich", "matplotlib", "transformers", "peft")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes noise images of three classes, each brightest in its own channel, in the folders of both image recipes."""
    from torchvision.transforms.v2.functional import to_pil_image

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in range(3):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                image = torch.randint(0, 80, (3, 32, 32), generator=generator, dtype=torch.uint8)
                image[label] += 150
                to_pil_image(image).save(folder / part / f"class{label}" / f"{index}.jpeg")
    (folder / "test").symlink_to(folder / "val")
    return folder
