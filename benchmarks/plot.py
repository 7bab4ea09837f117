# SPDX-License-Identifier: BSD-3-Clause
"""Draws stored benchmark results as one picture next to the JSON file. Each build of the documentation does the same.

python benchmarks/plot.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows: TypeAlias = list[dict[str, Any]]
Results: TypeAlias = dict[str, dict[str, Any]]


def plot_prune_nm(axes: Axes, rows: Rows) -> None:
    rows = [row for row in rows if row["dtype"] == "bfloat16" and row["tensor"].startswith("(rows")]
    _plot_over_patterns(axes, rows, "of_clone")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="prune_nm, bfloat16, last dimension", ylabel="share of clone()'s bandwidth", ylim=(0, None))


def plot_pack(axes: Axes, rows: Rows) -> None:
    _plot_over_patterns(axes, rows, "times_clone")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="prune and pack to 2:4, bfloat16", ylabel="time, in clones", ylim=(0, None))


def plot_gradients(axes: Axes, rows: Rows) -> None:
    labels = [f"{row['model']}, {row['tokens']}: {row['in']} → {row['out']}" for row in rows]
    for candidate in rows[0]["times_exact"] if rows else ():
        axes.plot([row["times_exact"][candidate] for row in rows], range(len(rows)), "o", label=candidate)
    for candidate in rows[0]["weight_times_exact"] if rows else ():
        ratios = [row["weight_times_exact"][candidate] for row in rows]
        axes.plot(ratios, range(len(rows)), "s", fillstyle="none", label=f"weight gradient, {candidate}")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(title="gradients of linear layers, 2:4, bfloat16", xlabel="times as fast as exact")


def plot_train_step(axes: Axes, rows: Rows) -> None:
    for offset, backend in ((-0.2, "sparse"), (0.2, "auto")):
        heights = [100 * row["saved"][backend] for row in rows]
        axes.bar([i + offset for i in range(len(rows))], heights, 0.4, label=backend)
    axes.set_xticks(range(len(rows)), [row["model"] for row in rows])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title="training step, mvue 2:4", ylabel="% of the plain step saved")


def plot_cpu_prune_nm(axes: Axes, rows: Rows) -> None:
    """Plots the methods at density 1/2. Dashed lines are along the channels of NCHW."""
    chosen = [row for row in rows if (row["dtype"], row["mib"]) == ("float32", 16) and _density(row) == 0.5]
    for tensor, style, note in (("(rows, C)", "-", ""), ("NCHW", "--", ", channels of NCHW")):
        _plot_over_patterns(axes, [row for row in chosen if row["tensor"] == tensor], "times_clone", style, note)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="prune_nm of 16 MiB of float32, half kept", ylabel="time, in clones", ylim=(0, None))


def _plot_over_patterns(axes: Axes, rows: Rows, key: str, style: str = "-", note: str = "") -> None:
    """Plots a line for each candidate."""
    patterns = [row["pattern"] for row in rows]
    candidates = [name for name in rows[0][key] if not name.startswith("topk")] if rows else []
    for color, name in enumerate(candidates):
        times = [row[key].get(name) for row in rows]
        axes.plot(patterns, times, style, marker="o", color=f"C{color}", label=f"{name}{note}")


def plot_cpu_product(axes: Axes, rows: Rows, of: str = "data") -> None:
    """Plots a dot for each pattern, and a line through the medians of the patterns with the same density."""
    densities = sorted({_density(row) for row in rows}, reverse=True)
    for color, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
        found = {
            d: [r["times_exact"]["mvue"] for r in rows if r["shape"] == shape and _density(r) == d] for d in densities
        }
        for place, times in enumerate(found.values()):
            axes.plot([place] * len(times), times, ".", color=f"C{color}")
        axes.plot(
            range(len(densities)),
            [statistics.median(times) for times in found.values()],
            color=f"C{color}",
            label=shape,
        )
    axes.plot(range(len(densities)), [1 / d for d in densities], ":", color="grey", label="multiply-adds saved")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(densities)), [f"1/{1 / d:g}" for d in densities])
    axes.set(title=f"{of} gradient, mvue", xlabel="density n/m", ylabel="times as fast as exact", ylim=(0, None))


def plot_cpu_train_step(axes: Axes, rows: Rows) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    bars = list(dict.fromkeys((row["pattern"], row["backend"]) for row in rows))
    width = 0.8 / len(bars)
    for place, (pattern, backend) in enumerate(bars):
        saved = {
            row["model"]: 100 * row["saved"] for row in rows if (row["pattern"], row["backend"]) == (pattern, backend)
        }
        left = [models.index(model) + (place - (len(bars) - 1) / 2) * width for model in saved]
        axes.bar(left, list(saved.values()), width, label=f"{pattern}, {backend}")
    again = [max(abs(100 * row["plain_again_saved"]) for row in rows if row["model"] == model) for model in models]
    axes.errorbar(
        range(len(models)), [0] * len(models), again, fmt="none", color="black", capsize=4, label="a second plain model"
    )
    axes.set_xticks(range(len(models)), models)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title="training step, mvue", ylabel="% of the plain step saved")


def _density(row: dict[str, Any]) -> float:
    n, m = map(int, row["pattern"].split(":"))
    return n / m


GPU_PLOTS = {
    "prune_nm": plot_prune_nm,
    "pack": plot_pack,
    "gradients": plot_gradients,
    "train_step": plot_train_step,
}
CPU_PLOTS = {
    "prune_nm": plot_cpu_prune_nm,
    "spmm_nm": plot_cpu_product,
    "conv2d": plot_cpu_product,
    "weight_grad": partial(plot_cpu_product, of="weight"),
    "train_step": plot_cpu_train_step,
}


def plots_of(results: Results) -> dict[str, Callable[[Axes, Rows], None]]:
    """Returns the plot function for each subject in a file of results."""
    return {
        subject: plots[kind]
        for subject, result in results.items()
        if (kind := subject.partition(",")[0]) in (plots := GPU_PLOTS if result["machine"].get("gpu") else CPU_PLOTS)
    }


def draw(results: Results, subjects: Sequence[str]) -> Figure:
    """Draws a picture of some subjects, up to four side by side."""
    columns = min(4, len(subjects))
    rows = -(-len(subjects) // columns)
    figure = Figure(figsize=(7 * columns, 6 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for place in places[len(subjects) :]:
        place.remove()
    for place, subject in zip(places, subjects, strict=False):
        plots_of(results)[subject](place, results[subject]["rows"])
        if note := subject.partition(", ")[2]:
            place.set_title(f"{place.get_title()}; {note}", fontsize=9)
        place.legend(fontsize=8, handlelength=4)
    machine = results[subjects[0]]["machine"]
    figure.suptitle(f"sdgp on {machine.get('gpu') or machine['cpu'] + ', ' + machine['isa']}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    subjects = list(plots_of(results))
    if not subjects:
        raise SystemExit(
            f"plot: expected a subject that can be drawn in {args.results}, got {', '.join(results) or 'none'}"
        )
    path = args.results.with_suffix(".png")
    draw(results, subjects).savefig(path, dpi=110)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main()
