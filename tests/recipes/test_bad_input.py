# SPDX-License-Identifier: BSD-3-Clause
"""What a recipe says of bad settings, bad data, and a loss that is no number."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from small import IMAGES, RECIPES, ROOT, command, fails, lines, run
from torch import nn

from recipes.cifar10.train import Config as CifarConfig
from recipes.common import config
from recipes.common.errors import UserError
from recipes.common.finite import FiniteCheck
from recipes.imagenet.train import Config as ImageNetConfig
from recipes.lm.gpt import Config as GPTConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", "config: expected one of method, .*, got 'epoch' .*; did you mean 'epochs'?"),
        ("epochs=three", "config: expected epochs to be int, got 'three'"),
        ("epochs=2.5", "config: expected epochs to be int, got 2.5"),
        ("flip=1", "config: expected flip to be bool, got 1"),
        ("method=best", "config: expected method to be one of plain, magnitude, .*, got 'best'"),
        ("lr", "--set: expected key=value, got 'lr'"),
        ("pattern=5:4", "config: .*5:4"),
        ("plan=nowhere.json", "config: expected plan to be a file, got nowhere.json"),
        ("plan=README.md", "config: Expecting value"),
        ("epoch_images=25", "config: expected 0 <= epoch_images <= 24 images, got 25"),
        ("validate_every=0", "config: expected validate_every >= 1, got 0"),
        ("batch_size=1000", "config: expected batch_size to be at most 24, the number of images"),
        ("batch_size=0", "config: expected batch_size to be at most 24, the number of images"),
        ("peak_epoch=2", "config: expected 0 < peak_epoch < epochs = 2, got 2.0"),
        ("classes=10", "--data: expected 10 class folders in .*, got 3"),
    ],
)
def test_bad_settings(
    setting: str, message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fails(monkeypatch, command("cifar10", tmp_path, images, "--set", setting))
    assert re.match(f"cifar10: {message}".replace("?", "[?]"), said), said


def test_config_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text('width = 16\nmethod = "mvue"\n')
    two.write_text("width = 8\nlr = 1\n")
    loaded = config.load(CifarConfig, [one, two], ["pattern=1:4", 'amp="off"'])
    assert (loaded.width, loaded.method, loaded.lr, loaded.pattern, loaded.amp) == (8, "mvue", 1.0, "1:4", "off")
    assert isinstance(loaded.lr, float)
    two.write_text("width = ")
    with pytest.raises(UserError, match="config: expected TOML, got "):
        config.load(CifarConfig, [two])
    with pytest.raises(UserError, match=r"config: expected a TOML file, got .*: No such file"):
        config.load(CifarConfig, [tmp_path / "none.toml"])


@pytest.mark.parametrize(
    "file", sorted(RECIPES.glob("*/configs/*.toml")), ids=lambda file: f"{file.parts[-3]}-{file.stem}"
)
def test_every_config_loads(file: Path) -> None:
    """And its first line is the command that runs it."""
    types = {"cifar10": CifarConfig, "imagenet": ImageNetConfig, "lm": GPTConfig}
    loaded = config.load(types[file.parts[-3]], [file])
    text = file.read_text().splitlines()
    assert len(text) <= 15
    assert "-m recipes." in text[0]
    assert str(file.relative_to(ROOT)) in text[0]
    if "_" in file.stem and file.parts[-3] != "imagenet":
        assert loaded.row == "{} {}:{}".format(*file.stem.rsplit("_", 2))


@pytest.mark.parametrize("recipe", IMAGES)
def test_a_truncated_image(
    recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    victim = folder / "train" / "class1" / "3.jpeg"
    victim.write_bytes(victim.read_bytes()[:400])
    words = command(recipe, tmp_path, folder, "--set", "batch_size=23")
    said = fails(monkeypatch, words)
    assert str(victim) in said
    assert "--set bad_images=skip" in said
    shutil.rmtree(tmp_path / recipe, ignore_errors=True)
    run(monkeypatch, [*words, "--set", "bad_images=skip"])
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", IMAGES)
def test_missing_data(recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(recipe, tmp_path, tmp_path)
    assert "--data: expected " in fails(monkeypatch, words)
    assert "got none" in fails(monkeypatch, words[:2])
    half = tmp_path / "half"
    shutil.copytree(images / "train", half / "train")
    for name in ("val", "test"):
        (half / name / "class0").mkdir(parents=True)
    assert "--data: " in fails(monkeypatch, command(recipe, tmp_path, half))


def test_text_of_the_user(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"to be or not to be, " * 2000)
    run(monkeypatch, command("gpt", tmp_path, images, "--data", str(text)))
    assert lines(tmp_path)[0]["data"].startswith("text, 0.0 MB, sha256 ")
    text.write_bytes(b"short")
    assert "expected at least 17 bytes" in fails(monkeypatch, command("gpt", tmp_path, images, "--data", str(text)))
    none = str(tmp_path / "none")
    assert "expected a text file" in fails(monkeypatch, command("gpt", tmp_path, images, "--data", none))


def test_the_layer_whose_gradient_went_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    check = FiniteCheck(model, every=100)
    for step in range(6):
        loss = model(torch.randn(8, 4)).mean()
        model.zero_grad()
        loss.backward()
        if step == 3:  # the pruning of layer 1, say, made its gradient and those before it infinite
            for layer in (model[0], model[1]):
                layer.weight.grad.fill_(torch.inf)
        check.update(step, loss * torch.nan if step > 3 else loss)
    with pytest.raises(UserError, match=r"got none at step 4; the gradient of 1.weight went first, at step 3\."):
        check.check()


def test_an_overflow_in_the_forward() -> None:
    model = nn.Linear(4, 1)
    check = FiniteCheck(model, every=1)
    check.update(0, torch.tensor(1.0))
    with pytest.raises(UserError, match=r"at step 1; every gradient before it was finite"):
        check.update(1, torch.tensor(torch.inf))


def test_a_run_that_diverges_says_where(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command("cifar10", tmp_path, images, "--set", "lr=1e38")
    said = fails(monkeypatch, words)
    assert said.startswith("cifar10: loss: expected a finite number, got none at step ")
