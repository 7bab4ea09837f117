# SPDX-License-Identifier: BSD-3-Clause
"""Draws what gpu.py stored: one picture beside the JSON.

python benchmarks/plot.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]


def plot_prune_nm(axes: Axes, rows: Rows) -> None:
    rows = [row for row in rows if row["dtype"] == "bfloat16" and row["tensor"].startswith("(rows")]
    for method in rows[0]["of_clone"] if rows else ():
        axes.plot([row["pattern"] for row in rows], [row["of_clone"][method] for row in rows], marker="o", label=method)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="prune_nm, bfloat16, last dimension", ylabel="share of clone()'s bandwidth", ylim=(0, None))


def plot_pack(axes: Axes, rows: Rows) -> None:
    for candidate in rows[0]["times_clone"] if rows else ():
        times = [row["times_clone"].get(candidate) for row in rows]
        axes.plot([row["pattern"] for row in rows], times, marker="o", label=candidate)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="prune and pack to 2:4, bfloat16", ylabel="time, in clones", ylim=(0, None))


def plot_data_gradient(axes: Axes, rows: Rows) -> None:
    labels = [f"{row['model']}, {row['tokens']}: {row['in']} → {row['out']}" for row in rows]
    for candidate in rows[0]["times_dense"] if rows else ():
        axes.plot([row["times_dense"][candidate] for row in rows], range(len(rows)), "o", label=candidate)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(title="data gradient, 2:4, bfloat16", xlabel="times as fast as dense")


def plot_train_step(axes: Axes, rows: Rows) -> None:
    for offset, backend in ((-0.2, "sparse"), (0.2, "auto")):
        heights = [100 * row["saved"][backend] for row in rows]
        axes.bar([i + offset for i in range(len(rows))], heights, 0.4, label=backend)
    axes.set_xticks(range(len(rows)), [row["model"] for row in rows])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title="training step, mvue 2:4", ylabel="% of the dense step saved")


PLOTS = {
    "prune_nm": plot_prune_nm,
    "pack": plot_pack,
    "data_gradient": plot_data_gradient,
    "train_step": plot_train_step,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    subjects = {subject: results[subject] for subject in PLOTS if subject in results}
    if not subjects:
        raise SystemExit(f"plot: expected results of gpu.py in {args.results}, got {', '.join(results) or 'none'}")
    figure, axes = plt.subplots(1, len(subjects), figsize=(7 * len(subjects), 6), squeeze=False, layout="constrained")
    for place, (subject, result) in zip(axes[0], subjects.items(), strict=True):
        PLOTS[subject](place, result["rows"])
        place.legend()
    figure.suptitle(f"sdgp on {next(iter(subjects.values()))['machine'].get('gpu', 'a CPU')}")
    path = args.results.with_suffix(".png")
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main()
