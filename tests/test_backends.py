# SPDX-License-Identifier: BSD-3-Clause
"""Which product a data gradient takes: the sparse one equals the dense one, auto and pruned choose as they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import METHODS
from torch import Tensor, nn

import sdgp
from sdgp import backends
from sdgp.backends import Choice
from sdgp.pattern import Pruning

CPU = torch.device("cpu")

# The sparse product is the dense one of the same draws, to rounding.


def of_each(call: Callable[[str], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients by the dense and by the sparse product, drawn alike; and both leave the generator alike."""
    results, states = [], []
    for backend in ("dense", "sparse"):
        torch.manual_seed(3)
        results.append(call(backend))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return results[0], results[1]


def near(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(0, 6), max_size=3),
    features=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    m=st.integers(1, 64),
    method=st.sampled_from(METHODS),
    bias=st.booleans(),
    data=st.data(),
)
def test_linear(
    leading: list[int], features: tuple[int, int], m: int, method: str, bias: bool, data: st.DataObject
) -> None:
    pattern = (data.draw(st.integers(1, m)), m)
    x = torch.randn(*leading, features[0], requires_grad=True)
    weight = torch.randn(features[1], features[0], requires_grad=True)
    b = torch.randn(features[1], requires_grad=True) if bias else None
    grad_output = torch.randn(*leading, features[1])

    def call(backend: str) -> list[Tensor]:
        return gradients(sdgp.linear(x, weight, b, pattern=pattern, method=method, backend=backend), grad_output, x)

    (dense,), (sparse,) = of_each(call)
    near(sparse, dense)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@settings(max_examples=100)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.just("same"),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 4), st.integers(1, 10)),
    samples=st.integers(0, 3),  # 0: unbatched
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    channels_last=st.booleans(),
    bias=st.booleans(),
    m=st.sampled_from([1, 2, 3, 4, 8]),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_conv2d(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    per_group: tuple[int, int],
    samples: int,
    size: tuple[int, int],
    channels_last: bool,
    bias: bool,
    m: int,
    method: str,
    data: st.DataObject,
) -> None:
    pattern = (data.draw(st.integers(1, m)), m)
    stride = (1, 1) if padding == "same" else stride
    channels_in, out = groups * per_group[0], groups * per_group[1]
    x = torch.randn(max(samples, 1), channels_in, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = (x if samples else x[0]).requires_grad_()
    weight = torch.randn(out, per_group[0], *kernel, requires_grad=True)
    b = torch.randn(out, requires_grad=True) if bias else None
    geometry: Any = (stride, padding, dilation, groups)
    grad_output = torch.randn_like(sdgp.conv2d(x, weight, b, *geometry))

    def call(backend: str) -> list[Tensor]:
        output = sdgp.conv2d(x, weight, b, *geometry, pattern=pattern, method=method, backend=backend)
        return gradients(output, grad_output, x)

    (dense,), (sparse,) = of_each(call)
    near(sparse, dense)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_keeps_the_memory_format(
    input_format: torch.memory_format,
    weight_format: torch.memory_format,
    grad_format: torch.memory_format,
    kernel: int,
    groups: int,
    frozen: bool,
) -> None:
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=input_format).requires_grad_()
    weight = torch.randn(12, 8 // groups, kernel, kernel).contiguous(memory_format=weight_format)
    weight.requires_grad_(not frozen)
    grad_output = torch.randn(2, 12, 9, 9).contiguous(memory_format=grad_format)

    def call(backend: str) -> list[Tensor]:
        output = sdgp.conv2d(x, weight, None, 1, kernel // 2, 1, groups, backend=backend)
        return gradients(output, grad_output, x)

    (dense,), (sparse,) = of_each(call)
    near(sparse, dense)
    assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("method", METHODS)
def test_expanded_and_strided_gradients(method: str) -> None:
    x, weight = torch.randn(6, 12, requires_grad=True), torch.randn(16, 12)
    for grad_output in (torch.randn(1, 16).expand(6, 16), torch.randn(16, 6).t(), torch.ones(()).expand(6, 16)):

        def call(backend: str, grad_output: Tensor = grad_output) -> list[Tensor]:
            return gradients(sdgp.linear(x, weight, method=method, backend=backend), grad_output, x)

        (dense,), (sparse,) = of_each(call)
        near(sparse, dense)


@pytest.mark.parametrize("layer", [nn.Linear(16, 12), nn.Conv2d(16, 12, 3, padding=1)], ids=["linear", "conv2d"])
def test_a_frozen_layer_saves_and_adds_nothing(layer: nn.Module) -> None:
    frozen = sdgp.convert(layer, method="magnitude", backend="sparse").requires_grad_(False)
    x = torch.randn(2, 16, 5, 16 if isinstance(layer, nn.Linear) else 5, requires_grad=True)
    output = frozen(x)
    assert sum(tensor is not None for tensor in output.grad_fn.saved_tensors) == 1  # the weight
    output.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in frozen.parameters())


# What auto and pruned choose.


class Measured:
    """Stands in for backends.measure: answers as told and counts."""

    def __init__(self, sparse: bool) -> None:
        self.sparse = sparse
        self.keys: list[Any] = []

    def __call__(self, products: backends.Products, pruning: Pruning, rounds: int = 5) -> Choice:
        self.keys.append(products.key)
        return Choice(self.sparse, 2.0 if self.sparse else 1.0, 1.0 if self.sparse else 2.0)


@pytest.fixture
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Measured:
    stand_in = Measured(request.param)
    monkeypatch.setattr(backends, "measure", stand_in)
    monkeypatch.setattr(backends, "_choices", {})
    return stand_in


sparse_wins = pytest.mark.parametrize("measured", [True], indirect=True)
dense_wins = pytest.mark.parametrize("measured", [False], indirect=True)
either_wins = pytest.mark.parametrize("measured", [True, False], indirect=True, ids=["sparse wins", "dense wins"])


def large(backend: str, method: str = "magnitude") -> tuple[nn.Module, Tensor, Tensor]:
    """A layer at the size from which products are measured, its input and its output's gradient."""
    layer = sdgp.Linear(256, 256, bias=False, pattern="1:4", method=method, backend=backend)
    assert backends.LEAST_WORK == 256 * 256 * 256
    return layer, torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)


