# SPDX-License-Identifier: BSD-3-Clause
"""Tests `sdgp profile`: the user's models and models of libraries, batches, the report, and the errors."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, report

import sdgp

MODELS = """
import torch
from torch import nn

print("a chatty module")


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
        self(torch.randn(1, 3, 8, 8))

    def forward(self, x):
        print("a chatty model")
        return super().forward(x)


class Text(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def with_batch():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"input": torch.randn(5, 8)}


def fails():
    raise KeyError("weights")


def exits():
    raise SystemExit("no data")


instance = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
no_layer = nn.ReLU


def on_meta():
    return nn.Linear(8, 8, device="meta")


number = 3


def a_string():
    return "a string"


def with_argument(width):
    return nn.Linear(width, width)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


@pytest.mark.parametrize(
    ("model", "options", "described", "layers"),
    [
        ("models.py:Net", "--batch 2 --image 8", "2x3x8x8 float32", {"2": "(2, 8, 4, 4)", "4": "(2, 4)"}),
        ("models.py:Net", "--input 3x3x8x8 --channels-last", "3x3x8x8 float32", {"2": "(3, 8, 4, 4)", "4": "(3, 4)"}),
        ("models.py:Net", "--image 8 --dtype bfloat16", "8x3x8x8 bfloat16", {"2": "(8, 8, 4, 4)", "4": "(8, 4)"}),
        ("models:Text", "--tokens 6", "8x6 int64", {"1": "(8, 6, 8)"}),
        ("models:with_batch", "", "input 5x8 float32", {"1": "(5, 8)"}),
        ("models.py:with_batch", "--dtype float64", "input 5x8 float64", {"1": "(5, 8)"}),
        ("models:instance", "--input 2x8 --threads 1", "2x8 float32", {"1": "(2, 8)"}),
    ],
)
def test_profile(
    model: str, options: str, described: str, layers: dict[str, str], file: Path, command: Command
) -> None:
    sys.modules.pop("models", None)
    status, out, err = command("profile", model, *options.split(), *["--rounds", "2", "--backend", "sparse", "--json"])
    assert status == 0
    assert "a chatty module\n" in err
    found = json.loads(out)
    assert (found["input"], found["device"], found["method"], found["pattern"]) == (described, "cpu", "mvue", "2:4")
    shapes = {row["layer"]: row["shape"] for row in found["layers"]}
    assert shapes.items() >= layers.items()
    for row in found["layers"]:
        assert row["exact_ms"] > 0
        assert row["sparse_ms"] > 0
        assert row["product"] == "sparse"
    assert found["saved"] == pytest.approx(1 - found["converted_ms"] / found["exact_ms"])
    assert len(found["plain"]) == (model == "models:Text")  # three outputs, fewer than m
    assert found["machine"]["threads"] == torch.get_num_threads()


def test_profile_in_text(file: Path, command: Command) -> None:
    options = "--tokens 4 --rounds 2 --pattern 1:4 --method magnitude --backend pruned --threads 1"
    status, out, _ = command("profile", "models.py:Text", *options.split())
    assert status == 0
    first, machine, empty, head, _, *rows, step, left = out.splitlines()
    assert first == (
        "models.py:Text, 8x4 int64, cpu; magnitude 1:4, backend pruned; forward and backward, shortest of 2 rounds"
    )
    assert f"threads: 1, torch {torch.__version__}, sdgp {sdgp.__version__}" in machine
    assert empty == ""
    assert head.startswith("layer")
    assert [row.split()[0] for row in rows] == ["1"]
    assert re.fullmatch(r"step: exact [\d.]+ ms, as converted [\d.]+ ms, -?[\d.]+% saved", step)
    assert left == "1 left plain: 3 output channels per group, fewer than m = 4"


def test_advice(command: Command, file: Path) -> None:
    words = ("profile", str(file) + ":Net", "--image", "8", "--rounds", "1", "--advise")
    found = report(command, *words)
    assert (found["pays"], found["plan"], found["saved"]) == (False, {}, 0)
    assert found["verdict"] == "nothing pays here: every layer is too small at this batch size"
    assert {row["gradient"] for row in found["candidates"]} == {"weight"}  # eight channels are too few for 16
    status, out, err = command(*words)
    assert status == 0
    assert out.splitlines()[0].endswith(":Net, 8x3x8x8 float32, cpu")
    assert out.splitlines()[1] == "weights and data are random, and trained models bear pruning better"
    assert out.splitlines()[-1] == found["verdict"]
    assert next(line for line in err.splitlines() if line.startswith("[")) == "[1/5] steps"
    own = report(command, "profile", str(file) + ":with_batch", "--rounds", "1", "--advise")
    assert "one batch gives the noise only" in own["advice"]
    assert {row["method"] for row in found["candidates"]} == {"mvue", "unstructured"}
    status, _, err = command(*words, "--method", "best")
    assert (status, "expected method to be one of" in err) == (2, True)
    status, _, err = command(*words, "--pattern", "4:32", "--backend", "sparse", "--weight-grad", "4:16")
    assert status == 2
    assert err == "sdgp profile: expected --advise to choose by itself, got --pattern, --backend, --weight-grad too\n"


