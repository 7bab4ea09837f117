# SPDX-License-Identifier: BSD-3-Clause
"""Tests what users wrap around layers.

The cases are torch.func, batched gradients, forward mode, in-place operators and torch.fx.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sdgp

BACKENDS = ("auto", "pruned", "dense", "sparse")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(32, 4)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"mlp": (mlp, (6, 8)), "cnn": (cnn, (6, 2, 6, 6))}

nets = pytest.mark.parametrize("net", NETS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(net: str, backend: str | None, method: str = "magnitude", pattern: str = "2:4") -> tuple[nn.Module, Tensor]:
    module, shape = NETS[net][0](), NETS[net][1]
    if backend is not None:
        sdgp.convert(module, pattern, method, backend=backend)
    return module, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().mean()


def eager(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of the loss by autograd."""
    values = parameters(model)
    found = torch.autograd.grad(loss_of(model)(values, x), list(values.values()))
    return dict(zip(values, found, strict=True))


@nets
@backends
@pytest.mark.parametrize("method", ["magnitude", "rescale", "rescale_group"])
def test_func_grad_and_vjp(net: str, backend: str, method: str) -> None:
    model, x = make(net, backend, method)
    expected = eager(model, x)
    torch.testing.assert_close(grad(loss_of(model))(parameters(model), x), expected)
    _, pull = vjp(lambda values: loss_of(model)(values, x), parameters(model))
    torch.testing.assert_close(pull(torch.tensor(1.0))[0], expected)


@nets
@backends
@pytest.mark.parametrize("method", ["magnitude", "rescale"])
def test_per_sample_gradients(net: str, backend: str, method: str) -> None:
    model, x = make(net, backend, method)
    per_sample = vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters(model), x.unsqueeze(1))
    for index, sample in enumerate(x.unsqueeze(1)):
        found = {name: value[index] for name, value in per_sample.items()}
        torch.testing.assert_close(found, eager(model, sample), msg=f"sample {index}")


@backends
def test_per_sample_gradients_of_a_method_that_draws(backend: str) -> None:
    model, x = make("mlp", backend, "mvue")
    per_sample = vmap(grad(loss_of(model)), in_dims=(None, 0), randomness="different")
    found = per_sample(parameters(model), x.unsqueeze(1))
    assert all(torch.isfinite(value).all() for value in found.values())
    torch.testing.assert_close(found["4.weight"].mean(0), eager(model, x)["4.weight"])  # depends on no data gradient
    if backend != "auto":
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters(model), x.unsqueeze(1))


def rows_of_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = model(x)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in output.flatten()]
    return torch.stack(rows).view(*output.shape, *x.shape)


@nets
@backends
def test_jacobians(net: str, backend: str) -> None:
    model, x = make(net, backend)
    expected = rows_of_jacobian(model, x)
    torch.testing.assert_close(jacrev(model)(x), expected)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(model, x, vectorize=vectorize)
        torch.testing.assert_close(found, expected)


