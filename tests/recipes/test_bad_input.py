# SPDX-License-Identifier: BSD-3-Clause
"""Tests the errors of a recipe for bad settings, bad data, and a loss that is not finite."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import IMAGES, RECIPES, ROOT, command, fails, lines, run
from torch import nn

from recipes.cifar10.train import Config as CifarConfig
from recipes.common import config
from recipes.common.errors import UserError
from recipes.common.finite import FiniteCheck
from recipes.common.images import decode
from recipes.lm.lora import Config as LoraConfig
from recipes.lm.text import load_text

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
        ("plan=README.md", "config: expected plan to be JSON, got README.md: Expecting value"),
        ("method=plain weight_grad=2:4", "config: expected a method with weight_grad = 2:4, got method = plain"),
        ("epoch_images=25", "config: expected 0 <= epoch_images <= 24 images, got 25"),
        ("validate_every=0", "config: expected validate_every >= 1, got 0"),
        ("batch_size=1000", "config: expected batch_size to be at most 24, the number of images"),
        ("epochs=0", "config: expected epochs >= 1, got 0"),
        ("lr=nan", "config: expected lr to be finite, got nan"),
        ("lr=-1", "config: expected lr >= 0, got -1.0"),
        ("momentum=5", "config: expected 0 <= momentum <= 1, got 5.0"),
        ("label_smoothing=2", "config: expected 0 <= label_smoothing <= 1, got 2.0"),
        ("batch_size=0", "config: expected batch_size >= 1, got 0"),
        ("cutout=40", "config: expected cutout <= 32, the size of an image, got 40"),
        ("clip=-1", "config: expected clip >= 0, got -1.0"),
        ("exact_first=3", "config: expected exact_first . exact_last <= epochs, got 3 . 0 > 2"),
        ("budget=2", "config: expected no method = mvue with budget = 2, which chooses what to prune"),
        ("peak_epoch=2", "config: expected 0 < peak_epoch < epochs = 2, got 2.0"),
        ("classes=10", "--data: expected 10 class folders in .*, got 3"),
    ],
)
def test_bad_settings(
    setting: str, message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fails(monkeypatch, command("cifar10", tmp_path, images, *(f"--set={word}" for word in setting.split())))
    assert re.match(f"cifar10: {message}".replace("?", "[?]"), said), said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epoch_steps=0"], "expected epoch_steps >= 1, got 0"),
        (["accumulate=0"], "expected accumulate >= 1, got 0"),
        (["rank=0"], "expected rank >= 1, got 0"),
        (["context=16", "validation_bytes=16"], "expected validation_bytes > context, got 16 <= 16"),
        (["epochs=2", "warmup=3"], "expected warmup <= epochs, got 3 > 2"),
    ],
)
def test_bad_settings_of_text(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(LoraConfig, [], settings)


@pytest.mark.parametrize(
    ("option", "value"), [("--seeds", "0"), ("--threads", "-1"), ("--seeds", "many"), ("--seed", "9" * 20)]
)
def test_bad_numbers(option: str, value: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command("cifar10", tmp_path, images, option, value))
    assert stopped.value.code == 2


def test_an_unknown_device(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fails(monkeypatch, command("cifar10", tmp_path, images, "--device", "gpu"))
    assert said.startswith("cifar10: --device: expected a device of this machine, got gpu: ")


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
    "file", sorted([*RECIPES.glob("pruning/*.toml"), *RECIPES.glob("*/configs/*.toml")]), ids=lambda file: file.stem
)
def test_every_config_loads(file: Path) -> None:
    """Every config must load, and its first line must be the command that runs it."""
    text = file.read_text().splitlines()
    assert len(text) <= 15
    (module,) = re.findall(r"-m (recipes\.\S+)", text[0])
    assert str(file.relative_to(ROOT)) in text[0]
    loaded = config.load(importlib.import_module(module).Config, [file])
    if file.parent.name == "pruning":
        assert loaded.row.replace(" ", "_").replace(":", "_") == file.stem


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
def test_other_classes_in_one_part(recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of classes agree, so without a check every test image would count as wrong."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for part in ("test", "val"):
        (folder / part / "class0").rename(folder / part / "zebra")
    said = fails(monkeypatch, command(recipe, tmp_path, folder))
    assert re.search(r"expected the same classes in train/ and (test|val)/, got class0, zebra in one only", said)


def test_a_batch_without_a_good_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for victim in folder.glob("train/*/*.jpeg"):
        victim.write_bytes(b"no image")
    said = fails(monkeypatch, command("imagenet", tmp_path, folder, "--set", "bad_images=skip"))
    assert "expected a good image in every batch of every process, got none in one" in said


def test_images_that_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow raises many types of errors, and turns 16-bit and float images into black or white ones."""
    path = str(tmp_path / "image.png")
    Image.new("RGB", (16, 16)).save(path)
    assert decode(path).shape == (3, 16, 16)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a decompression bomb
        with pytest.raises(ValueError, match=r"image.png: .*decompression bomb"):
            decode(path)
    content = bytearray(Path(path).read_bytes())
    content[12:16] = b"\0\0\0\0"  # the name of the first chunk
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"image.png: \S"):
        decode(path)
    for mode, name in (("I;16", "deep.png"), ("F", "float.tiff")):
        Image.new(mode, (16, 16)).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: expected 8 bits per channel, got Pillow's mode [IF]"):
            decode(str(tmp_path / name))


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
    assert "expected text, got" in fails(monkeypatch, command("gpt", tmp_path, images, "--data", none))


