# SPDX-License-Identifier: BSD-3-Clause
"""Kills a recipe for test_faults.py: `kills.py KIND POINTS FOLDER COMMAND...` prints one line of JSON for each point.

Each run is a child of this process, which has already imported everything. SIGKILL ends the run, and a second run
resumes it. KIND says where the run dies. ``calls``: inside a call of a function of the recipes; the points are spread
evenly over all calls. ``writes``: halfway through an operation on a file; every operation is a point. ``clock``: at any
time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from recipes.common import checkpoint

RECIPES = str(Path(checkpoint.__file__).parents[1])


class Deaths:
    """Counts the chances to die of one kind, and kills the process at chance number ``last``."""

    def __init__(self, kind: str, last: int | None = None) -> None:
        self.count, self.last = 0, last
        if kind == "calls":
            sys.setprofile(self._call)
        if kind == "writes":
            self._half(
                checkpoint, "save_file", lambda save, tensors, path, *rest: _cut(save(tensors, path, *rest), path)
            )
            self._half(Path, "write_text", lambda write, path, text: write(path, text[: len(text) // 2]))
            self._half(os, "write", lambda write, file, text: write(file, text[: len(text) // 2]))
            self._half(Path, "replace", lambda *_: None)
            self._half(os, "fsync", lambda *_: None)

    def chance(self, before: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def _call(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(RECIPES):
            self.chance()

    def _half(self, owner: Any, name: str, half: Callable[..., object]) -> None:
        whole = getattr(owner, name)

        def replaced(*arguments: Any, **options: Any) -> object:
            self.chance(lambda: half(whole, *arguments))
            return whole(*arguments, **options)

        setattr(owner, name, replaced)


def _cut(_: object, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def in_child(words: list[str], kind: str, last: int | None, tell: Callable[[int], object]) -> int:
    """Runs a recipe in a child process and returns its status as os.waitpid does.

    ``tell`` gets the number of chances. ``clock`` kills the child after ``last`` milliseconds.
    """
    child = os.fork()
    if child:
        if kind == "clock" and last is not None:
            time.sleep(last / 1e3)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    sys.argv = words
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    start, deaths = time.perf_counter(), Deaths(kind, last)
    importlib.import_module(words[0]).main()
    sys.setprofile(None)
    tell(round(1e3 * (time.perf_counter() - start)) if kind == "clock" else deaths.count)
    os._exit(0)


def broken(out: Path) -> list[str]:
    """Lists the files of a killed run that cannot be read. Unfinished files are named .tmp and do not count."""
    result = []
    for file in out.rglob("*"):
        try:
            if file.suffix == ".safetensors":
                checkpoint.load(file)
            elif file.suffix in (".json", ".jsonl"):
                assert [json.loads(line) for line in file.read_text().splitlines()]
            else:
                assert file.is_dir() or file.suffix == ".tmp" or file.name == ".tmp"
        except Exception as error:
            result.append(f"{file.name}: {error}")
    return result


def outcome(out: Path) -> dict[str, object]:
    """Returns the results that a finished run left."""
    (path,) = out.glob("*/*/seed0/checkpoint.safetensors")
    weights, training = checkpoint.load(path)
    (results,) = out.glob("*.jsonl")
    kept = (path.parent / "result.json").read_text()
    return {
        "weights": {name: digest(tensor) for name, tensor in weights.items()},
        "optimizer": digest(training["optimizer"]),
        "step": training["step"],
        "lines": [json.loads(line)["row"] for line in results.read_text().splitlines()],
        "kept": kept == results.read_text(),
        "epochs": [json.loads(line)["epoch"] for line in (path.parent / "metrics.jsonl").read_text().splitlines()],
        "left over": [file.name for file in out.rglob("*.tmp")],
    }


def digest(tree: Any) -> str:
    """Returns a hash of every bit of a tree of tensors."""
    if isinstance(tree, Tensor):
        return hashlib.sha256(tree.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if isinstance(tree, dict):
        return hashlib.sha256(repr([(key, digest(tree[key])) for key in sorted(tree)]).encode()).hexdigest()[:16]
    return repr([digest(each) for each in tree]) if isinstance(tree, list) else repr(tree)


def main() -> None:
    kind, points, folder, words = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)  # threads do not survive a fork
    importlib.import_module("torch._dynamo")  # optimizers import it late, and then each child would import it
    importlib.import_module(words[0])

    def run(name: str, *more: str, kind: str = "", last: int | None = None) -> int:
        command = [*words, "--out", str(folder / name), *more]
        return in_child(command, kind, last, lambda count: chances.write_text(str(count)))

    chances = folder / "chances"
    assert run("unbroken", kind=kind) == 0
    total = int(chances.read_text())
    points = total if kind == "writes" else points
    print(json.dumps(outcome(folder / "unbroken")))
    for point in range(points):
        name, last = f"point{point}", max(total * (2 * point + 1) // (2 * points), 1)
        if kind == "writes":
            last = point + 1
        status = run(name, kind=kind, last=last)
        left = broken(folder / name)
        saved = list((folder / name).glob("*/*/seed0/checkpoint.safetensors"))
        step = checkpoint.load(saved[0]).training["step"] if saved else 0
        resumed = run(name, "--resume")
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        result = {"killed": killed, "broken": left, "saved": step, "resumed": resumed, "left": outcome(folder / name)}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