@nets
@backends
@pytest.mark.parametrize("frozen", [False, True])
def test_ensembles(net: str, backend: str, frozen: bool) -> None:
    """vmap over the weights of several models."""
    model, x = make(net, backend)
    members = {name: torch.stack([value, value.flip(0)]) for name, value in parameters(model).items()}
    dy = torch.randn(2, *model(x).shape)

    def gradients(run: Callable[[dict[str, Tensor], Tensor], Tensor]) -> list[Tensor]:
        input = x.clone().requires_grad_()
        weights = {name: value.detach().clone().requires_grad_(not frozen) for name, value in members.items()}
        return list(torch.autograd.grad(run(weights, input), [input, *(() if frozen else weights.values())], dy))

    def at_once(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        output: Tensor = vmap(lambda member: functional_call(model, member, (input,)))(weights)
        return output

    def in_turn(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        of_each = [{name: value[i] for name, value in weights.items()} for i in range(2)]
        return torch.stack([functional_call(model, member, (input,)) for member in of_each])

    for found, expected in zip(gradients(at_once), gradients(in_turn), strict=True):
        torch.testing.assert_close(found, expected)


@backends
def test_vmap_inside_of_what_differentiates(backend: str) -> None:
    """Within vmap a tensor does not say that it needs a gradient outside of it."""
    layer = sdgp.convert(nn.Linear(16, 16), "2:4", "magnitude", backend=backend, weight_grad=("2:4", "magnitude"))
    xs, dy = torch.randn(2, 5, 8, 16)
    x = xs.clone().requires_grad_()
    expected = [torch.autograd.grad(layer(one), (one, layer.weight), d) for one, d in zip(x.unbind(), dy, strict=True)]
    data, weight = torch.stack([data for data, _ in expected]), sum(weight for _, weight in expected)
    found = torch.autograd.grad(vmap(layer)(x), (x, layer.weight), dy)
    torch.testing.assert_close(found, (data, weight))
    torch.testing.assert_close(grad(lambda x: (vmap(layer)(x) * dy).sum())(xs), data)


@nets
@backends
def test_batched_gradients(net: str, backend: str) -> None:
    model, x = make(net, backend)
    x.requires_grad_()
    output, directions = model(x), torch.randn(5, 6, 4)
    batched = torch.autograd.grad(output, x, directions, is_grads_batched=True, retain_graph=True)[0]
    single = [torch.autograd.grad(output, x, direction, retain_graph=True)[0] for direction in directions]
    torch.testing.assert_close(batched, torch.stack(single))


@nets
@backends
def test_forward_mode_is_exact(net: str, backend: str) -> None:
    model, x = make(net, backend)
    plain, _ = make(net, None)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(jvp(model, (x,), (tangent,)), jvp(plain, (x,), (tangent,)))
    torch.testing.assert_close(jacfwd(model)(x), jacfwd(plain)(x))
    values, tangents = parameters(plain), {name: torch.ones_like(value) for name, value in parameters(plain).items()}
    expected = jvp(lambda values: loss_of(plain)(values, x), (values,), (tangents,))
    torch.testing.assert_close(jvp(lambda values: loss_of(model)(values, x), (values,), (tangents,)), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        found = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(found, jvp(plain, (x,), (tangent,))[1])


@nets
@backends
def test_second_derivatives(net: str, backend: str) -> None:
    """Second derivatives must be the plain model's under auto. Differentiating a pruned gradient must be an error."""
    model, x = make(net, backend)
    plain, _ = make(net, None)

    def penalty(model: nn.Module) -> Tensor:
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), inputs)
        return second

    ways: list[Callable[[nn.Module], Any]] = [
        lambda model: hessian(lambda x: model(x).square().sum())(x[:1]),
        lambda model: jacrev(jacrev(lambda x: model(x).square().sum()))(x[:1]),
        lambda model: grad(lambda x: grad(lambda x: model(x).square().sum())(x).square().sum())(x),
        penalty,
    ]
    for way in ways:
        if backend == "auto":
            torch.testing.assert_close(way(model), way(plain))
        else:
            with pytest.raises(RuntimeError, match=r"expected one differentiation.* use sdgp.paused"):
                way(model)
    with sdgp.paused(model):
        torch.testing.assert_close(penalty(model), penalty(plain))


@backends
def test_gradients_of_forward_derivatives_are_pruned_once(backend: str) -> None:
    """The forward derivative of Σ (W x)² along v is Σ 2 W x · W v. Its backward must prune 2 W v, and nothing else."""
    weight, x = torch.randn(8, 6), torch.randn(6)

    def call(x: Tensor) -> Tensor:
        return sdgp.linear(x, weight, pattern="2:4", method="magnitude", backend=backend).square().sum()

    def prune(gradient: Tensor) -> Tensor:
        return gradient if backend == "auto" else sdgp.prune_nm(gradient, 2, 4)

    v = torch.randn(6)
    along_v = grad(lambda x: jvp(call, (x,), (v,))[1])(x)
    torch.testing.assert_close(along_v, prune(2 * weight @ v) @ weight)
    torch.testing.assert_close(jacrev(jacfwd(call))(x), prune(2 * weight.t()) @ weight)  # row i: v = unit vector i


def test_weight_gradients_may_be_differentiated_again() -> None:
    """Weight gradients are exact, so they may be differentiated again. Only a pruned data gradient refuses."""
    layer = sdgp.Linear(8, 8, pattern="2:4", method="magnitude", backend="pruned")
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), layer.bias)
    torch.testing.assert_close(second, 2 * x.detach().sum() * torch.ones(8))


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda y: y.add_(1),
    "relu_": torch.relu_,
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 0),
    "set": lambda y: y.__setitem__((..., 0), 0.0),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.Linear(16, 32), (16,)),
    "2-D": (lambda: nn.Linear(16, 32), (8, 16)),
    "3-D": (lambda: nn.Linear(16, 32), (2, 8, 16)),
    "3-D, no bias": (lambda: nn.Linear(16, 32, bias=False), (2, 8, 16)),
    "4-D": (lambda: nn.Linear(16, 32), (2, 2, 8, 16)),
    "conv": (lambda: nn.Conv2d(8, 16, 3), (2, 8, 6, 6)),
    "unbatched conv": (lambda: nn.Conv2d(8, 16, 3), (8, 6, 6)),
}


