# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.profile: its rows, that they add up, and that it leaves the model unchanged."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from compare import Timer
from torch import Tensor, nn

import sdgp


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 12)
    )


BATCH = (2, 3, 8, 8)


def test_rows() -> None:
    result = sdgp.profile(sdgp.convert(small(), "1:4", backend="sparse"), torch.randn(BATCH), rounds=2)
    # The first layer's input needs no gradient, so this layer has no data gradient to prune.
    assert [(row.layer, row.shape, row.pattern) for row in result] == [
        ("3", "(2, 8, 4, 4)", "1:4"),
        ("5", "(2, 12)", "1:4"),
    ]
    for row in result:
        assert row.product == "sparse"
        assert min(row.exact_ms, row.dense_ms, row.sparse_ms) > 0
        assert row.share == pytest.approx(row.exact_ms / result.exact_ms)
    assert result.step_ms > 0


@pytest.mark.parametrize(
    ("backend", "product"), [("auto", "plain"), ("pruned", "dense"), ("dense", "dense"), ("sparse", "sparse")]
)
def test_product(backend: str, product: str) -> None:
    result = sdgp.profile(sdgp.convert(small(), backend=backend), torch.randn(BATCH), rounds=1)
    assert {row.product for row in result} == {product}


@pytest.mark.parametrize("sparse_wins", [True, False])
def test_product_that_was_measured(sparse_wins: bool) -> None:
    layer = sdgp.Linear(256, 256)
    with sdgp.Chooser(timer=Timer(1.0, 2.0) if sparse_wins else Timer(2.0, 1.0), rounds=1):
        result = sdgp.profile(layer, torch.randn(256, 256, requires_grad=True), rounds=1)
    assert [(row.layer, row.product) for row in result] == [("(model)", "sparse" if sparse_wins else "exact")]


def test_each_product_s_time_stands_in_its_column() -> None:
    times = iter([3.0, 2.0, 1.0])
    with sdgp.Chooser(timer=lambda call, device: next(times)):
        (row,) = sdgp.profile(sdgp.Linear(8, 8, backend="sparse"), torch.randn(4, 8, requires_grad=True), rounds=1)
    assert (row.exact_ms, row.dense_ms, row.sparse_ms) == (3.0, 2.0, 1.0)


def test_a_row_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=self.layer(x)[:1])  # the second call uses a keyword and another shape

    result = sdgp.profile(sdgp.convert(Twice()), torch.randn(3, 8, requires_grad=True), rounds=1)
    assert sorted((row.layer, row.shape) for row in result) == [("layer", "(1, 8)"), ("layer", "(3, 8)")]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("shape", [BATCH, BATCH[1:]], ids=["batched", "unbatched"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_convolutions(padding_mode: Any, shape: tuple[int, ...]) -> None:
    layer = sdgp.Conv2d(3, 8, (2, 3), padding="same", padding_mode=padding_mode, backend="sparse")
    (row,) = sdgp.profile(layer, torch.randn(shape, requires_grad=True), rounds=1)
    assert row.shape == str((*shape[:-3], 8, 8, 8))


def test_autocast() -> None:
    model = sdgp.convert(small(), backend="sparse")

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: Tensor = self.model(x)
            return output

    assert len(sdgp.profile(Mixed(), torch.randn(BATCH), rounds=1)) == 2


# Batches and losses.


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor, *, scale: float = 1.0, out: str = "tensor") -> Any:
        y = self.layers(x) * scale
        return {"tensor": y, "tuple": (y, [y.detach(), y.int()]), "mapping": {"y": y}, "none": y.detach()}[out]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(4, 8),
        (torch.ones(4, 8),),
        [torch.ones(4, 8)],
        {"x": torch.ones(4, 8), "scale": 2.0},
        {"x": torch.ones(4, 8), "out": "tuple"},
        {"x": torch.ones(4, 8), "out": "mapping"},
    ],
    ids=["tensor", "tuple", "list", "mapping", "to a tuple", "to a mapping"],
)
def test_batches(batch: Any) -> None:
    (row,) = sdgp.profile(sdgp.convert(Keywords()), batch, rounds=1)
    assert row.layer == "layers.1"


