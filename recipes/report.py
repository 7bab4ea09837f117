# SPDX-License-Identifier: BSD-3-Clause
"""Makes the tables of recipes/README.md and their plots from result lines. Rows that nobody has run stay empty.

    python -m recipes.report                       # of results/*.jsonl, into recipes/README.md and results/*.png
    python -m recipes.report runs/cifar10.jsonl    # prints the tables of these runs, and plots them beside the file

Runs share a table if they differ only in seed and pruning. They have the same recipe, settings, data and type of
machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib

from .common.config import tomllib
from .common.errors import UserError
from .common.files import printable, read_lines, replace_between

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
_BEGIN, _END = "<!-- tables: python -m recipes.report -->", "<!-- end of tables -->"
_PRUNING = ("method", "pattern", "weight_grad", "plan", "budget", "backend", "exact_first", "exact_last", "layers")
# The setting that names a table, by recipe.
_MAIN = {"cifar10": "width", "imagenet": "net", "gpt": "size", "lora": "size", "classify": "size"}
_PUBLISHED_WIDTH = 128

Line: TypeAlias = dict[str, Any]


class Group(NamedTuple):
    """The runs of one table, which are comparable."""

    title: str
    slug: str
    settings: dict[str, Any]  # what its runs have in common
    runs: dict[str, list[Line]]  # by table row
    published: dict[str, float]

    @property
    def metric(self) -> str:
        return "top1" if "top1" in next(iter(self.runs.values()))[0] else "bits_per_byte"


def read(files: Iterable[Path]) -> list[Line]:
    """Reads the result lines of all files.

    Raises:
        UserError: if a file is not readable or has other lines.
    """
    lines: list[Line] = []
    for file in files:
        new = read_lines(file)
        if not all(line.get("recipe") in _MAIN and "exact_first" in line.get("config", {}) for line in new):
            raise UserError(f"expected result lines of recipes, of this version, got other lines in {file}")
        lines += new
    return lines


def published() -> dict[str, dict[str, float]]:
    """Returns the published top-1 by recipe and row."""
    return tomllib.loads((HERE / "published.toml").read_text(encoding="utf-8"))


def groups(lines: Iterable[Line], published: dict[str, dict[str, float]]) -> list[Group]:
    """Groups the runs by table, in the order of the lines."""
    by_settings: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_settings[json.dumps(_settings(line), sort_keys=True)].append(line)
    result: list[Group] = []
    for members in by_settings.values():
        first = members[0]
        recipe, config = first["recipe"], first["config"]
        main, value = ("model", config["model"]) if config.get("model") else (_MAIN[recipe], config[_MAIN[recipe]])
        newest: dict[str, dict[int, Line]] = defaultdict(dict)  # of two runs with the same seed, the later one
        for line in members:
            newest[_row(line)][line["seed"]] = line
        runs = {row: list(lines.values()) for row, lines in newest.items()}
        as_published = recipe == "imagenet" or (recipe == "cifar10" and config["width"] == _PUBLISHED_WIDTH)
        name = f"imagenet {config['net']}" if recipe == "imagenet" else recipe
        processor = first["machine"]["cpu"] if first["device"] == "cpu" else first["device"]
        title = f"{recipe}, {main} {printable(str(value))}, {config['epochs']} epochs; {first['data']}; {processor}"
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{recipe}-{value}")  # a model may be a path
        if any(group.slug == slug for group in result):
            slug += f"-{len(result)}"
        order = sorted(runs, key=lambda row: (row != "plain", row.split()[0] == "mvue"))
        sorted_runs = {row: runs[row] for row in order}
        result.append(
            Group(title, slug, _settings(first), sorted_runs, published.get(name, {}) if as_published else {})
        )
    return [group._replace(title=group.title + _difference(group, result)) for group in result]


def _settings(line: Line) -> dict[str, Any]:
    """Returns what the runs of one table have in common."""
    settings = {key: value for key, value in line["config"].items() if key not in _PRUNING}
    settings |= {key: line[key] for key in ("recipe", "data", "device", "processes")}
    return settings | {"cpu": line["machine"]["cpu"]}


def _difference(group: Group, groups: list[Group]) -> str:
    """Returns the settings in which a group differs from others with the same title; empty if there are none."""
    others = [other.settings for other in groups if other.title == group.title]
    own = group.settings
    return "".join(f"; {key} {own[key]}" for key in own if any(other.get(key) != own[key] for other in others))


def _row(line: Line) -> str:
    config = line["config"]
    if line["row"] == "plain":
        return "plain"
    first, last, layers = config["exact_first"], config["exact_last"], config.get("layers", "all")
    row = line["row"] + (f", {layers} only" if layers != "all" else "")
    return row + (f", {first} exact epochs first, {last} last" if first + last else "")


def table(group: Group) -> str:
    """Returns the table in Markdown, with the mean ± standard deviation over the seeds."""
    metric, name, digits = (group.metric, "top-1", 2) if group.metric == "top1" else (group.metric, "bits per byte", 3)
    unit = next(key for key in next(iter(group.runs.values()))[0] if key.endswith("_per_s"))
    head = ["data gradient", *(["published"] if group.published else []), name, "- plain", "seeds"]
    head += [f"{unit.removesuffix('_per_s')}/s", "waiting for data"]
    plain = group.runs.get("plain")
    rows = [head, ["---"] * len(head)]
    for row in dict.fromkeys([*group.published, *group.runs]):
        cells = [row, *([str(group.published.get(row, ""))] if group.published else [])]
        runs = group.runs.get(row)
        if runs is None:
            cells += [""] * (len(head) - len(cells))
        else:
            values = [run[metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            mean = statistics.mean(values)
            less = (
                f"{mean - statistics.mean(run[metric] for run in plain):+.{digits}f}"
                if plain and row != "plain"
                else ""
            )
            speed, waiting = (statistics.mean(run[key] for run in runs) for key in (unit, "waiting"))
            cells += [
                f"{mean:.{digits}f}{spread}",
                less.replace("-", "\u2212"),
                str(len(runs)),
                f"{speed:.0f}",
                f"{waiting:.1%}",
            ]
        rows.append(cells)
    return f"**{group.title}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _nobody(name: str, rows: dict[str, float]) -> str:
    """Returns the table of a published network that nobody has run here."""
    lines = ["| data gradient | published | top-1 | - plain | seeds |", "|---|---|---|---|---|"]
    lines += [f"| {row} | {top1} | | | |" for row, top1 in rows.items()]
    return f"**{name}, the published network: not run yet**\n\n" + "\n".join(lines)


def plot(group: Group, path: Path) -> None:
    """Plots the result against the density of the gradient (left) and the curves over the epochs (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    right.set_prop_cycle(color=[plt.get_cmap("tab20")(index) for index in range(20)])
    name = "top-1, %" if group.metric == "top1" else "bits per byte"
    by_method: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    for row, runs in group.runs.items():
        config = runs[0]["config"]
        if config.get("plan") or config.get("budget"):  # the layers have different densities
            continue
        n, m = map(int, config["pattern"].split(":"))
        label = _row(runs[0]).replace(f" {config['pattern']}", "", 1)
        by_method[label].append((1.0 if row == "plain" else n / m, [run[group.metric] for run in runs]))
    for label, points in by_method.items():
        points.sort()
        means = [statistics.mean(values) for _, values in points]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        left.errorbar([density for density, _ in points], means, spread, label=label, marker="o", capsize=3)
    left.set(xscale="log", xlabel="density n / m of the data gradient", ylabel=name)
    densities = sorted({density for points in by_method.values() for density, _ in points})
    left.set_xticks(densities, [f"1/{1 / density:g}" if density < 1 else "1" for density in densities])
    left.minorticks_off()
    last = []
    for row, runs in group.runs.items():
        curves = [[point[group.metric] for point in run["curve"] if group.metric in point] for run in runs]
        epochs = [point["epoch"] for point in runs[0]["curve"] if group.metric in point]
        means = [statistics.mean(values) for values in zip(*curves, strict=True)]
        (line,) = right.plot(epochs, means, label=row, linewidth=1.6)
        lowest, highest = ([f(values) for values in zip(*curves, strict=True)] for f in (min, max))
        right.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
        last += means[len(means) // 3 :]
    margin = 0.1 * (max(last) - min(last)) or 1.0
    right.set(xlabel="epoch", ylabel=name, ylim=(min(last) - margin, max(last) + margin))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(group.title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files of result lines")
    args = parser.parse_args()
    files = args.results or sorted((HERE / "results").glob("*.jsonl"))
    tables = published()
    try:
        found = groups(read(files), tables)
    except UserError as error:
        sys.exit(f"report: {error}")
    run = [group.published for group in found]
    parts = [] if args.results else [_nobody(name, rows) for name, rows in tables.items() if rows not in run]
    for group in found:
        image = files[0].parent / f"{group.slug}.png"
        plot(group, image)
        link = "" if args.results else f"\n\n![{group.title}](results/{image.name})"
        parts.append(table(group) + link)
    text = "\n\n".join(parts)
    print(text)
    if not args.results:
        readme = HERE / "README.md"
        replace_between(readme, _BEGIN, _END, text)


if __name__ == "__main__":
    main()
