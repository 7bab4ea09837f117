# SPDX-License-Identifier: BSD-3-Clause
"""Tests which product a data gradient takes.

auto and pruned must choose correctly, and a run that resumes from a checkpoint must take the same products.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
from typing import Any

import pytest
import torch
from compare import Timer, close, gradients
from samples import METHODS
from torch import Tensor, nn

import sdgp
from sdgp._choose import current_chooser
from sdgp._pattern import METHODS_THAT_DRAW
from sdgp._rules import LEAST_WORK

# The choices of auto and pruned.


def chooser(sparse_wins: bool, **settings: Any) -> tuple[sdgp.Chooser, Timer]:
    timer = Timer(1.0, 2.0) if sparse_wins else Timer(2.0, 1.0)
    return sdgp.Chooser(timer=timer, rounds=1, **settings), timer


either_wins = pytest.mark.parametrize("sparse_wins", [True, False], ids=["sparse wins", "the other wins"])


def large(backend: str, method: str = "magnitude") -> tuple[nn.Module, Tensor, Tensor]:
    """Makes a layer of the smallest size that is measured, its input and its output's gradient."""
    layer = sdgp.Linear(256, 256, bias=False, pattern="1:4", method=method, backend=backend)
    assert LEAST_WORK == 256 * 256 * 256
    return layer, torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)


def data_gradient(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Tensor:
    return gradients(layer(x), grad_output, x)[0]


def outcome(layer: nn.Module) -> tuple[str, float | None]:
    (row,) = sdgp.report(layer)
    return row.product, row.ms


def test_auto_is_exact_where_dense_wins() -> None:
    layer, x, grad_output = large("auto")
    measuring, timer = chooser(sparse_wins=False)
    with measuring:
        for _ in range(3):
            assert torch.equal(data_gradient(layer, x, grad_output), grad_output @ layer.weight)
    assert (len(measuring), timer.count) == (1, 2)
    assert outcome(layer) == ("exact", 1.0)
    why = sdgp.report(layer)[0].why
    assert "sparse is not faster" in why
    assert "2.00 ms against 1.00 ms" in why
    assert layer.decision == sdgp.Decision("exact", why, exact_ms=1.0, sparse_ms=2.0)


def test_pruned_prunes_where_dense_wins() -> None:
    layer, x, grad_output = large("pruned")
    measuring, timer = chooser(sparse_wins=False)
    with measuring:
        for _ in range(3):
            expected = sdgp.prune_nm(grad_output, 1, 4) @ layer.weight
            assert torch.equal(data_gradient(layer, x, grad_output), expected)
    assert (len(measuring), timer.count) == (1, 2)
    assert outcome(layer) == ("dense", 1.0)


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_sparse_is_taken_where_it_wins(backend: str) -> None:
    layer, x, grad_output = large(backend)
    values, indices = sdgp.compress_nm(grad_output, 1, 4)
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        for _ in range(3):
            assert torch.equal(data_gradient(layer, x, grad_output), sdgp.spmm_nm(values, indices, 4, layer.weight))
    assert (len(measuring), timer.count) == (1, 2)
    assert outcome(layer) == ("sparse", 1.0)
    other = {"auto": "exact", "pruned": "dense"}[backend]
    assert f"faster than {other}: 1.00 ms against 2.00 ms" in sdgp.report(layer)[0].why


@either_wins
def test_what_a_checkpointed_forward_records_does_not_depend_on_what_was_found(sparse_wins: bool) -> None:
    """A checkpointed forward must save the same tensors before and after a measurement and during a pause."""
    layer, x, grad_output = large("auto")

    def record() -> tuple[str, list[tuple[int, ...]]]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            output = layer(x)
        return output.grad_fn.name(), [tuple(tensor.shape) for tensor in output.grad_fn.saved_tensors]

    with chooser(sparse_wins)[0]:
        before = record()
        data_gradient(layer, x, grad_output)
        assert record() == before
        with sdgp.paused(layer):
            assert record() == before


def test_an_exact_layer_that_nothing_repeats_is_the_plain_one() -> None:
    layer, x, grad_output = large("auto")
    plain = layer.to_plain()(x).grad_fn.name()
    with chooser(sparse_wins=False)[0]:
        assert layer(x).grad_fn.name() != plain  # nothing is measured yet
        data_gradient(layer, x, grad_output)
        assert layer(x).grad_fn.name() == plain
        assert outcome(layer) == ("exact", 1.0)
    sdgp.convert(layer, backend="pruned")
    with sdgp.paused(layer):
        assert layer(x).grad_fn.name() == plain
    assert layer(x).grad_fn.name() != plain


@either_wins
def test_conv2d_chooses_too(sparse_wins: bool) -> None:
    layer = sdgp.Conv2d(64, 64, 3, padding=1, method="magnitude")
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    grad_output = torch.randn(2, 64, 16, 16)
    measuring, _ = chooser(sparse_wins)
    with measuring:
        actual = data_gradient(layer, x, grad_output)
    kept = sdgp.prune_nm(grad_output, 2, 4, 1) if sparse_wins else grad_output
    close(actual, data_gradient(layer.to_plain(), x, kept))
    assert len(measuring) == 1
    assert outcome(layer)[0] == ("sparse" if sparse_wins else "exact")


@either_wins
def test_unbatched_conv2d_keeps_its_shape(sparse_wins: bool) -> None:
    layer = sdgp.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(64, 32, 32, requires_grad=True)
    measuring, _ = chooser(sparse_wins)
    with measuring:
        for _ in range(2):
            assert layer(x).shape == (64, 32, 32)
            assert data_gradient(layer, x, torch.randn(64, 32, 32)).shape == x.shape
    assert len(measuring) == 1


def test_one_measurement_for_each_site() -> None:
    layer, x, grad_output = large("auto")
    twin, _, _ = large("auto")
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        for each in (layer, twin):  # equal settings and shapes share a choice
            data_gradient(each, x, grad_output)
        assert len(measuring) == 1
        for other in (large("pruned")[0], large("auto", "mvue")[0]):
            data_gradient(other, x, grad_output)
        assert len(measuring) == 3
        for rows in (257, 512, 400):  # these round up to the same power of two
            data_gradient(layer, torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 256))
        assert len(measuring) == 4
        data_gradient(layer.double(), x.detach().double().requires_grad_(), grad_output.double())
        assert len(measuring) == 5
    assert timer.count == 2 * 5


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_is_part_of_the_site() -> None:
    layer, x, grad_output = large("auto")
    measuring, _ = chooser(sparse_wins=True)
    with measuring:
        data_gradient(layer, x, grad_output)
        torch.set_num_threads(1)
        data_gradient(layer, x, grad_output)
    assert len(measuring) == 2


