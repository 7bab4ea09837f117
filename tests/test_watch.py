# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.watch: its records against plain PyTorch, when it records, and what it writes.

Watching must not change the training.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Timer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sdgp
from sdgp._fidelity import METRICS


def step(model: nn.Module, x: Tensor) -> None:
    model(x.requires_grad_()).square().sum().backward()


def converted(model: nn.Module, pattern: str = "2:4", method: str = "magnitude", backend: str = "pruned") -> nn.Module:
    return sdgp.convert(model, pattern, method, backend=backend)


def last(watch: sdgp.Watch, layer: str) -> dict[str, float]:
    return {key: values[-1] for key, values in watch[layer].items()}


def test_example() -> None:
    model = converted(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))  # so that the data gradient is the output of prune_nm
    watch = sdgp.watch(model, every=1)
    x = torch.zeros(1, 4, requires_grad=True)
    model(x).backward(torch.tensor([[4.0, -3.0, 0.0, 1.0]]))
    assert torch.equal(x.grad, torch.tensor([[4.0, -3.0, 0.0, 0.0]]))
    expected = {
        "step": 0,
        "cosine": math.sqrt(25 / 26),
        "error": math.sqrt(1 / 26),
        "bias": math.sqrt(1 / 26),
        "l1_kept": 7 / 8,
        "l2_kept": math.sqrt(25 / 26),
        "zeros": 0.25,
        "density": 0.5,
    }
    assert last(watch, "(model)") == pytest.approx(expected)


def plainly(grad_output: Tensor, kept: Tensor, exact: Tensor, pruned: Tensor) -> dict[str, float]:
    """Computes the metrics as the docstring of sdgp.watch defines them, with torch's own functions."""
    grad_output, kept, exact, pruned = (tensor.double() for tensor in (grad_output, kept, exact, pruned))
    stays = kept != 0
    return {
        "cosine": F.cosine_similarity(exact.flatten(), pruned.flatten(), 0).item(),
        "error": ((pruned - exact).norm() / exact.norm()).item(),
        "l1_kept": (grad_output[stays].abs().sum() / grad_output.abs().sum()).item(),
        "l2_kept": (grad_output[stays].norm() / grad_output.norm()).item(),
        "zeros": (grad_output == 0).double().mean().item(),
        "density": stays.double().mean().item(),
    }


LAYERS = {
    "linear": (lambda: nn.Linear(12, 22), (3, 5, 12)),
    "rows": (lambda: nn.Linear(12, 22), (40, 12)),
    "vector": (lambda: nn.Linear(12, 22), (12,)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1, stride=2), (4, 6, 9, 7)),
    "same": (lambda: nn.Conv2d(6, 10, (3, 5), padding="same"), (2, 6, 9, 7)),
    "groups": (lambda: nn.Conv2d(6, 20, 3, groups=2), (3, 6, 8, 8)),
    "circular": (lambda: nn.Conv2d(6, 10, 3, padding=2, padding_mode="circular"), (3, 6, 8, 8)),
    "unbatched": (lambda: nn.Conv2d(6, 10, 3), (6, 8, 8)),
}


@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
@pytest.mark.parametrize("name", LAYERS)
def test_matches_plain_pytorch(name: str, method: str) -> None:
    make, shape = LAYERS[name]
    model = converted(make(), "2:4", method)
    batched = len(shape) > (3 if isinstance(model, nn.Conv2d) else 1)
    samples = {"rows": 40}.get(name, 1) if batched else None  # a quarter of these batches, but 64 rows
    x = torch.randn(shape, requires_grad=True)
    watch = sdgp.watch(model, every=1)
    output = model(x)
    grad_output = torch.randn_like(output) * (torch.rand_like(output) > 0.2)
    (pruned,) = torch.autograd.grad(output, x, grad_output)
    with sdgp.paused(model):
        (exact,) = torch.autograd.grad(model(x), x, grad_output)
    kept = model.prune(grad_output, model.pruning, None)
    expected = plainly(grad_output[:samples], kept[:samples], exact[:samples], pruned[:samples])
    found = last(watch, "(model)")
    if name == "circular":  # g and p belong to the padded input
        for key in ("cosine", "error"):
            assert found[key] == pytest.approx(expected.pop(key), rel=0.5)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert found["bias"] == found["error"]


def test_conv1d_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(8, 12)
    twin = converted(nn.Linear(12, 8))
    with torch.no_grad():
        twin.weight.copy_(layer.weight.t())
        twin.bias.zero_()
    watches = [sdgp.watch(model, every=1) for model in (converted(layer), twin)]
    x = torch.randn(4, 3, 12)
    for model in (layer, twin):
        step(model, x.clone())
    assert last(watches[0], "(model)") == pytest.approx(last(watches[1], "(model)"), rel=1e-5)