def data_gradient(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Tensor:
    return gradients(layer(x), grad_output, x)[0]


@dense_wins
def test_auto_is_exact_where_dense_wins(measured: Measured) -> None:
    layer, x, grad_output = large("auto")
    for _ in range(3):
        assert torch.equal(data_gradient(layer, x, grad_output), grad_output @ layer.weight)
    assert len(measured.keys) == 1
    # From then on the forward is the plain operator: nothing of sdgp is in the graph.
    assert "_Linear" not in layer(x).grad_fn.name()
    assert sdgp.report(layer)[0].note == "exact: dense 1.00 ms, sparse 2.00 ms"


@dense_wins
def test_pruned_prunes_where_dense_wins(measured: Measured) -> None:
    layer, x, grad_output = large("pruned")
    for _ in range(3):
        expected = sdgp.prune_nm(grad_output, 1, 4) @ layer.weight
        assert torch.equal(data_gradient(layer, x, grad_output), expected)
    assert len(measured.keys) == 1
    assert sdgp.report(layer)[0].note == "pruned, dense product: dense 1.00 ms, sparse 2.00 ms"


@sparse_wins
@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_sparse_is_taken_where_it_wins(measured: Measured, backend: str) -> None:
    layer, x, grad_output = large(backend)
    values, indices = sdgp.compress_nm(grad_output, 1, 4)
    for _ in range(3):
        assert torch.equal(data_gradient(layer, x, grad_output), sdgp.spmm_nm(values, indices, 4, layer.weight))
    assert len(measured.keys) == 1
    assert sdgp.report(layer)[0].note == "pruned, sparse product: dense 2.00 ms, sparse 1.00 ms"


@either_wins
def test_conv2d_chooses_too(measured: Measured) -> None:
    layer = sdgp.Conv2d(64, 64, 3, padding=1, method="magnitude")
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    grad_output = torch.randn(2, 64, 16, 16)
    actual = data_gradient(layer, x, grad_output)
    kept = sdgp.prune_nm(grad_output, 2, 4, 1) if measured.sparse else grad_output
    near(actual, data_gradient(layer.to_dense(), x, kept))
    assert len(measured.keys) == 1
    assert sdgp.report(layer)[0].note.startswith("pruned, sparse product: " if measured.sparse else "exact: ")


@either_wins
def test_unbatched_conv2d_keeps_its_shape(measured: Measured) -> None:
    layer = sdgp.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(64, 32, 32, requires_grad=True)
    for _ in range(2):
        assert layer(x).shape == (64, 32, 32)
        assert data_gradient(layer, x, torch.randn(64, 32, 32)).shape == x.shape
    assert len(measured.keys) == 1


@sparse_wins
def test_one_measurement_for_each_key(measured: Measured) -> None:
    layer, x, grad_output = large("auto")
    twin, _, _ = large("auto")
    for each in (layer, twin):  # equal settings and shapes share a choice
        data_gradient(each, x, grad_output)
    assert len(measured.keys) == 1
    for other in (large("pruned")[0], large("auto", "mvue")[0]):
        data_gradient(other, x, grad_output)
    assert len(measured.keys) == 3
    for rows in (257, 512, 400):  # up to a power of two, they are one
        data_gradient(layer, torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 256))
    assert len(measured.keys) == 4
    data_gradient(layer.double(), x.detach().double().requires_grad_(), grad_output.double())
    assert len(measured.keys) == 5
    assert len(set(measured.keys)) == 5