def test_pruned_weight_gradients(command: Command, file: Path) -> None:
    """The step must prune weight gradients, and the rows must still be data gradients."""
    words = ("profile", str(file) + ":instance", "--input", "16x8", "--rounds", "1", "--weight-grad", "4:16")
    found = report(command, *words)
    assert found["weight_grad"] == "4:16"
    assert [row["layer"] for row in found["layers"]] == ["1"]
    status, out, _ = command(*words)
    assert status == 0
    assert "; mvue 2:4, weight gradients 4:16, backend auto;" in out
    status, _, err = command(*words[:-1], "16:4")
    assert (status, "expected weight_grad to be a pattern" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("no.py:Net", "expected a file, got 'no.py'"),
        ("no_such:Net", "expected torchvision, timm, a module or a file before the colon, got 'no_such'"),
        ("models.no:Net", "expected torchvision, timm, a module or a file before the colon, got 'models.no'"),
        ("models.py:Nets", "expected a function or class of models.py, got 'Nets'; did you mean Net*?"),
        ("models.py:", "expected a function or class of models.py, got ''"),
        ("models.py:number", "expected a function or class of models.py, got 'number', a int"),
        ("models.py:a_string", "expected models.py:a_string to return an nn.Module or (nn.Module, batch), got str"),
        ("models.py:fails", "expected models.py:fails to return a model, got KeyError: 'weights' (*models.py:*)"),
        ("models.py:exits", "expected models.py:exits to return a model, got SystemExit: no data (*models.py:*)"),
        ("models.py:with_argument", "expected * to return a model, got TypeError: with_argument() missing 1 *"),
        ("models.py:Net --batch 2 --input 2x3x8x8", "expected --input to name the whole shape, got --batch 2 too"),
        ("models.py:Net --tokens 3", "expected a model with an nn.Embedding for --tokens, got one without"),
        (
            "models.py:with_batch --batch 2",
            "expected the batch that models.py:with_batch returns to be all, got --batch too",
        ),
        ("models.py:Net --pattern 5:4", "expected \"n:m\" or (n, m) with 1 <= n <= m <= 64, got '5:4'"),
        ("models.py:Net --method best", "expected method to be one of magnitude, *, got 'best'"),
        ("models.py:Net --backend best", "expected backend to be one of auto, *, got 'best'"),
        ("models.py:no_layer", "expected a model with a layer that prunes, got none"),
        ("models.py:on_meta --input 2x8", "expected model and batch to fit on cpu, got NotImplementedError: *"),
        ("models.py:Net --input 99999999x9999999", "expected model and batch to fit on cpu, got RuntimeError: *"),
        (
            "models.py:instance",
            "expected the model to run forward and backward on 8x3x224x224 float32 (--batch, *), got *",
        ),
    ],
)
def test_profile_errors(arguments: str, message: str, file: Path, command: Command) -> None:
    status, out, err = command("profile", *arguments.split())
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert re.fullmatch("sdgp profile: " + re.escape(message).replace(r"\*", ".*"), last)
    assert "Traceback" not in err


def test_a_file_that_does_not_import(tmp_path: Path, command: Command) -> None:
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    status, _, err = command("profile", "broken.py:build")
    assert status == 2
    assert re.fullmatch(
        r"sdgp profile: expected broken.py to import, got ZeroDivisionError: division by zero \(.*broken.py:2\)\n", err
    )


def test_a_file_imports_its_neighbors(tmp_path: Path, command: Command) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "neighbor.py").write_text("width = 8")
    # The file has the name of a library. The library must stay importable.
    (tmp_path / "code" / "json.py").write_text(
        "import neighbor\nfrom torch import nn\n"
        "def build(): return nn.Sequential(nn.Linear(neighbor.width, 8), nn.Linear(8, 8))"
    )
    assert report(command, *["profile", "code/json.py:build", "--input", "4x8", "--rounds", "1"])["layers"]
    assert sys.modules["json"] is json


def test_a_path_with_a_colon_and_capitals(file: Path, command: Command) -> None:
    file.rename("a:b.PY")
    assert report(command, *["profile", "a:b.PY:with_batch", "--rounds", "1"])["layers"]


def no_network(*_: object, **__: object) -> Any:
    raise AssertionError("expected no network")


@pytest.mark.parametrize(
    ("name", "library", "input"),
    [
        ("squeezenet1_1", "torchvision", "1x3x32x32"),
        ("torchvision:lraspp_mobilenet_v3_large", "torchvision", "2x3x32x32"),  # its backbone has weights by default
        ("timm:test_vit.r160_in1k", "timm", "1x3x160x160"),
    ],
)
def test_models_of_libraries(
    name: str, library: str, input: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    shape = () if library == "timm" else ("--input", input)  # timm's models know their input size
    options = () if shape else ("--batch", "1")
    found = report(command, "profile", name, *shape, *options, "--rounds", "1")
    assert found["input"] == f"{input} float32"
    assert found["exact_ms"] > 0
    assert len(found["layers"]) > 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet19",
            r"expected a model that torchvision( or timm)? knows, or path.*, got 'resnet19'; did you mean resnet.*",
        ),
        (
            "torchvision:rsnet18",
            r"expected a model that torchvision knows, .*, got 'rsnet18'; did you mean resnet18, .*",
        ),
        ("timm:hf-hub:timm/resnet18", r"expected a model that timm knows, .*, got 'hf-hub:timm/resnet18'.*"),
    ],
)
def test_unknown_names(name: str, message: str, command: Command) -> None:
    pytest.importorskip("timm" if name.startswith("timm") else "torchvision")
    status, _, err = command("profile", name)
    assert status == 2
    assert re.fullmatch(f"sdgp profile: {message}\n", err)


@pytest.mark.parametrize(("name", "libraries"), [("resnet18", "torchvision or timm"), ("timm:resnet18", "timm")])
def test_a_name_without_libraries(name: str, libraries: str, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = f"sdgp profile: expected {libraries} to be installed for a model's name, got none: pip install it\n"
    assert command("profile", name) == (2, "", message)


def test_a_library_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    status, out, err = command("profile", "resnet18")
    assert (status, out) == (2, "")
    message = "expected torchvision to import, got RuntimeError: operator torchvision::nms does not exist"
    assert re.fullmatch(rf"sdgp profile: {message} \(.*torchvision\.py:1\)\n", err)