@pytest.mark.parametrize(("method", "unbiased"), [("mvue", True), ("random", False), ("magnitude", False)])
def test_bias_tells_unbiased_methods(method: str, unbiased: bool) -> None:
    model = converted(nn.Linear(64, 64), "2:4", method)
    watch = sdgp.watch(model, every=1, window=5)
    for _ in range(5):
        step(model, torch.randn(256, 64))
    values = last(watch, "(model)")
    assert values["error"] > 0.2
    assert (values["bias"] < 0.1) == unbiased


@pytest.mark.parametrize("method", ["mvue", "rescale"])
def test_training_does_not_notice(method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Dropout(0.5))
    weights = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = converted(copy.deepcopy(dense), "2:4", method)
        watch = sdgp.watch(model, every=2) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        if watch is not None:
            assert watch["3"]["step"] == [0, 2, 4]
    assert torch.equal(*weights)


def test_counts_training_forwards_alone() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    watch = sdgp.watch(model, every=3)
    for _ in range(7):
        step(model, torch.randn(2, 8))
        model.eval()
        step(model, torch.randn(2, 8))
        model.train()
        with torch.no_grad():
            model(torch.randn(2, 8))
    assert watch.step == 7
    assert list(watch) == ["0", "1"]
    assert watch["0"]["step"] == watch["1"]["step"] == [0, 3, 6]


def test_calls_of_one_layer_make_one_record() -> None:
    layer = nn.Linear(8, 8)
    model = converted(nn.Sequential(layer, layer))
    watch = sdgp.watch(model, every=1)
    step(model, torch.randn(2, 8))
    assert list(watch) == ["0"]
    assert watch["0"]["step"] == [0]


def test_recomputed_layers_are_recorded_once() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    outer = nn.Sequential(model)
    outer.forward = lambda x: checkpoint(model, x, use_reentrant=False)
    watch = sdgp.watch(outer, every=1)
    step(outer, torch.randn(2, 8))
    assert {name: record["step"] for name, record in watch.items()} == {"0.0": [0], "0.1": [0]}


def batched_gradient(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x.requires_grad_()), x, torch.randn(3, 4, 8), is_grads_batched=True)


def fake(model: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x)).sum().backward()
    model.zero_grad()


UNRECORDED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "vmap of grad": lambda model, x: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "batched gradient": batched_gradient,
    "fake tensors": fake,
    "meta": lambda model, x: step(model.to("meta"), x.to("meta")),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_what_a_watch_leaves_alone(name: str) -> None:
    """Neither the step nor the watch may fail."""
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), backend="dense")
    watch = sdgp.watch(model, every=1)
    UNRECORDED[name](model, torch.randn(4, 8))
    assert not watch


