# SPDX-License-Identifier: BSD-3-Clause
"""Tests that every recipe trains and evaluates, and tests its parts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT, SMALL, command, fails, lines, run, saved
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torchvision import models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.cifar10.train import Config as CifarConfig
from recipes.cifar10.train import augment
from recipes.common import checkpoint
from recipes.common.process import derive_seed
from recipes.imagenet.train import Config as ImageNetConfig
from recipes.imagenet.train import add_blurpool, resolution
from recipes.lm import gradient_error

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("recipe", SMALL)
def test_trains_and_evaluates(
    recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, command(recipe, tmp_path, images, "--seeds", "2"))
    first, second = lines(tmp_path)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["row"] == ("mvue 2:4, weight gradient 4:16" if recipe == "gpt" else "mvue 2:4")
    assert first["layers"]["pruned"] > 0
    assert [point["epoch"] for point in first["curve"]] == [1, 2]
    assert first["curve"][0]["train_loss"] != second["curve"][0]["train_loss"]
    metric = importlib.import_module(f"recipes.{SMALL[recipe][0]}").RECIPE.metrics[0]
    assert first[metric] == first["curve"][-1][metric]
    capsys.readouterr()
    path = tmp_path / recipe
    (path,) = path.glob("*/seed0/checkpoint.safetensors")
    run(monkeypatch, command(recipe, tmp_path, images, "--eval", str(path)))
    name, value, *_ = capsys.readouterr().out.replace(",", "").split()
    assert (name, float(value)) == (metric, pytest.approx(first[metric], rel=1e-4))


def test_evaluates_no_other_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters of LoRA are a part of the model. Weights of another model, and missing ones, must be errors."""
    for recipe in ("lora", "gpt"):
        run(monkeypatch, command(recipe, tmp_path / recipe, images))
    paths = {recipe: saved(tmp_path / recipe) for recipe in ("lora", "gpt")}
    for recipe, other in (("lora", "gpt"), ("gpt", "lora")):
        said = fails(monkeypatch, command(recipe, tmp_path, images, "--eval", str(paths[other])))
        assert said.startswith(f"{recipe}: --eval: expected a checkpoint with the weights of this model, got one that")
    wide = command("cifar10", tmp_path / "cifar10", images)
    run(monkeypatch, wide)
    said = fails(monkeypatch, [*wide, "--eval", str(saved(tmp_path / "cifar10")), "--set", "width=8"])
    assert said.startswith("cifar10: --eval: Error(s) in loading state_dict")
    weights, training = checkpoint.load(paths["gpt"])
    del weights["blocks.0.qkv.weight"]
    checkpoint.save(paths["gpt"], weights, training)
    for option in ("--eval", "--resume"):
        words = ["--eval", str(paths["gpt"])] if option == "--eval" else ["--resume"]
        said = fails(monkeypatch, command("gpt", tmp_path / "gpt", images, *words))
        assert said.startswith(f"gpt: {option}: expected a checkpoint with the weights of this model")
        assert said.endswith("in blocks.0.qkv.weight")


