# SPDX-License-Identifier: BSD-3-Clause
"""Tests ffcv files, if ffcv is installed: packed from a folder, and read by both image recipes.

Each test uses its own processes, because numba leaves errors behind when it ends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, command, lines

pytest.importorskip("ffcv")
pytestmark = pytest.mark.slow

SAME_PIXELS = """
import sys
from pathlib import Path
import torch
from recipes.cifar10.data import load
from recipes.cifar10.train import Config
from recipes.common.process import World

folder, beton = (load(Config(classes=3), Path(path), World(0, 1, torch.device("cpu"))) for path in sys.argv[1:])
assert torch.equal(folder.train.pixels, beton.train.pixels)
assert torch.equal(folder.test.labels, beton.test.labels)
"""


def python(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def packed(images: Path, folder: Path, *options: str) -> Path:
    python("-m", "recipes.pack", str(images), str(folder), "--workers", "1", *options)
    assert sorted(path.name for path in folder.iterdir()) == ["test.beton", "train.beton", "val.beton"]
    return folder


def test_imagenet(images: Path, tmp_path: Path) -> None:
    data = packed(images, tmp_path / "data")
    python("-m", *command("imagenet", tmp_path / "runs", data, "--set", "workers=1"))
    assert lines(tmp_path / "runs")[0]["data"] == "data, ffcv"


def test_cifar10_has_the_same_pixels(images: Path, tmp_path: Path) -> None:
    data = packed(images, tmp_path / "data", "--jpeg-share", "0")
    python("-c", SAME_PIXELS, str(images), str(data))