def test_the_layout_of_a_weight_and_of_an_image_are_part_of_the_site() -> None:
    measuring, _ = chooser(sparse_wins=True)
    layer = sdgp.Conv2d(64, 64, 3, padding=1)
    x, grad_output = torch.randn(2, 64, 16, 16), torch.randn(2, 64, 16, 16)
    with measuring:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            laid_out = x.contiguous(memory_format=memory_format).requires_grad_()
            data_gradient(layer, laid_out, grad_output.contiguous(memory_format=memory_format))
        weight = torch.randn(256, 256)
        for each in (weight, weight.t()):
            rows = torch.randn(256, 256, requires_grad=True)
            gradients(sdgp.linear(rows, each), torch.randn(256, 256), rows)
    assert len(measuring) == 4


@pytest.mark.parametrize("layer", [sdgp.Linear(256, 256), sdgp.Conv2d(16, 16, 3)], ids=["linear", "conv2d"])
def test_a_small_product_is_never_measured(layer: nn.Module) -> None:
    x = torch.randn((255, 256) if isinstance(layer, sdgp.Linear) else (2, 16, 8, 8), requires_grad=True)
    grad_output = torch.randn_like(layer(x))
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        exact = data_gradient(layer.to_plain(), x, grad_output)
        assert torch.equal(data_gradient(layer, x, grad_output), exact)
        assert outcome(layer) == ("plain", None)
        assert "_Linear" not in layer(x).grad_fn.name()  # the graph has no node of sdgp
        sdgp.convert(layer, method="magnitude", backend="pruned")
        dim = -1 if isinstance(layer, sdgp.Linear) else 1
        expected = data_gradient(layer.to_plain(), x, sdgp.prune_nm(grad_output, 2, 4, dim))
        assert torch.equal(data_gradient(layer, x, grad_output), expected)
        assert outcome(layer) == ("dense", None)
        assert "too small" in sdgp.report(layer)[0].why
    assert timer.count == len(measuring) == 0


