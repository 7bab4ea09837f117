# SPDX-License-Identifier: BSD-3-Clause
"""The callbacks for the trainers of transformers and Lightning: when layers prune, and runs that go on."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp
from sdgp import backends

SETTINGS: dict[str, Any] = {"backend": "pruned", "dense_first": 0.25, "dense_last": 2}

schedules = pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, ["2:4"] * 8),
        (SETTINGS, ["dense"] * 2 + ["2:4"] * 4 + ["dense"] * 2),
        ({"dense_first": 1, "patterns": {0: (1, 4), 0.5: "4:8"}}, ["dense"] + ["1:4"] * 3 + ["4:8"] * 4),
    ],
    ids=["all", "dense", "patterns"],
)


def phase(layer: Any) -> str:
    return "dense" if layer.exact else str(layer.pruning.pattern)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every product of these small models is measured; calling it forgets what was, and forbids to measure again."""
    monkeypatch.setattr(backends, "LEAST_WORK", 0)

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    def in_another_process() -> None:
        monkeypatch.setattr(backends, "_choices", {})
        monkeypatch.setattr(backends, "_remembered", {})
        monkeypatch.setattr(backends, "measure", fail)

    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends, "_remembered", {})
    return in_another_process


# transformers.


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
    """Eight steps, a checkpoint after three and six; the trainer, and the phase at each forward."""
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


def test_trainer_all_dense_is_the_dense_run(hf_callback: Any, tmp_path: Path) -> None:
    dense, _ = hf_train(tmp_path, None)
    exact, _ = hf_train(tmp_path, hf_callback("2:4", backend="pruned", dense_first=8))
    pruned, _ = hf_train(tmp_path, hf_callback("2:4", backend="pruned", dense_first=7))
    assert same(dense.model, exact.model)
    assert not same(dense.model, pruned.model)


@pytest.mark.parametrize("restore", [True, False], ids=["callback from the checkpoint", "callback from the program"])
def test_trainer_resumes(hf_callback: Any, restore: bool, tmp_path: Path, measured: Callable[[], None]) -> None:
    whole, phases = hf_train(tmp_path / "whole", hf_callback("2:4", filter=is_block, **SETTINGS))
    assert backends.choices()
    measured()
    # The Trainer makes its own from what the checkpoint has, if asked; the filter's choice is in it.
    callback = hf_callback("1:4") if restore else hf_callback("2:4", filter=is_block, **SETTINGS)
    resumed, rest = hf_train(
        tmp_path / "resumed",
        callback,
        resume=tmp_path / "whole" / "checkpoint-3",
        restore_callback_states_from_checkpoint=restore,
    )
    assert rest == phases[3:]
    assert same(whole.model, resumed.model)
    files = [tmp_path / name / "checkpoint-6/trainer_state.json" for name in ("whole", "resumed")]
    saved = [json.loads(file.read_text()) for file in files]
    assert saved[0]["stateful_callbacks"]["SdgpCallback"] == saved[1]["stateful_callbacks"]["SdgpCallback"]


def test_trainer_resumes_a_run_without_the_callback(hf_callback: Any, tmp_path: Path) -> None:
    hf_train(tmp_path / "dense", None)
    _, phases = hf_train(tmp_path / "resumed", hf_callback("2:4"), resume=tmp_path / "dense/checkpoint-3")
    assert phases == ["2:4"] * 5
    assert (tmp_path / "resumed/checkpoint-6").is_dir()


def test_trainer_of_a_converted_model(hf_callback: Any, tmp_path: Path) -> None:
    model = sdgp.convert(gpt2(), "2:4", "magnitude", backend="dense")
    _, phases = hf_train(tmp_path, hf_callback(dense_first=1), model)
    assert phases == ["dense"] + ["2:4"] * 7
    assert sdgp.report(model)[0].method == "magnitude"
    with pytest.raises(ValueError, match=r"^Schedule: expected a model with converted layers, got none"):
        hf_train(tmp_path, hf_callback())


# Lightning.

# What Lightning asks of torch, and what it says on machines with more cores, or with a GPU.
asks_torch = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The library, and the callback as it is for a program that imported that one."""
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
    """Four batches an epoch; the trainer, and the phase at each forward."""
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
def test_lightning_all_dense_is_the_dense_run(lightning: tuple[Any, Any], tmp_path: Path) -> None:
    library, callback = lightning
    dense, _ = fit(library, tmp_path, None)
    exact, _ = fit(library, tmp_path, callback("2:4", backend="pruned", dense_first=8))
    pruned, _ = fit(library, tmp_path, callback("2:4", backend="pruned", dense_first=7))
    assert same(dense.lightning_module, exact.lightning_module)
    assert not same(dense.lightning_module, pruned.lightning_module)


@asks_torch
def test_lightning_resumes(lightning: tuple[Any, Any], tmp_path: Path, measured: Callable[[], None]) -> None:
    library, callback = lightning
    settings = {"method": "magnitude", "backend": "pruned", "dense_first": 2, "dense_last": 0}
    whole, phases = fit(library, tmp_path, callback("2:4", **settings))
    half, _ = fit(library, tmp_path, callback("2:4", **settings), epochs=1)
    half.save_checkpoint(tmp_path / "half")
    assert torch.load(tmp_path / "half", weights_only=True)["callbacks"]["SdgpCallback"]["measured"]
    measured()
    resumed, rest = fit(library, tmp_path, callback("2:4", **settings), tmp_path / "half")
    assert rest == phases[4:]
    assert same(whole.lightning_module, resumed.lightning_module)


@asks_torch
def test_lightning_of_unknown_length(lightning: tuple[Any, Any], tmp_path: Path) -> None:
    library, callback = lightning
    _, phases = fit(library, tmp_path, callback("2:4", dense_first=1), epochs=-1, max_steps=3)
    assert phases == ["dense", "2:4", "2:4"]
    with pytest.raises(ValueError, match=r"^Schedule: expected total with dense_last"):
        fit(library, tmp_path, callback("2:4", dense_last=1), epochs=-1)


# What both refuse.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": is_block}, "SdgpCallback: expected a pattern with method, filter and backend, got none"),
        ({"method": "rescale"}, "SdgpCallback: expected a pattern with method, filter and backend, got none"),
        ({"backend": "pruned"}, "SdgpCallback: expected a pattern with method, filter and backend, got none"),
        (
            {"pattern": "2:4", "backend": "fast"},
            "SdgpCallback: expected backend to be one of auto, pruned, sparse, dense, got 'fast'",
        ),
        ({"patterns": {3: "4:2"}}, "pattern: expected \"n:m\" or (n, m) with 1 <= n <= m <= 64, got '4:2'"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    from sdgp.integrations._callback import ScheduleCallback

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ScheduleCallback(**settings)
