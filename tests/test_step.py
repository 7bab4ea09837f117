# SPDX-License-Identifier: BSD-3-Clause
"""Tests that sdgp.profile and sdgp.advise, which run steps of the user's model, do not train it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sdgp

X = torch.arange(32.0).sin().view(4, 8)
MEASURES: dict[str, Callable[[nn.Module], object]] = {
    "profile": lambda model: sdgp.profile(model, X, rounds=1),
    "advise": lambda model: sdgp.advise(model, X, X.square(), rounds=1),
}
each_measure = pytest.mark.parametrize("measure", MEASURES)


def small(*modules: nn.Module) -> nn.Sequential:
    return sdgp.convert(nn.Sequential(*modules, nn.Linear(8, 8), nn.Linear(8, 8)), "2:4", backend="dense")


# Optimizers that step in the backward.


def after_accumulation(model: nn.Module) -> None:
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())


def of_torch(model: nn.Module) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})


def on_each_gradient(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient, parameter=parameter: parameter.data.sub_(gradient, alpha=0.1) and None)


@each_measure
@pytest.mark.parametrize("optimize", [after_accumulation, of_torch, on_each_gradient])
def test_an_optimizer_in_the_backward_is_refused(optimize: Callable[[nn.Module], None], measure: str) -> None:
    model = small()
    optimize(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=rf"^{measure}: expected .*backward.*, got hooks that"):
        MEASURES[measure](model)
    assert all(map(torch.equal, before, model.parameters()))


@each_measure
def test_an_unknown_optimizer_makes_no_second_step(measure: str) -> None:
    model = small()
    steps = []

    def loss(output: Tensor) -> Tensor:
        output.register_hook(lambda _: steps.append(model[0].bias.detach().add_(1)) and None)
        return output

    model.register_forward_hook(lambda module, args, output: loss(output))
    with pytest.raises(ValueError, match=rf"^{measure}: expected a backward that leaves .*, got one step"):
        MEASURES[measure](model)
    assert len(steps) == 1


# The state of the model.


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Averaging(nn.Module):
    """Averages its input as implementations with ``.data`` do, which autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.lerp_(x.mean(0), 0.5)
        return x - self.mean


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(8)


@each_measure
@pytest.mark.parametrize("make", [lambda: torch.ones(1, 8).expand(4, 8), made_in_inference_mode])
def test_buffers_that_nobody_may_write_to(make: Callable[[], Tensor], measure: str) -> None:
    model = small(Masked(make()), Averaging())
    MEASURES[measure](model)
    assert not model[1].mean.any()


@each_measure
@pytest.mark.parametrize("train", [True, False])
def test_between_forward_and_backward(train: bool, measure: str) -> None:
    model = small(nn.BatchNorm1d(8).train(train))
    output = model(torch.randn(4, 8, requires_grad=True))
    mean = model[0].running_mean.clone()
    MEASURES[measure](model)
    assert torch.equal(model[0].running_mean, mean)
    output.sum().backward()


def test_the_rest_is_restored_if_a_buffer_cannot_be() -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rest", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            self.rest.resize_(4)
            return x

    model = small(Averaging(), Shrinking(), Averaging())
    decisions = [layer.decision for layer in model[3:]]
    gradient = model[3].bias.grad = torch.ones(8)
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"):
        MEASURES["profile"](model)
    assert not model[0].mean.any()
    assert not model[2].mean.any()
    assert [layer.decision for layer in model[3:]] == decisions
    assert model[3].bias.grad is gradient
    assert torch.equal(torch.get_rng_state(), generator)


@each_measure
def test_a_sharded_model_is_refused(measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = fully_shard(small(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=rf"^{measure}: expected a model that is not sharded, got FSDPSequential"):
            MEASURES[measure](model)
    finally:
        dist.destroy_process_group()