def test_what_is_too_small_for_a_chooser() -> None:
    """auto must measure nothing below its constant, which the forward also uses. pruned must follow ``least_work``."""
    x, grad_output = torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)
    for backend, count in (("auto", 0), ("pruned", 1)):
        layer = sdgp.Linear(16, 32, backend=backend)
        measuring, _ = chooser(sparse_wins=True, least_work=0)
        with measuring:
            data_gradient(layer, x, grad_output)
        assert len(measuring) == count
    layer, x, grad_output = large("auto")
    measuring, _ = chooser(sparse_wins=True, least_work=LEAST_WORK + 1)
    with measuring:
        data_gradient(layer, x, grad_output)
    assert len(measuring) == 0
    assert outcome(layer) == ("exact", None)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_forced_product_is_never_measured(backend: str) -> None:
    layer, x, grad_output = large(backend)
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        data_gradient(layer, x, grad_output)
    assert timer.count == len(measuring) == 0
    assert outcome(layer) == (backend, None)


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_nothing_is_measured_on_the_meta_device(backend: str) -> None:
    layer, x, grad_output = large(backend)
    x = x.detach().to("meta").requires_grad_()
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        assert data_gradient(layer.to("meta"), x, grad_output.to("meta")).is_meta
    assert timer.count == len(measuring) == 0
    assert outcome(layer)[0] == {"auto": "exact", "pruned": "dense"}[backend]


def test_paused_measures_nothing_and_keeps_the_choice() -> None:
    layer, x, grad_output = large("auto")
    exact = grad_output @ layer.weight
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        with sdgp.paused(layer):
            assert torch.equal(data_gradient(layer, x, grad_output), exact)
        assert timer.count == 0
        assert not torch.equal(data_gradient(layer, x, grad_output), exact)
        with sdgp.paused(layer):
            assert torch.equal(data_gradient(layer, x, grad_output), exact)
            assert sdgp.report(layer)[0].note == "exact: paused"
        assert not torch.equal(data_gradient(layer, x, grad_output), exact)
    assert len(measuring) == 1


