# SPDX-License-Identifier: BSD-3-Clause
"""Tests the callbacks for the trainers of transformers and Lightning: when layers prune, and resumed runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advice import as_expected
from torch import Tensor, nn

import sdgp

SETTINGS: dict[str, Any] = {"backend": "pruned", "weight_grad": "4:16", "exact_first": 0.25, "exact_last": 2}

schedules = pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, ["2:4"] * 8),
        (SETTINGS, ["exact"] * 2 + ["2:4"] * 4 + ["exact"] * 2),
        ({"exact_first": 1, "patterns": {0: (1, 4), 0.5: "4:8"}}, ["exact"] + ["1:4"] * 3 + ["4:8"] * 4),
    ],
    ids=["all", "exact", "patterns"],
)


def phase(layer: Any) -> str:
    if not hasattr(layer, "pruning"):
        return "plain"
    return "exact" if layer.held else str(layer.pruning.pattern)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def small_counts() -> sdgp.Chooser:
    """Returns a chooser that measures even the products of these small models."""
    return sdgp.Chooser(least_work=0, rounds=1)


def another_process() -> sdgp.Chooser:
    """Returns a chooser that knows nothing and fails if it measures."""

    def fail(call: object, device: object) -> float:
        raise AssertionError("measured again")

    return sdgp.Chooser(least_work=0, timer=fail)


class Faster(sdgp.Chooser):
    """A chooser that finds every sparse product faster."""

    def measure(
        self, products: Any, pruning: Any, rounds: int | None = None, exact_ms: float | None = None
    ) -> sdgp.Decision:
        return sdgp.Decision("sparse", "", exact_ms=2.0, sparse_ms=1.0)


BUDGET = {"every": 2, "first": 3, "net": 0.0, "patterns": ["2:4"]}


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes pruning pay even in these small models."""
    monkeypatch.setattr("sdgp._study.LEAST_WORK", 0)
    monkeypatch.setattr("sdgp._steps.seconds", lambda call, device: (call(), 0.1)[1])
    monkeypatch.setattr("sdgp._steps.Steps.realized", as_expected)
    monkeypatch.setattr("sdgp._plan.STEPS_PER_NOISE", 0.0)
    with Faster(least_work=0):
        yield