def test_loss() -> None:
    seen: list[torch.Size] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(2 * batch)
        seen.append(output.shape)
        return output.sum()

    sdgp.profile(sdgp.convert(Keywords()), torch.ones(4, 8), loss, rounds=3)
    assert set(seen) == {(4, 8)}
    assert len(seen) == 2 + 2 * 3  # a warm-up, one for the shapes, and the rounds


def test_the_output_s_own_loss() -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Model(Keywords):
        def forward(self, x: Tensor, **_: Any) -> Any:
            return Output(self.layers(x).sum())

    assert len(sdgp.profile(sdgp.convert(Model()), torch.ones(4, 8), rounds=1)) == 1


# The model is left unchanged.


def test_state_is_kept() -> None:
    model = sdgp.convert(small(), method="mvue", backend="pruned")
    x = torch.randn(BATCH)
    model(x).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    gradients[0] = next(model.parameters()).grad = None
    values = [None if grad is None else grad.clone() for grad in gradients]
    buffers = [buffer.clone() for buffer in model.buffers()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    hooks = [len(layer._forward_hooks) for layer in model]
    generator = torch.get_rng_state()
    sdgp.profile(model, x, rounds=2)
    assert torch.equal(torch.get_rng_state(), generator)
    for parameter, grad, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    for tensors, before in ((model.buffers(), buffers), (model.parameters(), weights)):
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    assert [len(layer._forward_hooks) for layer in model] == hooks
    assert model.training
    assert not any(layer.holds for layer in model if isinstance(layer, (sdgp.Linear, sdgp.Conv2d)))


def test_state_is_kept_where_the_step_fails() -> None:
    model = sdgp.convert(small())
    buffers = [buffer.clone() for buffer in model.buffers()]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise KeyError

    with pytest.raises(KeyError):
        sdgp.profile(model, torch.randn(BATCH), loss)
    assert all(torch.equal(buffer, before) for buffer, before in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_device_without_a_sparse_product() -> None:
    model = sdgp.convert(Keywords().to("meta"), backend="pruned")
    (row,) = sdgp.profile(model, torch.ones(4, 8, device="meta"), rounds=1)
    assert all(math.isnan(ms) for ms in (row.exact_ms, row.dense_ms, row.sparse_ms, row.share))
    assert row.product == "dense"


# The printed table and the errors.


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    result = sdgp.profile(sdgp.convert(small(), backend="sparse"), torch.randn(BATCH), rounds=1)
    printed = capsys.readouterr().out
    assert printed == f"{result}\n"
    head, line, *rows, total = printed.splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    assert [columns[0], *columns[2:]] == [
        *("layer", "pattern", "exact ms", "pruned + dense ms", "sparse ms", "share", "product")
    ]
    assert set(line) == {"-", "|"}
    assert len(rows) == len(result) == 2
    number = r"\d+\.\d+"
    pattern = rf"3 +\| \(2, 8, 4, 4\) +\| 2:4 +\| ({number} +\| ){{3}}{number}% +\| sparse"
    assert re.fullmatch(pattern, rows[0])
    assert re.fullmatch(rf"step: exact {number} ms, as converted {number} ms, -?{number}% saved", total)


@pytest.mark.parametrize(
    ("call", "requirement", "got"),
    [
        (lambda: sdgp.profile(small(), torch.randn(BATCH)), "converted layers", "none"),
        (lambda: sdgp.profile("resnet18", None), "nn.Module", "str"),  # type: ignore[arg-type]
        (lambda: sdgp.profile(sdgp.convert(small()), torch.randn(BATCH), rounds=0), "rounds >= 1", "0"),
        (lambda: sdgp.profile(sdgp.convert(Keywords()), {"x": torch.ones(4, 8), "out": "none"}), "gradient", "none"),
    ],
)
def test_errors(call: Any, requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^profile: expected .*{requirement}.*, got {got}"):
        call()
