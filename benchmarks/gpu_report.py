# SPDX-License-Identifier: BSD-3-Clause
"""Builds, tests and measures sdgp on this machine's GPU with one command, from a bare checkout.

The program runs the parts below in this order, each in its own process. A part that fails, or runs out of time, does
not stop the next one, and what was measured is stored at once: benchmarks/results/NAME.json, NAME.md, NAME.png, and
NAME-gpt.jsonl for whole training runs. It needs torch with CUDA, nvcc, and the requirements of
`pip install --no-build-isolation .`; the part float8 needs torchao. All parts take about twenty minutes. --minutes
limits them; run the rest later:

    python benchmarks/gpu_report.py                                       # NAME: the GPU's name, as in nvidia-h200
    python benchmarks/gpu_report.py --parts gpt_plain gpt_pruned          # the training runs, if there was no time
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 10  # a part that has less time left is not started
# The largest share of the remaining time that a part may take.
PARTS = {
    "build": 1.0,  # for the architecture of this GPU alone
    "tests": 0.5,
    "sanitizer": 0.3,  # compute-sanitizer on some of the tests
    "pack": 0.2,
    "gradients": 0.4,
    "train_step": 0.7,
    "prune_nm": 0.5,
    "float8": 0.9,  # needs torchao
    "plot": 1.0,
    "gpt_plain": 0.5,  # whole runs of recipes/lm, which need four minutes each
    "gpt_pruned": 1.0,
}


def command(part: str, name: str, seconds: float) -> list[str]:
    """Returns the command of a part."""
    python = [sys.executable]
    if part == "build":
        architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
        defines = [f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}", "-Ccmake.define.SDGP_CUDA=ON"]
        return [*python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *defines, "."]
    if part == "tests":
        return [*python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if part == "sanitizer":
        return ["make", "cuda-sanitize", f"PYTHON={sys.executable}"]
    if part.startswith("gpt_"):
        return [*python, *gpt(part, name)]
    if part == "plot":
        return [*python, "benchmarks/plot.py", f"benchmarks/results/{name}.json"]
    return [*python, "benchmarks/gpu.py", "--subject", part, "--store", name, "--seconds", f"{0.9 * seconds:.0f}"]


def gpt(part: str, name: str) -> list[str]:
    """Returns the arguments that train a GPT plainly, or with an exact first quarter and then at 2:4.

    A part that is run again continues from its last checkpoint.
    """
    row = "plain" if part == "gpt_plain" else "mvue_2_4"
    pruning = [] if part == "gpt_plain" else ["--set", "backend=auto", "--set", "exact_first=1"]
    files = ["--resume", "--out", f"runs/{name}", "--results", f"benchmarks/results/{name}-gpt.jsonl"]
    return ["-m", "recipes.lm.gpt", f"recipes/pruning/{row}.toml", "recipes/lm/configs/wide.toml", *pruning, *files]


def missing(part: str) -> str | None:
    """Returns the tool that a part needs and that is not on PATH."""
    tools = {"build": "nvcc", "sanitizer": "compute-sanitizer"}
    return tools[part] if part in tools and shutil.which(tools[part]) is None else None


def run(part: str, words: list[str], seconds: float) -> bool:
    """Runs a part in the checkout, and prints how long it took and how it ended."""
    print(f"--- {part}: {' '.join(words)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "REQUIRE_CUDA": "1"}
    ended = None
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            ended = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            pass
        finally:  # ends what the part has started, too: it would slow down the next part
            for number, grace in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):  # a recipe saves on SIGTERM
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(grace)
    outcome = "ok" if ended == 0 else "out of time" if ended is None else f"failed with {ended}"
    print(f"--- {part}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    return ended == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the results' files")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu_report: expected a GPU, got torch {torch.__version__} that finds none")
    name = args.name or re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    end = time.monotonic() + 60 * args.minutes
    failed = []
    for part in (part for part in PARTS if part in args.parts):
        if (tool := missing(part)) is not None:
            print(f"--- {part}: left out, needs {tool}", flush=True)
            failed += ["build"] if part == "build" else []
            continue
        seconds = (end - time.monotonic()) * PARTS[part]
        if seconds < LEAST_SECONDS:
            print(f"--- {part}: left out, no time left", flush=True)
            continue
        if not run(part, command(part, name, seconds), seconds):
            failed.append(part)
        if "build" in failed:
            break
    raise SystemExit(f"gpu_report: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