@pytest.mark.parametrize("operator", IN_PLACE)
@pytest.mark.parametrize("layer", LAYERS)
@backends
def test_outputs_may_be_modified_in_place(layer: str, operator: str, backend: str) -> None:
    torch.manual_seed(0)
    plain, x = LAYERS[layer][0](), torch.randn(LAYERS[layer][1])
    converted = sdgp.convert(copy.deepcopy(plain), "4:4", backend=backend)  # n == m: the same gradients

    def run(layer: nn.Module) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        IN_PLACE[operator](output)
        return list(torch.autograd.grad(output.square().sum(), (inputs, *layer.parameters())))

    torch.testing.assert_close(run(converted), run(plain))


@backends
def test_symbolic_trace_keeps_the_layers(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8))
    plain = [str(node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]
    sdgp.convert(model, "2:4", "magnitude", backend=backend)
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes] == plain
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    expected, found = (torch.autograd.grad(module(x).square().sum(), x) for module in (model, traced))
    assert torch.equal(*expected, *found)


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Conv2d(8, 8, 3)])
def test_symbolic_trace_of_a_layer_itself(module: nn.Module) -> None:
    traced = torch.fx.symbolic_trace(sdgp.convert(copy.deepcopy(module), backend="pruned"))
    x = torch.randn(2, 8) if isinstance(module, nn.Linear) else torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize("function", [sdgp.linear, sdgp.conv2d])
def test_symbolic_trace_of_a_function(function: Callable[..., Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight, pattern="2:4", method="magnitude", backend="dense")

    traced = torch.fx.symbolic_trace(Model())
    assert function in {node.target for node in traced.graph.nodes}


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_feature_extraction(backend: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = create_feature_extractor(model, {"layer2": "out"})(x)["out"]
    features = create_feature_extractor(sdgp.convert(model, "2:4", backend=backend), {"layer2": "out"})
    torch.testing.assert_close(features(x)["out"], expected)
    assert any(isinstance(module, sdgp.Conv2d) for module in features.modules())


def test_ops_refuse_tangents() -> None:
    """PyTorch would take the derivative of an op without a rule as zero."""
    x = torch.randn(4, 8)
    values, indices = sdgp.compress_nm(x, 2, 4)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "prune_nm": lambda x: sdgp.prune_nm(x, 2, 4),
        "compress_nm": lambda x: sdgp.compress_nm(x, 2, 4)[0],
        "decompress_nm": lambda x: sdgp.decompress_nm(x[:, :4], indices, 4, 8),
        "spmm_nm": lambda x: sdgp.spmm_nm(values, indices, 4, x.t()[:, :3].contiguous()),
    }
    for op, call in calls.items():
        message = f"{op}: expected no forward-mode differentiation .*, got a tangent"
        with pytest.raises(RuntimeError, match=message):
            jvp(call, (x,), (torch.ones_like(x),))
        with pytest.raises(RuntimeError, match=message):
            jacfwd(call)(x)
    with torch.autograd.forward_ad.dual_level():
        assert sdgp.prune_nm(x, 2, 4).shape == x.shape  # x has no tangent


@pytest.mark.parametrize("at", [0, 1])
def test_vmap_over_no_samples(at: int) -> None:
    samples = torch.randn(4, 0, 8).movedim(1, at)
    assert torch.vmap(lambda x: sdgp.prune_nm(x, 2, 4), in_dims=at)(samples).shape == (0, 4, 8)


def test_ops_refuse_tangents_around_vmap() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="prune_nm: expected no forward-mode differentiation"):
        jvp(vmap(lambda x: sdgp.prune_nm(x, 2, 4)), (x,), (torch.ones_like(x),))
