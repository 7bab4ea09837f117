# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.Budget, which prunes as the advice says while a model trains."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from advice import Slower, Told, as_expected, batches, loss, net
from torch import nn

import sdgp
from sdgp import _plan
from sdgp._plan import Interval
from sdgp._steps import Steps

pytestmark = pytest.mark.usefixtures("told")


@pytest.fixture(autouse=True)
def _cheap_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes noise cheap, so that pruning pays."""
    monkeypatch.setattr(_plan, "STEPS_PER_NOISE", 0.01)


class Run:
    """A training run that advances step by step."""

    def __init__(self, with_budget: bool = True, **settings: Any) -> None:
        self.model = nn.Sequential(net(), nn.Dropout(0.1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.budget = sdgp.Budget(self.model, loss, self.optimizer, **settings) if with_budget else None

    def steps(self, *numbers: int) -> None:
        for number in numbers:
            batch = batches(8)[number % 8]
            torch.manual_seed(number)
            self.optimizer.zero_grad()
            loss(self.model, batch).backward()
            self.optimizer.step()
            if self.budget is not None:
                self.budget.step(batch)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def is_pruned(model: nn.Module) -> bool:
    return any(isinstance(layer, (sdgp.Linear, sdgp.Conv2d)) for layer in model.modules())


def test_prunes_after_the_first_steps(tmp_path: Path) -> None:
    run, told = Run(every=2, first=3, to=tmp_path / "budget.jsonl"), list[Any]()
    same = Run(every=2, first=3, to=told.append)
    pruned = []
    for number in range(6):
        run.steps(number)
        same.steps(number)
        pruned.append(is_pruned(run.model))
    assert pruned == [False, False, True, True, True, True]
    assert run.budget.verdict.startswith("it pays: ")
    lines = [json.loads(line) for line in (tmp_path / "budget.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert [line["step"] for line in told] == [3, 5]
    assert json.loads(json.dumps(told[0])) == lines[0]
    assert lines[-1]["plan"] == json.loads(json.dumps(run.budget.plan))
    assert all(line["pays"] and 0 < line["net"] < line["saved"] for line in lines)
    rows = {row.layer: row for row in sdgp.report(run.model) if row.gradient == "data"}
    for layer, (pattern, method, *_) in run.budget.plan.items():
        assert (rows[layer].pattern, rows[layer].method) == (pattern, method)


def test_goes_back_to_exact_where_it_no_longer_pays() -> None:
    run = Run(every=1)
    run.steps(0)
    assert is_pruned(run.model)
    run.budget._memory.decisions.clear()
    with Slower():
        run.steps(1)
    assert not is_pruned(run.model)
    assert run.budget.plan == {}
    assert run.budget.verdict == "nothing pays here: no sparse product is faster than the exact one"


def test_a_saving_below_net_is_not_taken() -> None:
    run = Run(every=1, net=0.9)
    run.steps(0)
    assert run.budget.verdict.startswith("it pays")
    assert not is_pruned(run.model)


def test_advice_does_not_touch_the_training() -> None:
    plain, asked = Run(with_budget=False), Run(every=1)
    plain.steps(0, 1, 2)
    with Slower():
        asked.steps(0, 1, 2)
    for one, other in zip(plain.weights, asked.weights, strict=True):
        assert torch.equal(one, other)


def test_products_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    measure = Told.measure
    monkeypatch.setattr(Told, "measure", lambda self, *a, **k: (asked.append(k or a[2:]), measure(self, *a, **k))[1])
    run = Run(every=2)
    run.steps(0, 1)
    first = len(asked)
    assert first == 3 * 3 * 2  # gradients of different shapes, times patterns and methods
    run.steps(2, 3)
    assert [settings for settings in asked[first:] if settings] == []  # only first backwards of the layers


def test_resumes_bit_for_bit() -> None:
    whole = Run(every=2)
    whole.steps(*range(3))
    checkpoint = json.loads(json.dumps(whole.budget.state_dict()))
    others = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict()])
    measured = sdgp.chooser.state_dict()
    whole.steps(3, 4, 5)
    resumed = Run(every=2)
    resumed.model.load_state_dict(others[0])
    resumed.optimizer.load_state_dict(others[1])
    sdgp.chooser.load_state_dict(measured)
    resumed.budget.load_state_dict(checkpoint)
    assert resumed.budget._memory == whole.budget._memory
    assert is_pruned(resumed.model)
    resumed.steps(3, 4, 5)
    assert resumed.budget.plan == whole.budget.plan
    assert resumed.budget.step_count == whole.budget.step_count == 6
    for one, other in zip(resumed.weights, whole.weights, strict=True):
        assert torch.equal(one, other)


def test_state_before_the_first_advice_is_json() -> None:
    run = Run(every=2)
    state = json.loads(json.dumps(run.budget.state_dict(), allow_nan=False))
    run.budget.load_state_dict(state)
    assert math.isnan(run.budget._memory.step_ms)
    assert run.budget._memory.realized is None


def test_a_batch_of_another_size_is_timed_anew() -> None:
    run = Run(every=1)
    run.steps(0)
    known = dict(run.budget._memory.decisions)
    run.budget.step(tuple(tensor[:7900] for tensor in batches()[0]))
    assert run.budget._memory.decisions == known
    run.budget.step(tuple(tensor[:64] for tensor in batches()[0]))
    assert run.budget._memory.decisions == {}  # all products are too small
    assert run.budget.plan == {}


def failing(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    budget = sdgp.Budget(net(), lambda model, batch: model(batch[0]), every=1)
    try:
        budget.step(batches()[0])
    except ValueError as error:
        Path(folder, f"error{rank}").write_text(str(error))
    torch.distributed.barrier()  # a process that ends first would close connections that the other one still opens
    torch.distributed.destroy_process_group()


def test_an_error_of_the_first_process_is_one_of_all(tmp_path: Path) -> None:
    mp.spawn(failing, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "error0").read_text().startswith("advise: expected loss(model, batch) to return a scalar")
    assert "from the first process, got: advise: expected loss(model, batch)" in (tmp_path / "error1").read_text()


def worker(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    _plan.STEPS_PER_NOISE = 0.0
    Steps.realized = as_expected
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with Told() if rank == 0 else Slower():  # only the first process's times count
        run = Run(every=2, net=0.0)
        wrapped = nn.parallel.DistributedDataParallel(run.model)
        for number in range(4):
            batch = batches(8)[2 * number + rank]
            run.optimizer.zero_grad()
            loss(wrapped, batch).backward()
            run.optimizer.step()
            run.budget.step(batch)
    torch.save((run.budget.plan, run.weights), f"{folder}/rank{rank}")
    # A wrapper that outlives the process group holds the interpreter's lock while it waits for gloo's threads. They may
    # need the lock to end.
    del wrapped
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    (plan, weights), (other_plan, other_weights) = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert plan == other_plan
    assert plan
    for one, other in zip(weights, other_weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("make", "requirement", "got"),
    [
        (lambda: sdgp.Budget(3), "an nn.Module", "int"),
        (lambda: sdgp.Budget(torch.compile(net())), "a model that is not compiled", "a compiled one"),
        (lambda: sdgp.Budget(net(), methods="mvue"), "lists of patterns and methods", "None and 'mvue'"),
        (lambda: sdgp.Budget(net(), torch.optim.SGD(net().parameters())), "loss to be a function", "SGD"),
        (lambda: sdgp.Budget(net(), nn.CrossEntropyLoss()), "loss to be a function", "CrossEntropyLoss"),
        (lambda: sdgp.Budget(net(), None, [1]), "optimizer to be a torch.optim.Optimizer", "list"),
        (lambda: sdgp.Budget(nn.ReLU()), "a model with trainable parameters", "none that requires a gradient"),
        (lambda: sdgp.Budget(net(), filter=lambda *_: False), "a model with layers to prune", "none"),
        (lambda: sdgp.Budget(net(), every=0), "every >= 1", "0 and 0"),
        (lambda: sdgp.Budget(net(), net=5), "net as a share", "5"),
        (lambda: sdgp.Budget(net(), to="no/such/folder/x"), "to= a file that can be written", "no/such/folder/x"),
        (lambda: sdgp.Budget(net()).load_state_dict({"step": 1}), "a state_dict with decisions, ", r"\['step'\]"),
    ],
    ids=[
        "module",
        "compiled",
        "methods",
        "loss",
        "loss module",
        "optimizer",
        "parameters",
        "filter",
        "every",
        "net",
        "to",
        "state",
    ],
)
def test_errors(make: Any, requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^Budget: expected {requirement}.*, got {got}"):
        make()


def test_a_useless_batch_is_passed_over() -> None:
    run = Run(every=2)
    one = torch.ones(1, 32), torch.ones(1, dtype=torch.int64)
    run.budget.step(one)
    run.budget.step(one)
    assert run.budget.verdict.startswith(
        "no advice at step 2: expected several batches of one size, or one of at least"
    )
    run.budget.step((torch.full((8192, 32), math.nan), batches()[0][1]))
    assert run.budget.verdict == "no advice at step 3: expected a finite loss, got nan"
    run.steps(0)
    assert run.budget.verdict.startswith("it pays")
    assert run.budget.state_dict()["next"] == 6


def test_a_busy_moment_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(every=2)
    with monkeypatch.context() as patch:
        patch.setattr("sdgp._steps.seconds", lambda call, device: (call(), 1e-4)[1])  # less than the layers take
        run.steps(0, 1)
    assert run.budget.verdict.startswith("no advice at step 2: expected an idle machine")
    assert not is_pruned(run.model)
    run.steps(2)
    assert run.budget.verdict.startswith("it pays")
    assert is_pruned(run.model)


def test_steps_that_seemed_to_save_nothing_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Interval(-0.1, -0.5, 0.2), Interval(0.9, 0.8, 1.0)])
    monkeypatch.setattr(Steps, "realized", lambda *_: next(found))
    run = Run(every=2)
    run.steps(0, 1)
    assert run.budget.verdict.startswith("nothing pays here: sparse products are faster, but whole steps with them")
    run.steps(2, 3)
    assert run.budget.verdict.startswith("it pays")
    run.steps(4, 5)  # what was measured once is kept
    assert is_pruned(run.model)


def test_other_errors_of_advise_are_those_of_step() -> None:
    budget = sdgp.Budget(net(), lambda model, batch: model(batch[0]), every=1)
    with pytest.raises(ValueError, match=r"^advise: expected loss\(model, batch\) to return a scalar"):
        budget.step(batches()[0])
