# SPDX-License-Identifier: BSD-3-Clause
"""Tests what a forward saves for its backward, and that nothing is computed which nobody asks for."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sdgp

BACKENDS = ("auto", "pruned", "dense", "sparse")


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Returns the bytes of distinct memory that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 1:  # not the mark, which is saved only for hooks
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    output.float().sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("calls", [1, 6])
@pytest.mark.parametrize("backend", [*BACKENDS, "paused"])
def test_saves_what_the_plain_layer_saves(backend: str, calls: int, frozen: bool, autocast: bool) -> None:
    def run(layer: nn.Module) -> int:
        def forward() -> Tensor:
            x = torch.randn(4, 256, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for _ in range(calls):
                    x = torch.tanh(layer(x))
            return x

        return saved_bytes(forward)

    plain = nn.Linear(256, 256).requires_grad_(not frozen)
    expected = run(plain)
    layer = sdgp.convert(copy.deepcopy(plain), backend="dense" if backend == "paused" else backend)
    if backend == "paused":
        layer.hold("paused", "paused")
    assert run(layer) == expected


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_layers_shared_by_albert_are_cast_once(backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=32,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    torch.manual_seed(0)
    plain, tokens = transformers.AlbertModel(config), torch.randint(0, 64, (1, 16))

    def run(model: nn.Module) -> int:
        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: Tensor = model(tokens).last_hidden_state
            return output

        return saved_bytes(forward)

    assert run(sdgp.convert(copy.deepcopy(plain), backend=backend)) == run(plain)


def test_casts_live_as_long_as_autocast_region() -> None:
    """A weight that changes without a new version must be cast again in the next autocast region."""
    layer = sdgp.Linear(8, 8, bias=False, backend="dense")
    x = torch.randn(4, 8, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    first = run()  # its graph keeps the cast
    layer.weight.data.mul_(2)
    torch.testing.assert_close(run(), 2 * first)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        layer.weight.data.mul_(2)
        torch.clear_autocast_cache()
        torch.testing.assert_close(layer(x), 2 * before)


def test_cast_under_autocast_leaves_the_plain_use_of_a_weight_its_gradient() -> None:
    layer = sdgp.Linear(8, 8, bias=False, method="magnitude", backend="dense")
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x) + nn.functional.linear(x.detach(), layer.weight)
    (both,) = torch.autograd.grad(output.sum(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        one = layer(x)
    torch.testing.assert_close(both, 2 * torch.autograd.grad(one.sum(), layer.weight)[0])


class Counted(TorchDispatchMode):
    """Counts calls of prune_nm: one for each data gradient of the dense product."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.sdgp.prune_nm.default
        return function(*args, **(kwargs or {}))


def test_data_gradients_that_nobody_asks_for_are_not_computed() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    sdgp.convert(model, "2:4", "magnitude", backend="dense")
    x = torch.randn(4, 16, requires_grad=True)

    def count(inputs: Any, backward: bool = False) -> int:
        loss = model(x).square().sum()
        with Counted() as counted:
            if backward:
                loss.backward(inputs=inputs)
            else:
                torch.autograd.grad(loss, inputs)
        return counted.count

    assert count([model[2].weight]) == 0
    assert count([model[1].weight]) == 1
    assert count([model[0].bias]) == 2
    assert count([x]) == 3
    assert count([model[2].weight, model[2].bias], backward=True) == 0
    assert count([x, *model.parameters()], backward=True) == 3


def test_gradients_of_a_subset_are_those_of_all() -> None:
    layer = sdgp.Linear(16, 16, method="magnitude", backend="dense")
    x = torch.randn(4, 16, requires_grad=True)
    tensors = (x, layer.weight, layer.bias)
    together = torch.autograd.grad(layer(x).square().sum(), tensors)
    for tensor, expected in zip(tensors, together, strict=True):
        assert torch.equal(torch.autograd.grad(layer(x).square().sum(), tensor)[0], expected)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_released_weight_is_not_kept_alive(backend: str) -> None:
    """A layer must not keep a released weight alive: ZeRO replaces a Parameter's data after the forward to free it."""
    layer = sdgp.Linear(16, 32, method="magnitude", backend=backend)
    full = layer.weight.detach().clone()
    gathered = full.numpy().copy()
    alive = weakref.ref(gathered)
    layer.weight.data = torch.from_numpy(gathered)
    del gathered
    x = torch.randn(2, 4, 16, requires_grad=True)
    output = layer(x)
    layer.weight.data = torch.empty(0)
    gc.collect()
    assert alive() is None
    layer.weight.data = full
    output.sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.detach().sum((0, 1)).expand(32, 16))


def flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 32), ("1:4", 16), ("4:32", 8), ("4:10", 28)])
def test_flops_of_the_sparse_product(pattern: str, kept: int) -> None:
    x = torch.randn(8, 16, requires_grad=True)
    linear = sdgp.Linear(16, 64, pattern=pattern, method="magnitude", backend="sparse")
    plain = 2 * 8 * 16 * 64
    assert flops(lambda: linear(x)) == 2 * plain + 2 * 8 * 16 * kept
    assert flops(lambda: nn.functional.linear(x, linear.weight)) == 3 * plain
    images = torch.randn(2, 16, 5, 5, requires_grad=True)
    conv = sdgp.Conv2d(16, 64, 3, pattern=pattern, method="magnitude", backend="sparse")
    plain = 2 * 2 * 9 * 16 * 64 * 9
    assert flops(lambda: conv(images)) == 2 * plain + plain * kept // 64
    assert flops(lambda: sdgp.prune_nm(x, 2, 4)) == 0


def test_flops_of_compressed_products() -> None:
    values, indices = sdgp.compress_nm(torch.randn(8, 16), 1, 4)
    with FlopCounterMode(display=False) as counter:
        sdgp.spmm_nm(values, indices, 4, torch.randn(16, 32))
        sdgp.decompress_nm(values, indices, 4, 16)
    assert counter.get_total_flops() == 2 * 8 * 4 * 32