def test_lora_on_a_model_of_the_users(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lora recipe must train a user's model and report bits per byte, even if most tokens are two bytes long."""
    folder = tmp_path / "model"
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    (tmp_path / "text").write_bytes(b"ab" * 20_000)
    words = command("lora", tmp_path / "runs", images, "--data", str(tmp_path / "text"), "--set", f"model={folder}")
    run(monkeypatch, words)
    (line,) = lines(tmp_path / "runs")
    assert line["layers"]["pruned"] == 4  # of 7: the input of the first q, k and v needs no gradient
    # Every token is two bytes, and its 257 values are still almost equally likely: about log2(257) / 2 bits per byte.
    assert line["bits_per_byte"] == pytest.approx(4, abs=0.5)
    assert "expected a causal language model" in fails(monkeypatch, [*words, "--set", f"model={tmp_path}", "--resume"])
    (tmp_path / "text").write_bytes(b"ab" * 250)  # enough bytes, but too few tokens
    said = fails(monkeypatch, [*words, "--out", str(tmp_path / "other")])
    assert "expected more than context = 16 tokens to train on and to validate with" in said


def test_classify_starts_from_a_gpt(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes that differ in their bytes must be told apart, and the pretrained body must be used."""
    run(monkeypatch, command("gpt", tmp_path / "gpt", images))
    for name, text in (("small", b"abc " * 5000), ("large", b"ABC " * 5000)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "text").write_bytes(text)
    model = f"model={saved(tmp_path / 'gpt')}"
    words = command("classify", tmp_path / "runs", images, "--data", str(tmp_path / "classes"), "--set", model)
    run(monkeypatch, [*words, "--set", "epoch_steps=20"])
    (line,) = lines(tmp_path / "runs")
    assert line["data"].startswith("classes, 2 classes, sha256 ")
    assert line["top1"] == 100
    trained, base = checkpoint.load(saved(tmp_path / "runs")).weights, checkpoint.load(saved(tmp_path / "gpt")).weights
    assert torch.nn.functional.cosine_similarity(trained["body.bytes.weight"], base["bytes.weight"]).min() > 0.5
    (tmp_path / "classes" / "small" / "text").write_bytes(b"abc")
    other = [*words, "--out", str(tmp_path / "other")]
    assert "expected at least 17 bytes to train on and to validate with" in fails(monkeypatch, other)
    assert "a folder for each of two or more classes" in fails(monkeypatch, [*other, "--data", str(tmp_path / "runs")])
    assert "expected a folder of folders" in fails(monkeypatch, [*other, "--data", str(tmp_path / "missing")])


def test_gradient_error(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gradient_error"])
    gradient_error.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| layer | mvue 2:4 | mvue 4:8 | mvue 4:32 | magnitude 2:4 | rescale 2:4 |"
    assert len(rows) == 6 * 4
    gradient, weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.eye(4)
    assert gradient_error.error(gradient, weight, "2:4", "magnitude") == pytest.approx((5 / 30) ** 0.5)
    assert gradient_error.error(gradient, weight, "4:4", "mvue") == 0
    run(
        monkeypatch, command("gpt", tmp_path, images, "--set", "size=small", "--set", "epochs=1", "--set", "warmup=0.5")
    )
    run(monkeypatch, ["recipes.lm.gradient_error", str(saved(tmp_path))])
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2 + 4 * 4
    run(monkeypatch, command("cifar10", tmp_path / "images", images))
    said = fails(monkeypatch, ["recipes.lm.gradient_error", str(saved(tmp_path / "images"))])
    assert said.startswith("gradient_error: checkpoint: expected one of recipes.lm.gpt, got ")


def test_a_checkpoint_with_other_metadata(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "other.safetensors", {}, {"config": []})
    said = fails(monkeypatch, command("gpt", tmp_path, images, "--eval", str(tmp_path / "other.safetensors")))
    assert said.startswith("gpt: checkpoint: expected a checkpoint of a recipe, got ")


@pytest.mark.parametrize("recipe", ["cifar10", "gpt"])
def test_plain_is_exact(recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a run whose epochs are all exact must give the plain run's weights."""
    run(monkeypatch, command(recipe, tmp_path / "plain", images, row="plain"))
    run(monkeypatch, command(recipe, tmp_path / "paused", images, "--set", "exact_first=1", "--set", "exact_last=1"))
    run(monkeypatch, command(recipe, tmp_path / "pruned", images, "--set", "exact_last=1"))
    plain, paused, pruned = (checkpoint.load(saved(tmp_path / name)).weights for name in ("plain", "paused", "pruned"))
    assert all(torch.equal(plain[name], paused[name]) for name in plain)
    assert not all(torch.equal(plain[name], pruned[name]) for name in plain)


def test_vision_transformer(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("cifar10", tmp_path, images, "--set", "net=vit", "--set", "lr=1e-3")
    run(monkeypatch, words)
    (line,) = lines(tmp_path)
    assert line["layers"]["pruned"] == 4 * 4  # each linear layer of the blocks, neither the patches nor the head
    assert line["curve"][-1]["train_loss"] < line["curve"][0]["train_loss"]
    capsys.readouterr()
    run(monkeypatch, [*words, "--eval", str(saved(tmp_path))])
    assert float(capsys.readouterr().out.split("test_loss ")[1].split()[0]) == pytest.approx(
        line["test_loss"], rel=1e-4
    )
    message = "expected net = vit to have a width that is a multiple of 32, got 48"
    assert message in fails(monkeypatch, [*words, "--set", "width=48", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["cifar10", "gpt"])
def test_reduced_precision(
    recipe: str, amp: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, command(recipe, tmp_path / "full", images))
    run(monkeypatch, command(recipe, tmp_path / "reduced", images, "--set", f"amp={amp}"))
    full, reduced = (lines(tmp_path / name)[0]["curve"][-1]["train_loss"] for name in ("full", "reduced"))
    assert reduced != full
    assert reduced == pytest.approx(full, rel=0.1)
    assert (checkpoint.load(saved(tmp_path / "reduced")).training["scaler"] != {}) == (amp == "float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("cifar10", ""),
        ("imagenet", ""),
        ("gpt", ""),
        ("gpt", "shard=true"),
        ("gpt", "method=plain weight_grad= budget=2"),
        ("lora", ""),
        ("classify", ""),
    ],
)
def test_two_processes(recipe: str, more: str, images: Path, tmp_path: Path) -> None:
    settings = [word for setting in more.split() for word in ("--set", setting)]

    def torchrun(*words: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [*launcher, *command(recipe, tmp_path, images, "--device", "cpu", *settings, *words)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    torchrun()
    (line,) = lines(tmp_path)
    assert line["processes"] == 2
    torchrun("--resume")
    assert len(lines(tmp_path)) == 1


def test_seeds_differ() -> None:
    assert (
        len({derive_seed("step", seed, rank, step) for seed in range(3) for rank in range(3) for step in range(9)})
        == 81
    )
    assert derive_seed("step", 0, 0, 0) == derive_seed("step", 0, 0, 0)
    assert 0 <= derive_seed("x") < 2**63


def test_augment() -> None:
    plain = CifarConfig(flip=False, translate=0, cutout=0)
    x = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    assert torch.equal(augment(x, plain), x)
    flipped = augment(x, CifarConfig(flip=True, translate=0, cutout=0))
    kinds = {(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(flipped, x, strict=True)}
    assert kinds == {(True, False), (False, True)}
    moved = augment(x, CifarConfig(flip=False, translate=2, cutout=0))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for image, source in zip(moved, padded, strict=True):
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(image, source[:, r : r + 32, c : c + 32])]
        assert len(places) == 1
    cut = augment(x, CifarConfig(flip=False, translate=0, cutout=4))
    assert ((cut == 0).sum((1, 2, 3)) == 3 * 16).all()
    assert torch.equal(cut[cut != 0], x[cut != 0])


def test_progressive_resolution() -> None:
    sizes = [resolution(ImageNetConfig(), epoch) for epoch in range(88)]
    assert sizes[:66] == [160] * 66
    assert sizes[76:] == [192] * 12
    assert sorted(sizes) == sizes
    assert set(sizes) <= {160, 192}


def test_blurpool_comes_before_every_strided_convolution() -> None:
    model = models.resnet18()
    add_blurpool(model)
    strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    assert len(strided) == 7
    assert [name for name in strided if not name.endswith(".1")] == ["conv1"]
    x = torch.ones(1, 64, 8, 8)
    assert torch.allclose(model.layer2[0].conv1[0](x)[..., 1:-1, 1:-1], torch.ones(1, 64, 6, 6))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