def test_a_folder_of_text(tmp_path: Path) -> None:
    """Whether a file is for validation depends on its name alone."""
    for number in range(60):
        (tmp_path / str(number % 3)).mkdir(exist_ok=True)
        (tmp_path / str(number % 3) / f"{number}.txt").write_bytes(bytes([number]) * 100)
    text = load_text(tmp_path, 17)
    train, validation = (set(part.tolist()) for part in (text.train, text.validation))
    assert train | validation == set(range(60))
    assert not train & validation
    (tmp_path / "new.txt").write_bytes(b"\xff" * 100)
    assert validation <= set(load_text(tmp_path, 17).validation.tolist())


def test_a_name_that_is_not_utf8(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"), tmp_path / "runs"
    Path(text).write_bytes(b"to be or not to be, " * 2000)
    run(monkeypatch, command("gpt", out, images, "--data", text))
    (line,) = lines(out)
    assert line["data"].startswith("\\udcff.txt, 0.0 MB")
    said = fails(monkeypatch, command("gpt", out, images, "--eval", text))
    said.encode(errors="backslashreplace")
    assert said.startswith("gpt: checkpoint: expected a whole safetensors file, got ")


def test_the_layer_whose_gradient_went_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    check = FiniteCheck(model, every=100)
    for step in range(6):
        loss = model(torch.randn(8, 4)).mean()
        model.zero_grad()
        loss.backward()
        if step == 3:  # as if pruning layer 1 made its own and all earlier gradients infinite
            for layer in (model[0], model[1]):
                layer.weight.grad.fill_(torch.inf)
        check.update(step, loss * torch.nan if step > 3 else loss)
    with pytest.raises(
        UserError, match=r"got none at step 4; the gradient of 1.weight was the first that was not finite, at step 3\."
    ):
        check.check()


def test_an_overflow_in_the_forward() -> None:
    model = nn.Linear(4, 1)
    check = FiniteCheck(model, every=1)
    check.update(0, torch.tensor(1.0))
    with pytest.raises(UserError, match=r"at step 1; every gradient before it was finite"):
        check.update(1, torch.tensor(torch.inf))


def test_a_run_that_diverges_says_where(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("cifar10", tmp_path, images, "--set", "lr=1e38")
    said = fails(monkeypatch, words)
    assert said.startswith("cifar10: loss: expected a finite number, got none at step ")
    capsys.readouterr()
    said = fails(monkeypatch, [*words, "--out", str(tmp_path / "two"), "--seeds", "2"])
    assert said == "cifar10: the runs of these seeds diverged: 0, 1"
    assert [line[:30] for line in capsys.readouterr().err.splitlines()] == [
        f"cifar10: seed {seed}: loss: expected"[:30] for seed in range(2)
    ]