# The callback for transformers.


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def is_block(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


def hf_train(
    folder: Path, callback: Any, model: Any = None, resume: Path | None = None, **arguments: Any
) -> tuple[Any, list[str]]:
    """Trains for eight steps and saves after three and six. Returns the trainer and the phase at each forward."""
    transformers = pytest.importorskip("transformers")
    model = gpt2() if model is None else model
    dataset = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(32)[:, None] + torch.arange(12)) % 64]
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 1} | arguments
    training = transformers.TrainingArguments(
        str(folder),
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = transformers.Trainer(model, training, train_dataset=dataset, callbacks=[callback] if callback else [])
    phases: list[str] = []
    layer = model.transformer.h[1].attn.c_proj
    hook = layer.register_forward_hook(lambda layer, *_: phases.append(phase(layer)) if callback else None)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    hook.remove()
    return trainer, phases


@pytest.fixture
def hf_callback(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sdgp.integrations.transformers import SdgpCallback

    yield SdgpCallback
    sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@schedules
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(
    hf_callback: Any, settings: dict[str, Any], phases: list[str], accumulate: int, tmp_path: Path
) -> None:
    callback = hf_callback("2:4", filter=is_block, **settings)
    size = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer, seen = hf_train(tmp_path, callback, **size)
    assert seen == [phase for phase in phases for _ in range(accumulate)]
    assert [row.layer for row in sdgp.report(trainer.model) if not row.pattern] == ["lm_head"]


def test_trainer_all_exact_is_the_plain_run(hf_callback: Any, tmp_path: Path) -> None:
    plain, _ = hf_train(tmp_path, None)
    exact, _ = hf_train(tmp_path, hf_callback("2:4", backend="pruned", exact_first=8))
    pruned, _ = hf_train(tmp_path, hf_callback("2:4", backend="pruned", exact_first=7))
    assert same(plain.model, exact.model)
    assert not same(plain.model, pruned.model)


@pytest.mark.parametrize("restore", [True, False], ids=["callback from the checkpoint", "callback from the program"])
def test_trainer_resumes(hf_callback: Any, restore: bool, tmp_path: Path) -> None:
    with small_counts() as chooser:
        whole, phases = hf_train(tmp_path / "whole", hf_callback("2:4", filter=is_block, **SETTINGS))
    assert len(chooser) > 0
    # On request, the Trainer builds its own callback from the checkpoint, which includes the filter's choice.
    callback = hf_callback("1:4") if restore else hf_callback("2:4", filter=is_block, **SETTINGS)
    with another_process() as other:
        resumed, rest = hf_train(
            tmp_path / "resumed",
            callback,
            resume=tmp_path / "whole" / "checkpoint-3",
            restore_callback_states_from_checkpoint=restore,
        )
    assert other.state_dict() == chooser.state_dict()
    assert rest == phases[3:]
    assert same(whole.model, resumed.model)
    files = [tmp_path / name / "checkpoint-6/trainer_state.json" for name in ("whole", "resumed")]
    saved = [json.loads(file.read_text()) for file in files]
    assert saved[0]["stateful_callbacks"]["SdgpCallback"] == saved[1]["stateful_callbacks"]["SdgpCallback"]


def test_trainer_resumes_a_run_without_the_callback(hf_callback: Any, tmp_path: Path) -> None:
    hf_train(tmp_path / "plain", None)
    _, phases = hf_train(tmp_path / "resumed", hf_callback("2:4"), resume=tmp_path / "plain/checkpoint-3")
    assert phases == ["2:4"] * 5
    assert (tmp_path / "resumed/checkpoint-6").is_dir()


def test_trainer_of_a_converted_model(hf_callback: Any, tmp_path: Path) -> None:
    model = sdgp.convert(gpt2(), "2:4", "magnitude", backend="dense")
    _, phases = hf_train(tmp_path, hf_callback(exact_first=1), model)
    assert phases == ["exact"] + ["2:4"] * 7
    assert sdgp.report(model)[0].method == "magnitude"
    with pytest.raises(ValueError, match=r"^Schedule: expected a model with converted layers, got none"):
        hf_train(tmp_path, hf_callback())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_with_a_budget(hf_callback: Any, pays: None, accumulate: int, tmp_path: Path) -> None:
    size = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    callback = hf_callback(budget=BUDGET)
    trainer, _ = hf_train(tmp_path / "whole", callback, **size)
    assert callback.budget.step_count == 8
    assert callback.budget.verdict.startswith("it pays: ")
    assert phase(trainer.model.transformer.h[1].attn.c_proj) == "2:4"
    resumed = hf_callback(budget=BUDGET)
    again, _ = hf_train(tmp_path / "resumed", resumed, resume=tmp_path / "whole" / "checkpoint-3", **size)
    assert resumed.budget.step_count == 8
    assert resumed.budget.plan == callback.budget.plan
    assert same(trainer.model, again.model)


@pytest.mark.parametrize("restore", [True, False], ids=["callback from the checkpoint", "callback from the program"])
def test_trainer_with_a_budget_of_some_layers(hf_callback: Any, pays: None, restore: bool, tmp_path: Path) -> None:
    settings = {**BUDGET, "filter": lambda module, name: name.endswith("c_proj"), "to": tmp_path / "lines"}
    whole, _ = hf_train(tmp_path / "whole", hf_callback(budget=settings))
    resumed, _ = hf_train(
        tmp_path / "resumed",
        hf_callback(budget={} if restore else settings),
        resume=tmp_path / "whole" / "checkpoint-3",
        restore_callback_states_from_checkpoint=restore,
    )
    assert {name.endswith("c_proj") for name, layer in resumed.model.named_modules() if phase(layer) == "2:4"} == {True}
    assert same(whole.model, resumed.model)
    assert (tmp_path / "lines").stat().st_size > 0
    with pytest.raises(ValueError, match=r"^SdgpCallback: expected budget's to as a path, .*got a function"):
        hf_train(tmp_path / "function", hf_callback(budget={"to": print}))


def test_a_second_training_begins_anew(hf_callback: Any, pays: None, tmp_path: Path) -> None:
    callback = hf_callback(budget=BUDGET)
    hf_train(tmp_path / "first", callback)
    model = gpt2()
    _, phases = hf_train(tmp_path / "second", callback, model)
    assert phases[:3] == ["plain"] * 3
    assert callback.budget.step_count == 8


def test_an_interrupted_training_leaves_no_hook_behind(hf_callback: Any, pays: None, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    callback, model = hf_callback(budget=BUDGET), gpt2()
    handle = model.transformer.h[0].register_forward_hook(stop)
    with pytest.raises(Stop):
        hf_train(tmp_path / "first", callback, model)
    handle.remove()
    hf_train(tmp_path / "second", callback, model)
    assert not model._forward_pre_hooks


# The callback for Lightning.

# Warnings about Lightning's calls of torch, and Lightning's warnings on machines with more cores or a GPU.
asks_torch = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Returns the library, and the callback as a program gets it that has imported only this library."""
    library = pytest.importorskip(request.param)
    for other in {"lightning.pytorch", "pytorch_lightning"} - {request.param}:
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.delitem(sys.modules, "sdgp.integrations.lightning", raising=False)
    callback = importlib.import_module("sdgp.integrations.lightning").SdgpCallback
    assert issubclass(callback, library.Callback)
    return library, callback


def fit(
    library: Any, folder: Path, callback: Any, resume: Path | None = None, epochs: int = 2, **arguments: Any
) -> tuple[Any, list[str]]:
    """Trains on four batches per epoch. Returns the trainer and the phase at each forward."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
    phases: list[str] = []

    class Module(library.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if callback:
                phases.append(phase(self.net[2]))
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = library.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[callback] if callback else [],
        **arguments,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4)
    trainer.fit(Module(), loader, ckpt_path=resume)
    return trainer, phases


@asks_torch
@schedules
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(
    lightning: tuple[Any, Any], settings: dict[str, Any], phases: list[str], accumulate: int, tmp_path: Path
) -> None:
    library, callback = lightning
    _, seen = fit(
        library, tmp_path, callback("2:4", **settings), epochs=2 * accumulate, accumulate_grad_batches=accumulate
    )
    assert seen == [phase for phase in phases for _ in range(accumulate)]


@asks_torch
def test_lightning_all_exact_is_the_plain_run(lightning: tuple[Any, Any], tmp_path: Path) -> None:
    library, callback = lightning
    plain, _ = fit(library, tmp_path, None)
    exact, _ = fit(library, tmp_path, callback("2:4", backend="pruned", exact_first=8))
    pruned, _ = fit(library, tmp_path, callback("2:4", backend="pruned", exact_first=7))
    assert same(plain.lightning_module, exact.lightning_module)
    assert not same(plain.lightning_module, pruned.lightning_module)


@asks_torch
def test_lightning_resumes(lightning: tuple[Any, Any], tmp_path: Path) -> None:
    library, callback = lightning
    settings = {"method": "magnitude", "backend": "pruned", "exact_first": 2, "exact_last": 0}
    with small_counts() as chooser:
        whole, phases = fit(library, tmp_path, callback("2:4", **settings))
        half, _ = fit(library, tmp_path, callback("2:4", **settings), epochs=1)
        half.save_checkpoint(tmp_path / "half")
    measured = torch.load(tmp_path / "half", weights_only=True)["callbacks"]["SdgpCallback"]["measured"]
    assert measured == chooser.state_dict() != {}
    with another_process():
        resumed, rest = fit(library, tmp_path, callback("2:4", **settings), tmp_path / "half")
    assert rest == phases[4:]
    assert same(whole.lightning_module, resumed.lightning_module)


@asks_torch
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_with_a_budget(lightning: tuple[Any, Any], pays: None, accumulate: int, tmp_path: Path) -> None:
    library, make = lightning
    callback = make(budget=BUDGET)
    whole, _ = fit(library, tmp_path, callback, epochs=2 * accumulate, accumulate_grad_batches=accumulate)
    assert callback.budget.step_count == 8
    assert callback.budget.verdict.startswith("it pays: ")
    assert phase(whole.lightning_module.net[2]) == "2:4"
    assert "log" not in vars(whole.lightning_module)
    half, _ = fit(library, tmp_path, make(budget=BUDGET), epochs=accumulate, accumulate_grad_batches=accumulate)
    half.save_checkpoint(tmp_path / "half")
    resumed = make(budget=BUDGET)
    arguments = {"epochs": 2 * accumulate, "accumulate_grad_batches": accumulate}
    again, _ = fit(library, tmp_path, resumed, tmp_path / "half", **arguments)
    assert resumed.budget.step_count == 8
    assert same(whole.lightning_module, again.lightning_module)
    fit(library, tmp_path, resumed, epochs=accumulate, accumulate_grad_batches=accumulate)
    assert resumed.budget.step_count == 4  # another training, which begins anew


@asks_torch
def test_lightning_of_unknown_length(lightning: tuple[Any, Any], tmp_path: Path) -> None:
    library, callback = lightning
    _, phases = fit(library, tmp_path, callback("2:4", exact_first=1), epochs=-1, max_steps=3)
    assert phases == ["exact", "2:4", "2:4"]
    with pytest.raises(ValueError, match=r"^Schedule: expected total with exact_last"):
        fit(library, tmp_path, callback("2:4", exact_last=1), epochs=-1)


# What both callbacks accept and refuse.


def test_old_names_warn_and_work() -> None:
    from sdgp.integrations._callback import ScheduleCallback

    with pytest.warns(FutureWarning, match="exact_first") as warned:
        callback = ScheduleCallback("2:4", dense_first=0.25)
    assert warned[0].filename == __file__
    with pytest.warns(FutureWarning, match="exact_last"):
        other = ScheduleCallback("2:4", dense_last=2)
    assert (callback.exact_first, callback.exact_last, other.exact_last) == (0.25, 0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": is_block}, "SdgpCallback: expected a pattern .*, got none"),
        ({"method": "rescale"}, "SdgpCallback: expected a pattern .*, got none"),
        ({"backend": "pruned"}, "SdgpCallback: expected a pattern .*, got none"),
        ({"pattern": "2:4", "backend": "fast"}, "SdgpCallback: expected .*auto, pruned, sparse, dense, got 'fast'"),
        ({"budget": {}, "pattern": "2:4"}, "SdgpCallback: expected budget without pattern, .*, got both"),
        (
            {"budget": {"evry": 5, "loss": 1}},
            "SdgpCallback: expected arguments of sdgp.Budget in budget, got evry, loss",
        ),
        ({"patterns": {3: "4:2"}}, "pattern: expected .*, got '4:2'"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    from sdgp.integrations._callback import ScheduleCallback

    with pytest.raises(ValueError, match=f"^{message}$"):
        ScheduleCallback(**settings)
