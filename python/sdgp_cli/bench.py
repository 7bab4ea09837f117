# SPDX-License-Identifier: BSD-3-Clause
"""``sdgp bench``: writes a report on this machine and a picture of it."""

from __future__ import annotations

import argparse
import importlib.util
import mimetypes
import os
from pathlib import Path

import torch

from sdgp._machine import environment
from sdgp._models import format_table

from . import CommandError, Report, measurements, to_json
from .measurements import METHOD, SECONDS, Row
from .options import begin, parse_dtype
from .plot import draw
from .progress import progress

_PICTURES = (".pdf", ".png", ".svg")


def run(args: argparse.Namespace) -> Report:
    device = begin(args.device, args.threads)
    dtype = parse_dtype(None, device)
    _check(args.out)
    tasks = list(measurements.tasks(measurements.QUICK if args.quick else measurements.FULL, device, dtype))
    rows: dict[str, list[Row]] = {subject: [] for subject in SECONDS}
    with progress(len(tasks)) as begin_task:
        for subject, name, measure_rows in tasks:
            begin_task(name)
            rows[subject] += measure_rows()
    report: Report = {
        "machine": environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "quick": args.quick,
        **rows,
    }
    return report | _write(report, args.out)


def show(report: Report) -> str:
    methods = report["prune_nm"][0]["times_clone"]
    lines = [
        *_heading(report),
        "",
        "prune_nm: time in clone()s of the same tensor",
        *format_table(("tensor", "pattern", "clone ms", *methods), map(_pruning_cells, report["prune_nm"])),
        "",
        f"data gradient, {METHOD}: the sparse product, pruning included, compared with the exact one",
        *format_table(
            ("layer", "pattern", "exact ms", "sparse ms", "times as fast"), map(_product_cells, report["data_gradient"])
        ),
        "",
        f'training step (forward, backward, SGD), {METHOD}, backend="auto", compared with the plain model',
        *format_table(
            (
                "model",
                "pattern",
                "plain ms",
                "auto ms",
                "saved",
                "plain again",
                "plain in bfloat16",
                "sparse layers",
            ),
            map(_step_cells, report["train_step"]),
        ),
    ]
    if report.get("files"):
        lines += ["", f"Written: {', '.join(report['files'])}"]
    if "plot" in report and report["plot"] is None:
        lines += ["", "No plot: it needs matplotlib (pip install 'sdgp[plot]')"]
    return "\n".join(lines)


def _pruning_cells(row: Row) -> tuple[str, ...]:
    times = (f"{time:.2f}" for time in row["times_clone"].values())
    return row["tensor"], row["pattern"], f"{row['clone_ms']:.2f}", *times


def _product_cells(row: Row) -> tuple[str, ...]:
    if row["obstacle"] is not None:
        return row["layer"], row["pattern"], "", "", f"none: needs {row['obstacle']}"
    numbers = f"{row['exact_ms']:.2f}", f"{row['sparse_ms']:.2f}", f"{row['times_exact']:.2f}"
    return row["layer"], row["pattern"], *numbers


def _step_cells(row: Row) -> tuple[str, ...]:
    times = (f"{row[key]:.1f}" for key in ("plain_ms", "converted_ms"))
    shares = (f"{row[key]:+.1%}" for key in ("saved", "plain_again_saved", "bfloat16_saved"))
    return row["model"], row["pattern"], *times, *shares, f"{row['layers_sparse']} of {row['layers']}"


def _heading(report: Report) -> list[str]:
    machine = report["machine"]
    where = machine["cpu"] if report["device"] == "cpu" else report["device"]
    return [
        f"sdgp {machine['sdgp']} on {where}, {report['dtype']}{', quick: few rounds' if report['quick'] else ''}",
        f"{machine['isa']} kernels, threads: {machine['threads']}, torch {machine['torch']}, {machine['date']}",
    ]


# The output is a picture, or a folder with a picture, text and JSON.


def _is_picture(out: Path) -> bool:
    return out.suffix.lower() in _PICTURES and not out.is_dir()


def _check(out: Path) -> None:
    """Raises CommandError if the output cannot be written. This runs before the measurement, which takes minutes."""
    if mimetypes.guess_type(out.name)[0] and not out.is_dir() and not _is_picture(out):  # a file of an unsupported type
        raise CommandError(f"expected --out to be a folder or a {', '.join(_PICTURES)} file, got {str(out)!r}")
    folder = out.parent if _is_picture(out) else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"expected --out to be in a folder that can be made, got {error}") from error
    if not os.access(folder, os.W_OK):
        raise CommandError(f"expected --out to be in a folder that can be written, got {str(folder)!r}")


def _write(report: Report, out: Path) -> Report:
    """Writes the files, and returns the path of the plot (None without matplotlib) and of all files."""
    picture = out if _is_picture(out) else out / "sdgp-bench.png"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if has_matplotlib:
        draw(report, "\n".join(_heading(report)), picture)
    files = [picture] if has_matplotlib else []
    if not _is_picture(out):
        text, data = (picture.with_suffix(suffix) for suffix in (".txt", ".json"))
        text.write_text(show(report) + "\n", encoding="utf-8")
        data.write_text(to_json(report) + "\n", encoding="utf-8")
        files += [text, data]
    return {"plot": str(picture) if has_matplotlib else None, "files": [str(file) for file in files]}