@sparse_wins
@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_is_part_of_the_key(measured: Measured) -> None:
    layer, x, grad_output = large("auto")
    data_gradient(layer, x, grad_output)
    torch.set_num_threads(1)
    data_gradient(layer, x, grad_output)
    assert len(set(measured.keys)) == len(measured.keys) == 2


@sparse_wins
@pytest.mark.parametrize("layer", [sdgp.Linear(256, 256), sdgp.Conv2d(16, 16, 3)], ids=["linear", "conv2d"])
def test_a_small_product_is_never_measured(measured: Measured, layer: nn.Module) -> None:
    x = torch.randn((255, 256) if isinstance(layer, sdgp.Linear) else (2, 16, 8, 8), requires_grad=True)
    grad_output = torch.randn_like(layer(x))
    exact = data_gradient(layer.to_dense(), x, grad_output)
    assert torch.equal(data_gradient(layer, x, grad_output), exact)
    sdgp.convert(layer, method="magnitude", backend="pruned")
    dim = -1 if isinstance(layer, sdgp.Linear) else 1
    expected = data_gradient(layer.to_dense(), x, sdgp.prune_nm(grad_output, 2, 4, dim))
    assert torch.equal(data_gradient(layer, x, grad_output), expected)
    assert sdgp.report(layer)[0].note == "pruned, dense product"
    assert measured.keys == []


@either_wins
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_forced_product_is_never_measured(measured: Measured, backend: str) -> None:
    data_gradient(*large(backend))
    assert measured.keys == []


@sparse_wins
@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_a_device_without_a_sparse_product(measured: Measured, backend: str) -> None:
    layer, x, grad_output = large(backend)
    x = x.detach().to("meta").requires_grad_()
    assert data_gradient(layer.to("meta"), x, grad_output.to("meta")).is_meta
    assert measured.keys == []