@pytest.mark.parametrize("backend", ["auto", "pruned"])
def test_nothing_is_measured_under_compile(backend: str) -> None:
    torch._dynamo.reset()
    layer, x, grad_output = large(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pruned = sdgp.prune_nm(grad_output, 1, 4) if backend == "pruned" else grad_output
    measuring, timer = chooser(sparse_wins=True)
    with measuring:
        close(data_gradient(compiled, x, grad_output), pruned @ layer.weight)
    assert timer.count == len(measuring) == 0
    torch._dynamo.reset()


@either_wins
@pytest.mark.parametrize("backend", ["auto", "pruned"])
@pytest.mark.parametrize("method", METHODS)
def test_measuring_leaves_the_generator_to_the_layer(backend: str, method: str, sparse_wins: bool) -> None:
    layer, x, grad_output = large(backend, method)
    with chooser(sparse_wins)[0]:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first = data_gradient(layer, x, grad_output)  # measures the products
        after_first = torch.get_rng_state()
        torch.manual_seed(3)
        second = data_gradient(layer, x, grad_output)
    assert torch.equal(torch.get_rng_state(), after_first)
    assert torch.equal(first, second)
    drawn = method in METHODS_THAT_DRAW and (backend == "pruned" or sparse_wins)
    assert torch.equal(before, after_first) == (not drawn)


def test_backwards_use_the_chooser_of_their_forward() -> None:
    """A backward must use the chooser of its forward, even if another or none is active by then."""
    layer, x, grad_output = large("auto")
    outer, _ = chooser(sparse_wins=False)
    inner, _ = chooser(sparse_wins=True)
    with outer:
        with inner:
            output = layer(x)
        gradients(output, grad_output, x)
        assert (len(outer), len(inner)) == (0, 1)
        data_gradient(layer, x, grad_output)
        assert (len(outer), len(inner)) == (1, 1)
    with pytest.raises(KeyError), inner:
        raise KeyError
    before = len(sdgp.chooser)
    with sdgp.chooser:  # it is already the default
        output = layer(x)
    assert (len(outer), len(inner), len(sdgp.chooser)) == (1, 1, before)


def test_two_threads_may_use_one_chooser() -> None:
    shared, _ = chooser(sparse_wins=True)
    begun, ended = threading.Event(), threading.Event()

    def overlap() -> bool:
        with shared:
            begun.set()
            return ended.wait(60) and current_chooser() is shared

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with shared:
            result = pool.submit(overlap)
            assert begun.wait(60)
            assert current_chooser() is shared
        assert current_chooser() is sdgp.chooser
        ended.set()
        assert result.result()


def test_an_evaluation_keeps_what_the_report_says() -> None:
    layer, x, grad_output = large("auto")
    with chooser(sparse_wins=True)[0]:
        data_gradient(layer, x, grad_output)
        before = sdgp.report(layer)
        with torch.no_grad():
            layer(x)
        layer(x.detach())
    assert sdgp.report(layer) == before
    assert before[0].product == "sparse"


# Checkpoints of a run.


def measured() -> sdgp.Chooser:
    measuring, _ = chooser(sparse_wins=True)
    with measuring:
        for backend in ("auto", "pruned"):
            data_gradient(*large(backend))
        layer = sdgp.Conv2d(64, 64, 3, stride=(1, 2), padding=1, backend="pruned")
        data_gradient(layer, torch.randn(2, 64, 32, 16, requires_grad=True), torch.randn(2, 64, 32, 8))
    assert len(measuring) == 3
    return measuring


def restored(state: Any) -> tuple[sdgp.Chooser, Timer]:
    """Makes a chooser that loads ``state`` and would choose otherwise if it measured."""
    other, timer = chooser(sparse_wins=False)
    other.load_state_dict(state)
    return other, timer


def test_a_state_dict_goes_through_json() -> None:
    first = measured()
    state = json.loads(json.dumps(first.state_dict()))
    other, timer = restored(state)
    assert other.state_dict() == first.state_dict()
    with other:
        layer, x, grad_output = large("auto")
        data_gradient(layer, x, grad_output)
        assert outcome(layer) == ("sparse", 1.0)
        convolution = sdgp.Conv2d(64, 64, 3, stride=(1, 2), padding=1, backend="pruned")
        data_gradient(convolution, torch.randn(2, 64, 32, 16, requires_grad=True), torch.randn(2, 64, 32, 8))
        assert outcome(convolution) == ("sparse", 1.0)
    assert timer.count == 0
    assert len(other) == 3


def test_a_state_of_another_version_loads() -> None:
    """A state of another version must load: fields are found by name, so order and unknown fields do not matter."""
    state = measured().state_dict()
    changed = {}
    for key, decision in state.items():
        site = json.loads(key)
        site["pruning"] = {"later": 1} | dict(reversed(site["pruning"].items()))
        site = {"later": [1, 2]} | dict(reversed(site.items()))
        del site["transposed"]  # of the first versions
        changed[json.dumps(site)] = {"later": None} | dict(reversed(decision.items()))
    other, _ = restored(changed)
    assert other.state_dict() == state


def test_a_state_dict_adds_to_what_is_known() -> None:
    other, timer = chooser(sparse_wins=False)
    with other:
        layer, x, grad_output = large("auto", "mvue")
        data_gradient(layer, x, grad_output)
        other.load_state_dict(measured().state_dict())
        data_gradient(layer, x, grad_output)
    assert outcome(layer)[0] == "exact"
    assert (len(other), timer.count) == (4, 2)


@pytest.mark.parametrize("state", [{"x": {}}, {"[]": {}}, {"{}": {}}, {'{"op": "linear"}': {}}, {1: 2}, [1]], ids=str)
def test_what_is_no_state_dict(state: Any) -> None:
    other, _ = chooser(sparse_wins=True)
    with pytest.raises(ValueError, match=r"^Chooser: expected .*state_dict"):
        other.load_state_dict(state)
    assert len(other) == 0
