# SPDX-License-Identifier: BSD-3-Clause
"""Builds, tests and measures sdgp on this machine's GPU with one command, from a bare checkout.

The program builds sdgp for the architecture of this GPU, runs the GPU tests, measures (gpu.py), and writes
benchmarks/results/NAME.json, NAME.md and NAME.png. It needs torch with CUDA, nvcc, and the requirements of
`pip install --no-build-isolation .`. It takes less than nine minutes. It reports what it skips for lack of time.

    python benchmarks/gpu_report.py                  # NAME: the GPU's name, as in nvidia-h100-80gb-hbm3
    python benchmarks/gpu_report.py --minutes 5 --skip-tests
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESERVE = 20  # seconds for the table and the plot


def run(name: str, command: list[str], seconds: float, **environment: str) -> bool:
    """Runs a command in the checkout, and prints how long it took and how it ended."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=max(1, seconds), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        ended = -1
    outcome = "ok" if ended == 0 else "out of time" if ended == -1 else f"failed with {ended}"
    print(f"--- {name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    return ended == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the results' files")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--skip-build", action="store_true", help="sdgp is installed, with CUDA")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu_report: expected a GPU, got torch {torch.__version__} that finds none")
    name = args.name or re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    end = time.monotonic() + 60 * args.minutes
    python = [sys.executable]
    built = True
    if not args.skip_build:
        architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
        defines = [f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}", "-Ccmake.define.SDGP_CUDA=ON"]
        install = [*python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *defines, "."]
        built = run("build", install, end - time.monotonic())
    if not built:
        raise SystemExit(1)
    tested = args.skip_tests or run(
        "tests",
        [*python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_cuda.py"],
        (end - time.monotonic()) * 0.6,
        REQUIRE_CUDA="1",
    )
    left = end - time.monotonic() - RESERVE
    measured = run(
        "measure", [*python, "benchmarks/gpu.py", "--store", name, "--seconds", f"{left:.0f}"], left + RESERVE
    )
    drawn = run("plot", [*python, "benchmarks/plot.py", f"benchmarks/results/{name}.json"], RESERVE)
    raise SystemExit(0 if tested and measured and drawn else 1)


if __name__ == "__main__":
    main()