@sparse_wins
def test_paused_measures_nothing_and_keeps_the_choice(measured: Measured) -> None:
    layer, x, grad_output = large("auto")
    exact = grad_output @ layer.weight
    with sdgp.paused(layer):
        assert torch.equal(data_gradient(layer, x, grad_output), exact)
    assert measured.keys == []
    assert not torch.equal(data_gradient(layer, x, grad_output), exact)
    with sdgp.paused(layer):
        assert torch.equal(data_gradient(layer, x, grad_output), exact)
        assert sdgp.report(layer)[0].note == "exact: paused"
    assert not torch.equal(data_gradient(layer, x, grad_output), exact)
    assert len(measured.keys) == 1


@either_wins
@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_nothing_is_measured_under_compile(measured: Measured, backend: str) -> None:
    torch._dynamo.reset()
    layer, x, grad_output = large(backend)
    compiled = torch.compile(layer, fullgraph=True)
    pruned = sdgp.prune_nm(grad_output, 1, 4) if backend == "pruned" else grad_output
    near(data_gradient(compiled, x, grad_output), pruned @ layer.weight)
    assert measured.keys == []
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("method", METHODS)
def test_measuring_leaves_the_generator_to_the_layer(
    backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_choices", {})
    layer, x, grad_output = large(backend, method)
    torch.manual_seed(3)
    first = data_gradient(layer, x, grad_output)  # measures
    after_first = torch.get_rng_state()
    torch.manual_seed(3)
    second = data_gradient(layer, x, grad_output)
    assert torch.equal(torch.get_rng_state(), after_first)
    assert torch.equal(first, second)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (choice,) = backends._choices.values()
    drawn = method in ("random", "mvue") and (backend == "pruned" or choice.sparse)
    assert torch.equal(before, after_first) == (not drawn)


def test_measuring_times_both_products() -> None:
    calls: list[str] = []

    def product(name: str) -> Callable[..., Tensor]:
        return lambda *_: (calls.append(name), torch.empty(0))[1]

    products = backends.Products(
        (), CPU, lambda: None, dense=product("dense"), pruned=product("pruned"), sparse=product("sparse")
    )
    for backend, opponent in (("auto", "dense"), ("pruned", "pruned")):
        calls.clear()
        choice = backends.measure(products, Pruning.parse("linear", "2:4", "mvue", backend), rounds=3)
        assert calls == [opponent, "sparse"] * 4  # in turn, the first round for warming up
        assert choice.dense_ms > 0
        assert choice.sparse_ms > 0


@pytest.mark.parametrize(
    ("backend", "dense_ms", "sparse_ms", "sparse"),
    [
        ("pruned", 1.0, 0.9, True),
        ("pruned", 1.0, 0.97, False),  # noise
        ("auto", 10.0, 9.0, True),
        ("auto", 10.0, 9.7, False),
        ("auto", 0.5, 0.4, False),  # less than the calls of a layer that may prune
        ("auto", 0.5, 0.3, True),
    ],
)
def test_by_how_much_sparse_must_win(
    backend: str, dense_ms: float, sparse_ms: float, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(backends.time, "perf_counter", lambda: clock[0])

    def product(milliseconds: float) -> Callable[..., Tensor]:
        def call(*_: object) -> Tensor:
            clock[0] += milliseconds / 1e3
            return torch.empty(0)

        return call

    opponent = product(dense_ms)
    products = backends.Products((), CPU, lambda: None, dense=opponent, pruned=opponent, sparse=product(sparse_ms))
    choice = backends.measure(products, Pruning.parse("linear", "2:4", "mvue", backend))
    assert choice.sparse == sparse
    assert choice.dense_ms == pytest.approx(dense_ms)
    assert choice.sparse_ms == pytest.approx(sparse_ms)


@sparse_wins
def test_an_evaluation_keeps_what_the_report_says(measured: Measured) -> None:
    layer, x, grad_output = large("auto")
    data_gradient(layer, x, grad_output)
    before = sdgp.report(layer)[0].note
    with torch.no_grad():
        layer(x)
    assert sdgp.report(layer)[0].note == before
    assert before.startswith("pruned, sparse product: ")
