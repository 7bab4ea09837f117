# SPDX-License-Identifier: BSD-3-Clause
"""The text of gpu_report.py: a line for each row that gpu.py measures, and the Markdown file with all of them."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench import RESULTS, Row


def prune_nm(row: Row) -> str:
    shares = "  ".join(f"{name} {share:4.0%}" for name, share in row["of_clone"].items())
    head = f"prune_nm | {row['tensor']:21s} {row['dtype']:8s} | {row['pattern']:>5s}"
    return f"{head} | clone {row['gb_per_s']['clone']:5d} GB/s | {shares}"


def pack(row: Row) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_clone"].items())
    head = f"pack     | {row['pattern']:>5s} | clone {row['clone_ms']:.3f} ms"
    return f"{head} | {ratios} (bound {row['times_clone_at_the_bound']}x)"


def gradients(row: Row) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_exact"].items())
    head = f"gradient | {row['model']:13s} {row['tokens']:6d} x {row['in']:5d} -> {row['out']:5d}"
    exact = f"exact {row['exact_ms']:8.3f} ms {row['exact_tflop_per_s']:4d} TFLOP/s"
    weights = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["weight_times_exact"].items())
    return f"{head} | {exact} | {ratios} (bound {row['times_exact_at_the_bound']:.2f}x) | weight: {weights}"


def float8(row: Row) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_exact"].items())
    head = f"float8   | {row['model']:13s} {row['tokens']:6d} x {row['in']:5d} -> {row['out']:5d}"
    return f"{head} | exact {row['exact_ms']:8.3f} ms | {ratios}"


def train_step(row: Row) -> str:
    saved = "  ".join(f"{key} {share:+.1%}" for key, share in row["saved"].items())
    peaks = "  ".join(f"{key} {mib}" for key, mib in row["peak_mib_above_start"].items())
    head = f"step     | {row['model']:15s} | plain {row['plain_ms']:8.2f} ms | saved: {saved}"
    return f"{head} | auto sparse in {row['layers_sparse']} of {row['layers']} | peak MiB: {peaks}"


LINES: dict[str, Callable[[Row], str]] = {
    "prune_nm": prune_nm,
    "pack": pack,
    "gradients": gradients,
    "float8": float8,
    "train_step": train_step,
}


def write_markdown(name: str) -> None:
    """Writes all stored results, also those of earlier calls, as NAME.md."""
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    parts = [f"# sdgp on {next(iter(stored.values()))['machine']['gpu']}\n"]
    for subject, result in stored.items():
        where = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        lines = "\n".join(LINES[subject](row) for row in result["rows"])
        parts.append(f"\n## {subject}\n\n{where}\n\n```\n{lines}\n```\n")
    (RESULTS / f"{name}.md").write_text("".join(parts), encoding="utf-8")
