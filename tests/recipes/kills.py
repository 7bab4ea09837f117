# SPDX-License-Identifier: BSD-3-Clause
"""Kills a recipe, for what test_faults.py asserts: `kills.py POINTS FOLDER COMMAND...` prints a JSON line per point.

A run is a child of this process, which has imported everything, and dies by SIGKILL inside the call of a function of
the recipes' own that the point stands for: points are spread evenly over all of those calls. Then the run is resumed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from recipes.common import checkpoint

RECIPES = str(Path(checkpoint.__file__).parents[1])


class Calls:
    """Counts the calls of the recipes' functions, and kills this process in the ``last`` one."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(RECIPES):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(words: list[str], last: int | None = None, tell: Callable[[int], object] = lambda _: None) -> int:
    """The status of a run, as os.waitpid has it; ``tell`` gets the number of calls."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = Calls(last)
    sys.argv = words
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.setprofile(calls)
    importlib.import_module(words[0]).main()
    sys.setprofile(None)
    tell(calls.count)
    os._exit(0)


def outcome(out: Path) -> dict[str, object]:
    """What a finished run left."""
    (path,) = out.glob("*/*/seed0/checkpoint.safetensors")
    weights, training = checkpoint.load(path)
    (results,) = out.glob("*.jsonl")
    left_over = [file.name for file in out.rglob("*.tmp")]
    return {
        "weights": {name: tensor.double().sum().item().hex() for name, tensor in weights.items()},
        "step": training["step"],
        "lines": [json.loads(line)["row"] for line in results.read_text().splitlines()],
        "epochs": [json.loads(line)["epoch"] for line in (path.parent / "metrics.jsonl").read_text().splitlines()],
        "left over": left_over,
    }


def main() -> None:
    points, folder, words = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)  # threads do not survive a fork
    importlib.import_module(words[0])

    def run(name: str, *more: str, last: int | None = None) -> int:
        return in_child([*words, "--out", str(folder / name), *more], last, lambda count: calls.write_text(str(count)))

    calls = folder / "calls"
    assert run("unbroken") == 0
    total = int(calls.read_text())
    print(json.dumps(outcome(folder / "unbroken")))
    for point in range(points):
        name, last = f"point{point}", total * (2 * point + 1) // (2 * points)
        status = run(name, last=last)
        saved = list((folder / name).glob("*/*/seed0/checkpoint.safetensors"))
        step = checkpoint.load(saved[0]).training["step"] if saved else 0  # whole, whenever there is one
        resumed = run(name, "--resume")
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, "saved": step, "resumed": resumed, "left": outcome(folder / name)}))


if __name__ == "__main__":
    main()
