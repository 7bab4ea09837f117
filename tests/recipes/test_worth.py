# SPDX-License-Identifier: BSD-3-Clause
"""Tests the study: its runs, that it continues where it stopped, and its tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sdgp
from recipes.common import process
from recipes.common.errors import UserError
from recipes.worth import __main__ as study
from recipes.worth import compare, measure, report, tasks
from recipes.worth.tasks import TASKS, Task

MACHINE = {"cpu": "x", "isa": "avx512", "threads": 1}
TINY = {"width": 8, "classes": 3, "epochs": 4, "epoch_images": 8, "batch_size": 4}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The real task at its smallest size, without a plan."""
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)
    task = TASKS["resnet9"]
    small = task._replace(
        base={**task.base, **TINY},
        shorter=lambda share: {"epochs": round(4 * share), "peak_epoch": share},
        smaller=lambda share: {"epochs": round(4 * share), "peak_epoch": share, "batch_size": round(4 * share)},
        lengths=(0.75, 0.5),
        batches=(0.75,),
        pruned=(("4:8", "4:8"),),
    )
    monkeypatch.setitem(TASKS, "resnet9", small)
    return small


def run(monkeypatch: pytest.MonkeyPatch, module: Any, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["worth", *map(str, words)])
    module.main()


def test_runs_every_arm_once(task: Task, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("resnet9", "--data", images, "--out", tmp_path / "runs", "--results", tmp_path / "results", "--seeds")
    run(monkeypatch, study, *words, 1)
    lines = [json.loads(line) for line in (tmp_path / "results" / "resnet9.jsonl").read_text().splitlines()]
    assert [(line["row"], line["config"]["epochs"], line["config"]["batch_size"]) for line in lines] == [
        ("plain", 4, 4),
        ("plain", 3, 4),
        ("plain", 2, 4),
        ("plain", 3, 3),
        ("mvue 4:8, weight gradient 4:8", 4, 4),
        ("mvue 4:8, weight gradient 4:8", 4, 4),
        ("rescale 2:4", 4, 4),
    ]
    assert [line["config"]["exact_first"] for line in lines] == [0, 0, 0, 0, 1, 0, 0]
    assert all(math.isfinite(line["test_loss"]) for line in lines)
    (tmp_path / "results" / "resnet9.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    run(monkeypatch, study, *words, 1)
    again = [json.loads(line) for line in (tmp_path / "results" / "resnet9.jsonl").read_text().splitlines()]
    assert len(again) == 7
    assert again[-1]["test_loss"] == lines[0]["test_loss"]


def test_measures(task: Task, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "POINTS", 2)
    folder = tmp_path / "new"
    words = ("resnet9", "--data", images, "--results", folder)
    run(monkeypatch, measure, *words, "--rounds", 2, "--machine", "x")
    saved = json.loads((folder / "resnet9-saved-x.json").read_text())
    assert set(saved["result"]) == {"4:8 + 4:8"}
    assert saved["machine"]["isa"]
    assert saved["verdict"] == "nothing pays here: every layer is too small at this batch size"
    assert not (folder / "resnet9-plan-x.json").exists()
    with pytest.raises(SystemExit, match="worth: --keep-plan: expected a stored plan, got none"):
        run(monkeypatch, measure, *words, "--machine", "x", "--keep-plan")
    (folder / "resnet9-plan-x.json").write_text('{"1.0": ["2:4", "mvue"]}')
    run(monkeypatch, measure, *words, "--rounds", 2, "--machine", "x", "--keep-plan")
    again = json.loads((folder / "resnet9-saved-x.json").read_text())
    assert set(again["result"]) == {"4:8 + 4:8", "plan"}
    assert again["verdict"] == saved["verdict"]
    assert json.loads((folder / "resnet9-plan-x.json").read_text()) == {"1.0": ["2:4", "mvue"]}
    run(monkeypatch, measure, *words, "--noise")
    points = json.loads((folder / "resnet9-noise.json").read_text())["result"]
    assert [point["step"] for point in points] == [0, 4]
    assert set(points[0]["noise"]) == {"data 4:8", "weight 4:8"}


@pytest.mark.parametrize("name", ["resnet9", "resnet9_bfloat16"])
@pytest.mark.parametrize("outer", [False, True])
def test_precision_of_the_measured_steps(name: str, outer: bool, images: Path) -> None:
    task = TASKS[name]._replace(base={**TASKS[name].base, **TINY})
    parts = measure.prepare(task, task.recipe.load(task.config(), images, process.start(None)))
    seen = []
    parts.model[0][0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        parts.loss(parts.model, *next(parts.batches))
    assert seen == [torch.bfloat16 if outer or name == "resnet9_bfloat16" else torch.float32]


def test_tasks_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning begins with the model that the plain run of the GPT ended with."""
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)
    tiny = {"epochs": 4, "epoch_steps": 1, "batch_size": 4, "context": 16, "validation_bytes": 512, "warmup": 1.0}
    model = {"model": str(tmp_path / "runs/gpt/seed0/checkpoint.safetensors")}
    of_name = {"gpt": {"size": "tiny"}, "lora": model, "classify": model}
    for text in (tmp_path / "text", tmp_path / "classes" / "one" / "text", tmp_path / "classes" / "other" / "text"):
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(b"to be or not to be, " * 2000)
    for name, settings in of_name.items():
        small = TASKS[name]._replace(
            base={**TASKS[name].base, **tiny, **settings},
            data=tmp_path / ("classes" if name == "classify" else "text"),
            shorter=lambda share: {"epochs": round(4 * share)},
            smaller=lambda share: {"batch_size": round(4 * share)},
            lengths=(0.5,),
            batches=(0.5,),
            pruned=(("2:4", ""),),
        )
        monkeypatch.setitem(TASKS, name, small)
        words = (name, "--results", tmp_path)
        run(monkeypatch, study, *words, "--out", tmp_path / "runs", "--seeds", 1)
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        pruned = 23 if name == "lora" else 24  # the input of a frozen first layer needs no gradient
        assert [(line["row"], line["layers"]["pruned"]) for line in lines] == [
            ("plain", 0),
            ("plain", 0),
            ("plain", 0),
            ("mvue 2:4", pruned),
            ("mvue 2:4", pruned),
            ("rescale 2:4", pruned),
        ]
        arms = compare.arms(small, lines)
        assert [(arm.cost, arm.pruned) for arm in arms] == [(1, 1), (0.5, 1), (0.5, 1), (1, 0.75), (1, 1), (1, 1)]
        assert all(math.isfinite(line[small.metric]) for line in lines)
        run(monkeypatch, measure, *words, "--rounds", 2, "--machine", "x")
        assert set(json.loads((tmp_path / f"{name}-saved-x.json").read_text())["result"]) == {"2:4"}


def test_a_run_that_diverges_is_a_result(
    task: Task, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "resnet9", task._replace(base={**task.base, "lr": 1e20}, lengths=(), batches=()))
    words = ("resnet9", "--data", images, "--out", tmp_path / "runs", "--results", tmp_path, "--seeds", 1)
    for _ in range(2):  # the second time, nothing is left to run
        run(monkeypatch, study, *words)
        lines = [json.loads(line) for line in (tmp_path / "resnet9.jsonl").read_text().splitlines()]
        mvue = "mvue 4:8, weight gradient 4:8"
        assert [line["row"] for line in lines] == ["plain", mvue, mvue, "rescale 2:4"]
        assert all("finite" in line["diverged"] or "gradient" in line["diverged"] for line in lines)
    small = TASKS["resnet9"]
    table = report.table("resnet9", small, compare.arms(small, lines), {}, {})
    assert "| rescale 2:4 | diverged in 1 | 1 |" in table


def test_plans_of_another_folder(tmp_path: Path) -> None:
    plan = tmp_path / "resnet9-plan-x.json"
    plan.write_text("{}")
    assert [arm["plan"] for arm in TASKS["resnet9"].arms(tmp_path) if "plan" in arm] == [str(plan)] * 2


def test_foreign_lines(tmp_path: Path) -> None:
    path = tmp_path / "resnet9.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=f"^expected result lines of recipes, got other lines in {path}$"):
        study.finished(TASKS["resnet9"], path)


@pytest.mark.parametrize("module", [study, measure])
def test_bad_numbers(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, module, "resnet9", "--threads", 0)
    assert stopped.value.code == 2
    assert "argument --threads: expected a number from 1 on, got '0'" in capsys.readouterr().err


def test_untimed_products_are_all_faster() -> None:
    layer = sdgp.Linear(256, 256, pattern="2:4")
    with measure._Untimed():
        layer(torch.randn(512, 256, requires_grad=True)).sum().backward()
    assert layer.decision.product == "sparse"


def arm(kind: str, cost: float, *losses: float) -> compare.Arm:
    return compare.Arm(kind, kind, cost, dict(enumerate(losses)))


def test_what_a_loss_is_worth() -> None:
    plain = [arm("steps", 1.0, 1.0, 1.1), arm("steps", 0.8, 1.2, 1.3), arm("steps", 0.6, 1.6, 1.7)]
    assert compare.worth(arm("pruned", 1.0, 1.1, 1.2), plain).equivalent == pytest.approx(0.9)
    assert compare.worth(arm("pruned", 1.0, 1.4, 1.5), plain).equivalent == pytest.approx(0.7)
    assert compare.worth(arm("pruned", 1.0, 0.9, 1.0), plain).equivalent == pytest.approx(1.1)  # better than plain
    assert compare.worth(arm("pruned", 1.0, 1.8, 1.9), plain).equivalent == pytest.approx(0.5)
    one = compare.worth(arm("pruned", 1.0, 1.1), plain)
    assert (one.equivalent, math.isnan(one.low)) == (pytest.approx(0.9), True)
    wide = compare.worth(arm("pruned", 1.0, 1.09, 1.21), plain)
    half = 12.71 * 0.01  # t for one degree of freedom times the standard error
    assert (wide.low, wide.high) == pytest.approx((0.8 - (half - 0.1) / 2, 0.9 + half))


def test_a_verdict_beside_its_outcome() -> None:
    """A plan with the loss of 90 % of the steps, and of 80 % of the batch: 1 - 0.6 / 0.8 = 25 %.

    If half of the steps are pruned: 1 - 0.8 / 0.8 = 0, and predicted are 1 - (1 - 0.2) (1 + 0.05) = 16 %.
    """
    row = "plan task-plan-x"
    plan = compare.Arm(row, "pruned", 1.0, {0: 1.2, 1: 1.2}, row)
    found = [arm("steps", 1.0, 1.0, 1.0), arm("steps", 0.8, 1.4, 1.4), arm("batch", 0.6, 1.4, 1.4), plan]
    document = {"result": {"plan": {"saved": 0.4}}, "saved": 0.4, "noise": 0.1}
    found.append(plan._replace(exact=0.5))
    assert report.verdicts("task", found, {"x": document}) == [
        "| task | x | 40% per step, noise τ 0.100 | none | +34% | +25% [+25%, +25%] |",
        "| task | x | 40% per step, noise τ 0.100 | first 50% | +16% | +0% [+0%, +0%] |",
    ]
    (line,) = report.verdicts("task", found, {"y": document})
    assert line.endswith("| +34% | not trained with |")


def test_a_study_that_is_not_complete() -> None:
    """Arms that cannot be compared yet are unknown, not wrong."""
    full, plan = arm("steps", 1.0, 1.0, 1.0), compare.Arm("plan", "pruned", 1.0, {0: 1.2, 1: 1.2}, "plan task-plan-x")
    document = {"result": {"plan": {"saved": 0.4, "saved_low": 0.4, "saved_high": 0.4}}, "saved": 0.4, "noise": 0.1}
    said = "| task | x | 40% per step, noise τ 0.100 | none | +34% |"
    assert report.verdicts("task", [full, plan], {"x": document}) == [f"{said} unknown |"]  # nothing shorter has run
    shorter = arm("steps", 0.8, 1.4, math.inf)
    assert report.verdicts("task", [full, plan, shorter], {"x": document}) == [f"{said} unknown |"]
    assert "| plan | 1.200 ± 0.000 | 2 |" in report.table("task", TASKS["resnet9"], [full, plan], {"x": document}, {})
    for other in (plan._replace(losses={0: 1.2, 1: math.inf}), plan._replace(losses={2: 1.2})):
        (line,) = report.verdicts("task", [full, other, arm("steps", 0.8, 1.4, 1.4)], {"x": document})
        assert line.endswith("| not trained with |")
    task = TASKS["resnet9"]
    pruned = {"config": vars(task.config(method="rescale")), "seed": 0, "test_loss": 1.0}
    assert compare.arms(task, [pruned]) == []  # no full run


def test_runs_with_an_earlier_plan_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    line = {"config": {"plan": str(path)}, "plan": {"a": ["2:4", "mvue"]}}
    assert not compare.has_present_plan(line)
    path.write_text('{"a": ["2:4", "mvue"]}')
    assert compare.has_present_plan(line)
    path.write_text('{"a": ["4:8", "mvue"]}')
    assert not compare.has_present_plan(line)
    assert compare.has_present_plan({"config": {"plan": str(path)}})  # from before lines stored plans


def test_a_loss_that_no_plain_run_has_saves_nothing() -> None:
    plain = [arm("steps", 1.0, 1.0, 1.0), arm("steps", 0.5, 2.0, 2.0)]
    worth = compare.worth(arm("pruned", 1.0, 2.9, 3.3), plain)
    assert worth.low < 0 < worth.high
    assert report._signed(compare.net_saving(0.4, worth)).startswith("< -100% [< -100%, ")


def test_a_budget_beside_its_outcome() -> None:
    """Of 100 steps, 50 save 40 % and 25 save 20 %; asking takes the time of 10 exact steps: 0.2 + 0.05 - 0.1 = 15 %."""
    task = TASKS["resnet9_bfloat16"]
    base = {**task.base, "epochs": 4, "epoch_images": 25 * 128}
    small = task._replace(base=base, budget=10)
    advice = [
        {"step": 10, "saved": 0.3, "noise": 0.5, "net": 0.0, "used": False},
        {"step": 25, "saved": 0.4, "noise": 0.1, "net": 0.3, "used": True},
        {"step": 75, "saved": 0.2, "noise": 0.2, "net": 0.1, "used": True},
    ]
    lines = []
    for overrides, loss in (({}, 1.0), ({"epochs": 3}, 1.25), ({"budget": 10}, 1.1)):
        line = {"seed": 0, "test_loss": loss, "machine": MACHINE, "advice": advice, "asking_steps": 10.0}
        lines.append({**line, "config": vars(small.config(**overrides))})
    small = small._replace(shorter=lambda share: {"epochs": 3}, lengths=(0.75,), batches=())
    found = compare.arms(small, lines)
    assert [arm.kind for arm in found] == ["steps", "pruned", "steps"]
    document = {"result": {}, "saved": 0.4, "noise": 0.1, "machine": MACHINE}
    # The loss equals that of 90 % of the steps: 1 - 0.85 / 0.9 = 6 %. The noise is 0.05 + 0.05, so predicted are
    # 1 - 0.85 * 1.1 = 6 %.
    assert report.verdicts("task", found, {"x": document}) == [
        "| task | x | `Budget`: 15%, after 10% for asking, noise τ 0.100 | first 10% | +6% | +6% |",
        "| task | x | nothing pays | | | no plan |",
    ]
    table = report.table(
        "task", small, found, {"x": document, "y": document | {"machine": MACHINE | {"isa": "avx2"}}}, {}
    )
    line = next(line for line in table.splitlines() if "budget" in line)
    assert line.startswith("| budget, every 10 steps, first 10% exact | 1.100 | 1 | 90% |")
    assert line.endswith("| 0.100 | 1.1 | 15% [15%, 15%]; **+6%** |  |")


def test_tables(
    task: Task, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    results, lines = tmp_path / "results", []
    results.mkdir()
    losses = [1.0, 1.1, 1.2, 1.05, 1.04, 1.08, 1.3]
    for overrides, loss in zip(task.arms(), losses, strict=True):
        config = vars(task.config(**overrides))
        lines += [{"config": config, "seed": seed, "test_loss": loss + seed / 10} for seed in (0, 1)]
    (results / "resnet9.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"saved": 0.3, "saved_low": 0.2, "saved_high": 0.4}
    said = {"saved": 0.25, "noise": 0.02}
    (results / "resnet9-saved-x.json").write_text(json.dumps({"result": {"4:8 + 4:8": row}, **said}))
    points = [{"noise": {"data 4:8": 9.0, "weight 4:8": 9.0}}, {"noise": {"data 4:8": 0.02, "weight 4:8": 0.03}}]
    (results / "resnet9-noise.json").write_text(json.dumps({"result": points}))
    (tmp_path / "README.md").write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n")
    run(monkeypatch, report)
    table = capsys.readouterr().out.splitlines()
    # The loss equals that of plain training with 80 % of the steps, or with 60 % of the batch:
    # (1 / 0.6 - 1) / 0.05 = 13.3, 1 - 0.7 / 0.6 = -17 %.
    cells = [cell.strip() for cell in next(line for line in table if "4:8 |" in line).split("|")[1:-1]]
    assert cells[0] == "mvue 4:8, weight gradient 4:8"
    assert cells[3].startswith("80%")
    assert cells[4].startswith("60%")
    assert cells[5:7] == ["0.050", "13.3"]
    assert cells[7].startswith("30% [20%, 40%]; **-17%** [-")
    # With an exact start: 90 % of the steps or 80 % of the batch, (1 / 0.8 - 1) / (0.75 * 0.05) = 6.7,
    # 1 - (1 - 0.75 * 0.3) / 0.8 = 3 %.
    cells = [cell.strip() for cell in next(line for line in table if "exact |" in line).split("|")[1:-1]]
    assert cells[0] == "mvue 4:8, weight gradient 4:8, first 25% exact"
    assert (cells[3][:3], cells[4][:3], *cells[5:7]) == ("90%", "80%", "0.038", "6.7")
    assert cells[7].startswith("30% [20%, 40%]; **+3%** [+")
    assert "| resnet9 | x | nothing pays | | | no plan |" in table
    text = (tmp_path / "README.md").read_text()
    assert (text.startswith("before\n"), text.endswith("after\n"), "old" in text) == (True, True, False)
    assert (results / "resnet9.png").stat().st_size > 1000
    (tmp_path / "README.md").write_text(f"{report._BEGIN}\nold\n")
    with pytest.raises(SystemExit, match=f"report: expected {report._END} in "):
        run(monkeypatch, report)
    assert (tmp_path / "README.md").read_text() == f"{report._BEGIN}\nold\n"