def test_a_selective_checkpoint_meets_the_same_operators() -> None:
    """The hooks of a later forward also run in the recomputation of an earlier one."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saves = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), backend="dense")
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    outer = nn.Sequential(model)
    outer.forward = lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    watch = sdgp.watch(outer, every=2)
    x = torch.randn(4, 8, requires_grad=True)
    outer(x)
    (outer(x) + outer(x)).sum().backward()  # steps 1 and 2
    assert {name: record["step"] for name, record in watch.items()} == {"0.0": [2], "0.1": [2]}


def test_exact_layers_are_not_recorded() -> None:
    model = converted(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), backend="auto")
    watch = sdgp.watch(model, every=1)
    step(model, torch.randn(2, 256))  # too small for auto
    assert not watch
    with sdgp.Chooser(timer=Timer(1.0, 2.0)):
        for _ in range(2):
            step(model, torch.randn(256, 256))
        assert watch["1"]["step"] == [2]  # the decision of step 0 still stood before the backward of step 1
        with sdgp.paused(model):
            step(model, torch.randn(256, 256))
        assert watch["1"]["step"] == [2]


@pytest.mark.parametrize(("sparse", "steps"), [(1.0, [0, 1]), (3.0, [])])
def test_the_step_in_which_auto_decides(sparse: float, steps: list[int]) -> None:
    model = converted(nn.Linear(256, 256), backend="auto")
    watch = sdgp.watch(model, every=1)
    with sdgp.Chooser(timer=Timer(sparse, 2.0)):
        for _ in range(2):
            step(model, torch.randn(256, 256))
    assert [record["step"] for record in watch.values()] == ([steps] if steps else [])


def test_layers_that_are_converted_later_are_recorded() -> None:
    model = sdgp.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {})
    watch = sdgp.watch(model, every=1)
    step(model, torch.randn(4, 8))
    assert not watch
    sdgp.convert(model, {"1": ("2:4", "mvue")}, backend="pruned")
    step(model, torch.randn(4, 8))
    assert {name: record["step"] for name, record in watch.items()} == {"1": [1]}


def test_steps_of_measurements_do_not_count() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    watch = sdgp.watch(model, every=1)
    step(model, torch.randn(4, 8))
    sdgp.profile(model, torch.randn(4, 8), rounds=1)
    sdgp.advise(model, *torch.randn(2, 4, 8), rounds=1)
    step(model, torch.randn(4, 8))
    assert watch.step == 2
    assert watch["1"]["step"] == [0, 1]


def test_a_backward_after_the_pause_is_not_recorded() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "1:8", "random")
    schedule = sdgp.Schedule(model, exact_first=1, patterns={2: "2:4"})
    watch = sdgp.watch(model, every=1, window=1, exact_below=0.9)
    outputs = []
    for _ in range(3):
        outputs.append(model(torch.randn(4, 8, requires_grad=True)))
        schedule.step()
        outputs[-1].sum().backward()
        with sdgp.paused(model):
            outputs.append(model(torch.randn(4, 8, requires_grad=True)))
        outputs[-1].sum().backward()
    assert [record["step"] for record in watch.values()] == [[2], [2]]  # step 2 set both aside
    assert {record["density"][0] for record in watch.values()} == {1 / 8}  # the pattern of the forward


def test_a_layer_that_is_reverted_before_the_backward() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    watch = sdgp.watch(model, every=1)
    output = model(torch.randn(4, 8, requires_grad=True))
    sdgp.revert(model[0])
    output.sum().backward()
    assert list(watch) == ["1"]


def test_autocast_and_channels_last() -> None:
    model = converted(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))).to(memory_format=torch.channels_last)
    watch = sdgp.watch(model, every=1)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x.requires_grad_())
    output.float().square().sum().backward()
    assert [last(watch, name)["density"] for name in watch] == [0.5, 0.5]
    assert all(0.8 < last(watch, name)["cosine"] < 1 for name in watch)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_gradients_without_a_direction(value: float, tmp_path: Path) -> None:
    model = converted(nn.Linear(8, 8))
    watch = sdgp.watch(model, every=1, window=1, exact_below=0.99, to=tmp_path / "watch.jsonl")
    x = torch.randn(2, 8, requires_grad=True)
    model(x).backward(torch.full((2, 8), value))
    assert math.isnan(watch["(model)"]["cosine"][0])
    assert json.loads((tmp_path / "watch.jsonl").read_text())["cosine"] is None
    assert not watch.set_aside
    assert "nan" in str(watch)


def test_writes_json_lines(tmp_path: Path) -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    path = tmp_path / "watch.jsonl"
    for _ in range(2):  # the second watch appends to the same file
        with sdgp.watch(model, every=1, to=path) as watch:
            step(model, torch.randn(2, 8))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["layer"] for row in rows] == ["0", "1", "0", "1"]
    assert list(rows[0]) == ["step", "layer", "pattern", "method", *METRICS]
    assert {key: rows[3][key] for key in METRICS} == {key: watch["1"][key][0] for key in METRICS}


def test_writes_to_tensorboard() -> None:
    written = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

    model = converted(nn.Linear(8, 8))
    watch = sdgp.watch(model, every=1, to=Writer())
    step(model, torch.randn(2, 8))
    watch.close()
    assert written == [(f"sdgp/{key}/(model)", watch["(model)"][key][0], 0) for key in METRICS]


def test_closing_leaves_no_hook() -> None:
    model = converted(nn.Linear(8, 8))
    with sdgp.watch(model, every=1):
        step(model, torch.randn(2, 8))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_reverted_layers_are_left_alone() -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    watch = sdgp.watch(model, every=1)
    step(model, torch.randn(2, 8))
    sdgp.revert(model[0])
    step(model, torch.randn(2, 8))
    assert watch["0"]["step"] == [0]
    assert watch["1"]["step"] == [0, 1]
    assert "\n0 " not in str(watch)


def test_under_torch_compile_nothing_is_recorded_and_nothing_breaks() -> None:
    model = converted(nn.Linear(8, 8), backend="dense")
    watch = sdgp.watch(model, every=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(compiled, torch.randn(2, 8))
    assert not watch
    with pytest.raises(ValueError, match="expected a model that is not compiled, got a compiled one"):
        sdgp.watch(compiled)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 3}, "nn.Module", "int"),
    ({"model": nn.Linear(8, 8)}, "converted layers", "none"),
    ({"every": 0}, "every >= 1", "0 and 10"),
    ({"window": 0}, "window >= 1", "100 and 0"),
    ({"exact_below": 1.5}, "exact_below <= 1", "1.5"),
    ({"to": 3}, "path", "int"),
]


@pytest.mark.parametrize(("arguments", "requirement", "got"), BAD, ids=[requirement for _, requirement, _ in BAD])
def test_errors(arguments: dict[str, Any], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^watch: expected .*{requirement}.*, got {got}"):
        sdgp.watch(**{"model": converted(nn.Linear(8, 8)), **arguments})


@pytest.mark.parametrize(
    ("state", "requirement", "got"),
    [({"step": 3}, '"set_aside"', "['step']"), ({"step": 3, "set_aside": {"x": "bad"}}, "this model's layers", "x")],
)
def test_bad_states(state: dict[str, Any], requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^watch: expected .*{requirement}.*, got {re.escape(got)}"):
        sdgp.watch(converted(nn.Linear(8, 8))).load_state_dict(state)
