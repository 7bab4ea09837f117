# SPDX-License-Identifier: BSD-3-Clause
"""The command line: its arguments, and the code that all commands share.

This package is separate from sdgp and imports it only when a command runs. So help, version and ``sdgp doctor`` work
even if ``import sdgp`` fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

Report = dict[str, Any]

_EXAMPLES = """examples:
  sdgp doctor                                  is this installation sound, and what can this machine run?
  sdgp bench --out results                     a report of some two minutes, with a plot
  sdgp profile resnet18 --batch 32             what would conversion save here?
  sdgp profile timm:vit_tiny_patch16_224 --pattern 4:32 --json
  sdgp profile train.py:build --tokens 128     a function or class of your own
  sdgp profile train.py:build --advise         does pruning pay for it?
"""

_DOCTOR = "what is installed, loaded and usable; a self-test of each op; exit status 1 where something is wrong"
_BENCH = "pruning, sparse products and training steps compared with plain ones on this machine, with a plot"
_PROFILE = "what converting a model would save on this machine"

_MODELS = """MODEL is
  a name that torchvision or timm knows        resnet18, torchvision:vgg11, timm:vit_tiny_patch16_224
  a function or class of a module or file      package.module:build, path/to/file.py:Net
which is called without arguments and returns an nn.Module or (nn.Module, batch). That module or file is imported, and
so runs; weights are random, and nothing is downloaded.

examples:
  sdgp profile resnet18 --batch 32 --channels-last
  sdgp profile timm:vit_tiny_patch16_224 --pattern 4:32 --method magnitude --json
  sdgp profile train.py:build --tokens 128     token ids below the size of its largest embedding
  sdgp profile train.py:Net --input 8x64       floats of that shape
"""


class CommandError(Exception):
    """An error that the caller can fix. The message reads ``requirement, got actual``."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n({self.prog} --help tells more)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a model may print, but only the report may go to stdout
            args.broken = _why_broken()
            if args.broken is not None and args.command != "doctor":
                print(f"sdgp {args.command}: {args.broken} (sdgp doctor tells more)", file=sys.stderr)
                return 1
            command = importlib.import_module(f".{args.command}", __name__)
            report = command.run(args)
    except CommandError as error:
        print(f"sdgp {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    text = to_json(report) if args.json else command.show(report)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # for example by `| head`; the flush at Python's exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.get("ok", True) else 1


def to_json(report: Report) -> str:
    return json.dumps(_without_nan(report), indent=2, allow_nan=False)


def _why_broken() -> str | None:
    """Returns in one line why ``import sdgp`` fails, or None if it works."""
    try:
        importlib.import_module("sdgp")
    except Exception as error:  # a broken torch can raise any exception
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _parser() -> argparse.ArgumentParser:
    layout: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser("sdgp", description="N:M sparse data gradients for PyTorch.", epilog=_EXAMPLES, **layout)
    parser.add_argument("--version", action="version", version=f"sdgp {installed_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description, epilog, add_options in (
        ("doctor", _DOCTOR, None, None),
        ("bench", _BENCH, None, _add_bench),
        ("profile", _PROFILE, _MODELS, _add_profile),
    ):
        command = commands.add_parser(name, help=description, description=description, epilog=epilog, **layout)
        command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        if add_options is not None:
            add_options(command)
    return parser


def installed_version() -> str:
    try:
        return importlib.metadata.version("sdgp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown: no metadata, not installed by pip"


def _add_bench(command: argparse.ArgumentParser) -> None:
    _add_device(command)
    command.add_argument("--quick", action="store_true", help="fewer shapes and rounds: half a minute, and noisier")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("sdgp-bench.png"),
        metavar="PATH",
        help="the plot's file, or a folder for plot, text and JSON (default: %(default)s)",
    )


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--pattern", metavar="N:M", help="default: 2:4")
    command.add_argument("--method", help="the pruning method (default: mvue; with --advise all unbiased ones)")
    command.add_argument(
        "--weight-grad", metavar="N:M", help="prune the gradient of weight gradients, too, by mvue (default: exact)"
    )
    command.add_argument("--backend", help="auto, pruned, sparse or dense (default: auto)")
    command.add_argument("--batch", type=count, metavar="N", help="samples (default: 8)")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--image", type=count, metavar="SIZE", help="images of 3 x SIZE x SIZE (default: the model's)")
    shape.add_argument("--tokens", type=count, metavar="LENGTH", help="token ids, N x LENGTH")
    shape.add_argument("--input", type=_shape, metavar="8x3x224x224", help="floats of this shape")
    command.add_argument("--dtype", help="the dtype of model and input (default: float32; on a GPU bfloat16)")
    command.add_argument("--channels-last", action="store_true", help="the memory format of model and input")
    command.add_argument("--rounds", type=count, default=10, help="timing rounds; the shortest time counts")
    command.add_argument(
        "--advise",
        action="store_true",
        help="say whether pruning pays, and what to prune: sdgp.advise; it chooses the patterns by itself",
    )
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    command.add_argument("--threads", type=count, help="the number of CPU threads (default: torch's)")


def count(text: str) -> int:
    """The argparse type of a number from 1 on, of at most nine digits."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", text) or 0 in (shape := tuple(map(int, text.split("x")))):
        raise argparse.ArgumentTypeError(f"expected sizes from 1 on, such as 8x3x224x224, got {text!r}")
    return shape


def _without_nan(value: Any) -> Any:
    """Replaces NaN and infinity by None, because JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
