# SPDX-License-Identifier: BSD-3-Clause
"""Tests that a resumed run ends with the same weights bit for bit, and that a crash leaves checkpoints whole."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import RECIPES, ROOT, command, fails, flat, lines, run, saved
from torch import nn

import sdgp
from recipes.common import checkpoint
from recipes.common.errors import UserError
from recipes.common.process import Stop
from recipes.common.record import _match_layouts
from sdgp._plan import Interval

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize(
    ("recipe", "steps"),  # of two epochs of three steps: stops inside an epoch, at its end, or in the next epoch
    [*((recipe, steps) for recipe in ("cifar10", "gpt") for steps in (2, 3, 4)), ("imagenet", 4), ("lora", 4)],
)
def test_resumes_bit_for_bit(
    recipe: str, steps: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdgp.chooser, "_least_work", 0)  # so that even these small products are measured
    monkeypatch.setattr(sdgp.chooser, "_decisions", OrderedDict())
    run(monkeypatch, command(recipe, tmp_path / "unbroken", images))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", lambda self, step: step in (steps, 0 if steps % 3 == 0 else steps))
        stops(patch, command(recipe, tmp_path / "broken", images))
    assert checkpoint.load(saved(tmp_path / "broken")).training["step"] == steps
    assert not list((tmp_path / "broken").glob("*.jsonl"))
    # A new process would measure the products again and might choose others. It must take those of the checkpoint.
    assert len(sdgp.chooser) > 0
    monkeypatch.setattr(sdgp.chooser, "_decisions", OrderedDict())
    monkeypatch.setattr(sdgp.chooser, "measure", measured_otherwise)
    run(monkeypatch, command(recipe, tmp_path / "broken", images, "--resume"))
    weights, training = checkpoint.load(saved(tmp_path / "unbroken"))
    again, training_again = checkpoint.load(saved(tmp_path / "broken"))
    assert weights.keys() == again.keys()
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []
    assert flat(training["optimizer"]) == flat(training_again["optimizer"])
    timed = ("seconds", "images_per_s", "tokens_per_s", "waiting")
    curves = (
        [{key: value for key, value in point.items() if key not in timed} for point in each["curve"]]
        for each in (training, training_again)
    )
    assert next(curves) == next(curves)
    run(monkeypatch, command(recipe, tmp_path / "broken", images, "--resume"))  # nothing is left to do
    assert len(lines(tmp_path / "broken")) == 1


def test_a_budget_resumes_bit_for_bit(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of six steps asks after two and four. One run is stopped after the third step."""
    monkeypatch.setattr(
        sdgp.chooser, "measure", lambda *_, **__: sdgp.Decision("sparse", "", exact_ms=2.0, sparse_ms=1.0)
    )
    monkeypatch.setattr("sdgp._steps.seconds", lambda call, device: (call(), 0.1)[1])
    monkeypatch.setattr("sdgp._steps.Steps.realized", lambda *_: Interval(1.0, 1.0, 1.0))
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.01)
    large = ("context=128", "batch_size=8")  # smaller layers are never pruned
    words = [word for setting in ("weight_grad=", "budget=2", *large) for word in ("--set", setting)]
    run(monkeypatch, command("gpt", tmp_path / "unbroken", images, *words, row="plain"))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", lambda self, step: step == 0)  # at the end of the first epoch
        stops(patch, command("gpt", tmp_path / "broken", images, *words, row="plain"))
    run(monkeypatch, command("gpt", tmp_path / "broken", images, *words, "--resume", row="plain"))
    weights, again = (checkpoint.load(saved(tmp_path / name)).weights for name in ("unbroken", "broken"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    (line,) = lines(tmp_path / "broken")
    assert line["row"] == "budget, every 2 steps"
    assert [(said["step"], said["used"]) for said in line["advice"]] == [(2, True), (4, True)]
    assert line["advice"] == lines(tmp_path / "unbroken")[0]["advice"]
    assert line["layers"]["sparse"] > 0
    assert line["asking_steps"] > 1


def test_a_new_run_in_the_folder_of_an_old_one(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who deletes the checkpoint and changes a setting must get the new result."""
    run(monkeypatch, command("gpt", tmp_path, images))
    saved(tmp_path).unlink()
    run(monkeypatch, command("gpt", tmp_path, images, "--set", "lr=0.01"))
    assert [line["config"]["lr"] for line in lines(tmp_path)] == [3e-3, 0.01]


def stops(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Runs a recipe that must stop as if SIGTERM had asked for it."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, words)
    assert stopped.value.code == 128 + signal.SIGTERM


def measured_otherwise(*_: object) -> sdgp.Decision:
    raise AssertionError("a product was measured again")


def test_resume_keeps_the_layout_of_the_buffers(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming must restore channels_last buffers, since an unbroken run has them but a checkpoint is contiguous."""
    weight = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    weight.square().sum().backward()
    optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = buffer.contiguous()
    _match_layouts(optimizer)
    assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], buffer)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", *command("gpt", tmp_path, images, "--seeds", "2", "--set", "epoch_steps=100000")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_for(lambda: (Path(f"/proc/{process.pid}/status")).exists() and is_training(process.pid))
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number, said
    assert "go on with --resume" in said
    assert "seed 1" not in said
    assert checkpoint.load(saved(tmp_path)).training["step"] > 0


def is_training(process: int) -> bool:
    """Says whether the process has set its handlers: its mask of caught signals then has SIGTERM's bit."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    time.sleep(1)


def test_another_config_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, command("gpt", tmp_path, images))
    assert "go on with --resume, or choose another --out" in fails(monkeypatch, command("gpt", tmp_path, images))
    said = fails(monkeypatch, command("gpt", tmp_path, images, "--resume", "--set", "lr=0.5"))
    assert said.startswith("gpt: --resume: expected the config of ")
    assert said.endswith("got changes: lr: 0.003 -> 0.5")


def test_another_seed_plan_or_data_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan or data file with the old name and other contents must not continue a run."""
    plan, text = tmp_path / "plan.json", tmp_path / "text"
    plan.write_text('{"blocks.0.up": ["2:4", "mvue"]}')
    text.write_bytes(b"to be or not to be, " * 2000)
    words = command("gpt", tmp_path, images, "--data", str(text), "--set", f"plan={plan}", row="plain")
    run(monkeypatch, words)
    words.append("--resume")
    run(monkeypatch, words)
    (tmp_path / "gpt/plain/seed0").rename(tmp_path / "gpt/plain/seed1")
    said = fails(monkeypatch, [*words, "--seed", "1"])
    assert said.startswith("gpt: --resume: expected the seed of ")
    (tmp_path / "gpt/plain/seed1").rename(tmp_path / "gpt/plain/seed0")
    plan.write_text('{"blocks.1.up": ["2:4", "mvue"]}')
    assert fails(monkeypatch, words).startswith("gpt: --resume: expected the plan of ")
    plan.write_text('{"blocks.0.up": ["2:4", "mvue"]}')
    text.write_bytes(b"or not to be, to be " * 2000)
    assert fails(monkeypatch, words).startswith("gpt: --resume: expected the data of ")
    for wrong in ('["2:4"]', "{}"):
        plan.write_text(wrong)
        said = fails(monkeypatch, [*words[:-1], "--out", str(tmp_path / "other")])
        assert said.startswith("gpt: config: expected plan to name layers, got ")


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from recipes.common import checkpoint
from recipes.common.errors import UserError

path = Path(sys.argv[1])
checkpoint.save(path, {"weight": torch.arange(10.0)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the system refuses longer files, as a full disk would
try:
    checkpoint.save(path, {"weight": torch.zeros(10_000)}, {"step": 2})
except UserError as error:
    print(error)
"""


def test_a_failed_save_leaves_the_last(tmp_path: Path) -> None:
    """A failed save must keep the last checkpoint. A subprocess, so that pytest's own files escape the limit."""
    path = tmp_path / "checkpoint.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"checkpoint: could not be saved as {path}: ")
    assert done.stdout.endswith("; the previous checkpoint remains\n")
    weights, training = checkpoint.load(path)
    assert torch.equal(weights["weight"], torch.arange(10.0))
    assert training == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoint_holds_any_tree(tmp_path: Path) -> None:
    shared = torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last)
    training = {"a": [1, 2.5, None, "tensor", {"b": torch.tensor(3)}], "c": True}
    checkpoint.save(tmp_path / "x", {"one": shared, "two": shared}, training)
    weights, again = checkpoint.load(tmp_path / "x")
    assert torch.equal(weights["one"], shared)
    assert torch.equal(weights["two"], shared)
    assert flat(again["a"][4]) == {"b": 3}
    assert again["a"][:4] == training["a"][:4]
    assert again["c"] is True


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "other", "cut"])
def test_a_broken_checkpoint(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"weight": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(UserError, match="checkpoint: expected a whole safetensors file, got "):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("[" * 100_000, "expected a whole safetensors file, got .*recursion"),
        ('{"optimizer": "tensor training/7"}', "expected a whole safetensors file, got .*training/7"),
        ("[1]", "expected a checkpoint of a recipe, got .* with other metadata"),
    ],
    ids=["nested", "tensor", "list"],
)
def test_metadata_of_others(training: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"weight": torch.randn(10)}, path, {"training": training})
    with pytest.raises(UserError, match=message):
        checkpoint.load(path)


def test_a_foreign_checkpoint_is_not_resumed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, command("cifar10", tmp_path, images))
    save_file({"weight": torch.randn(10)}, saved(tmp_path))
    said = fails(monkeypatch, command("cifar10", tmp_path, images, "--resume"))
    assert re.search("--resume: expected a checkpoint of a recipe, got .* without config, curve", said), said


def test_nothing_is_pickled() -> None:
    """No recipe may read pickles. Only torchvision reads pickles, and it compares their hash first."""
    for file in RECIPES.rglob("*.py"):
        text = file.read_text()
        assert "torch.load" not in text, file
        assert "pickle.load" not in text, file
        assert "weights_only=False" not in text, file
