# SPDX-License-Identifier: BSD-3-Clause
"""Tests the tables and plots of result lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import RECIPES

from recipes import report
from recipes.common.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def line(row: str, seed: int, top1: float, **changes: Any) -> dict[str, Any]:
    method, _, pattern = row.partition(" ")
    settings = {"method": method, "pattern": pattern or "2:4", "backend": "pruned", "exact_first": 0, "exact_last": 0}
    return {
        "recipe": "cifar10",
        "row": row,
        "seed": seed,
        "data": "CIFAR-10",
        "top1": top1,
        "images_per_s": 100.0,
        "waiting": 0.01,
        "device": "cpu",
        "processes": 1,
        "machine": {"cpu": "a CPU"},
        "config": settings | {"width": 16, "epochs": 2} | changes,
        "curve": [{"epoch": 1, "top1": top1 - 10}, {"epoch": 2, "top1": top1}],
    }


def test_report(tmp_path: Path) -> None:
    runs = [line("plain", 0, 80.0), line("plain", 1, 81.0), line("mvue 2:4", 0, 80.25), line("mvue 4:32", 0, 79.0)]
    runs += [line("mvue 2:4", 0, 82.0, exact_last=1), line("plain", 0, 95.0, width=128)]
    small, large = report.groups(runs, {"cifar10": {"plain": 95.3, "rescale 2:4": 95.2}})
    rows = report.table(small).splitlines()
    assert rows[2] == "| data gradient | top-1 | - plain | seeds | images/s | waiting for data |"
    assert rows[4] == "| plain | 80.50 ± 0.71 |  | 2 | 100 | 1.0% |"
    assert rows[5] == "| mvue 2:4 | 80.25 | \u22120.25 | 1 | 100 | 1.0% |"
    assert rows[7].startswith("| mvue 2:4, 0 exact epochs first, 1 last | 82.00 | +1.50 |")
    rows = report.table(large).splitlines()
    assert rows[4] == "| plain | 95.3 | 95.00 |  | 1 | 100 | 1.0% |"
    assert rows[5] == "| rescale 2:4 | 95.2 |  |  |  |  |  |"
    report.plot(small, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_tables_with_the_same_title_say_how_they_differ() -> None:
    runs = [line("plain", 0, 80.0, lr=0.1), line("plain", 0, 81.0, lr=0.2), line("plain", 0, 82.0, width=32, lr=0.1)]
    endings = [group.title.rpartition("; ")[2] for group in report.groups(runs, {})]
    assert endings == ["lr 0.1", "lr 0.2", "a CPU"]


def test_of_two_runs_with_one_seed_the_later_counts() -> None:
    (group,) = report.groups([line("plain", 0, 80.0), line("plain", 1, 81.0), line("plain", 0, 83.0)], {})
    assert "| plain | 82.00 ± 1.41 |  | 2 |" in report.table(group)


def test_pruned_weight_gradients_have_a_row_of_their_own(tmp_path: Path) -> None:
    """Pruned weight gradients must get their own row, also next to old lines without the setting."""
    runs = [line("plain", 0, 80.0), line("mvue 4:16", 0, 79.0, weight_grad="")]
    runs.append(line("mvue 4:16", 0, 78.0, weight_grad="4:16") | {"row": "mvue 4:16, weight gradient 4:16"})
    (group,) = report.groups(runs, {})
    assert list(group.runs) == ["plain", "mvue 4:16", "mvue 4:16, weight gradient 4:16"]
    report.plot(group, tmp_path / "plot.png")


def test_report_of_a_model_that_is_a_path() -> None:
    changes = {"model": "/models/of ours", "size": "tiny"}
    (group,) = report.groups([line("plain", 0, 80.0, **changes) | {"recipe": "lora"}], {})
    assert group.title.startswith("lora, model /models/of ours, 2 epochs")
    assert group.slug == "lora--models-of-ours"


def test_the_order_of_a_configs_keys_does_not_matter() -> None:
    runs = [line("plain", seed, 80.0) for seed in range(2)]
    runs[1]["config"] = dict(reversed(runs[1]["config"].items()))
    assert len(report.groups(runs, {})) == 1


def test_a_run_with_a_budget_shares_the_table_of_the_others() -> None:
    budget = line("plain", 0, 80.0, budget=100) | {"row": "budget, every 100 steps"}
    (group,) = report.groups([line("plain", 0, 80.0), line("plain", 1, 80.0, weight_grad="", budget=0), budget], {})
    assert [len(runs) for runs in group.runs.values()] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2", "expected a file of JSON lines, got .*: Extra data"),
        ("[1]", "expected a JSON object in each line, got other lines in "),
        (
            '{"recipe": "gpt", "config": {"dense_first": 0}}',
            "expected result lines of recipes, of this version, got other",
        ),
        ('{"recipe": "unknown"}', "expected result lines of recipes, of this version, got other"),
        (
            '{"row": "plain", "seed": 0, "diverged": "step 1"}',
            "expected result lines of recipes, of this version, got other",
        ),
    ],
)
def test_files_of_other_lines(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=f"^{message}"):
        report.read([tmp_path / "lines.jsonl"])


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps(line("plain", 0, 80.0))
    (tmp_path / "lines.jsonl").write_text(f"{whole}\n{whole[:50]}")
    assert report.read([tmp_path / "lines.jsonl"]) == [line("plain", 0, 80.0)]


def test_the_readme_holds_the_tables_of_the_results() -> None:
    found = report.groups(report.read(sorted((RECIPES / "results").glob("*.jsonl"))), report.published())
    text = (RECIPES / "README.md").read_text()
    for group in found:
        assert report.table(group) in text, f"{group.title}: run python -m recipes.report"
        assert (RECIPES / "results" / f"{group.slug}.png").is_file()
