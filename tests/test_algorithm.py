# SPDX-License-Identifier: BSD-3-Clause
"""Tests the choice of an algorithm of cuSPARSELt, with a stand-in for its operators that runs on a CPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sdgp
from sdgp import _semi_structured as semi_structured
from sdgp._algorithm import find_algorithm
from sdgp._decision import Site
from sdgp._pattern import Pruning
from sdgp._semi_structured import DEFAULT, Algorithm, Operand

FOUND = Algorithm(7, 2, 1)
ROWS, SIZE, COLUMNS = 64, 128, 32

Product = Callable[[Tensor, Tensor], Tensor]


def pack(matrix: Tensor, pattern: sdgp.Pattern, method: str, seed: Tensor | None = None) -> Operand:
    return Operand(sdgp.prune_nm(matrix, *pattern, -1, method, seed), "cusparselt_sm90", *matrix.shape, matrix.shape[1])


def in_order(matrix: Tensor, dense: Tensor) -> Tensor:
    return (matrix.float() @ dense.float()).to(matrix.dtype)


def in_another_order(matrix: Tensor, dense: Tensor) -> Tensor:
    halves = zip(matrix.float().chunk(2, 1), dense.float().chunk(2, 0), strict=True)
    return sum((left.flip(1) @ right.flip(0) for left, right in halves), torch.zeros(())).to(matrix.dtype)


def with_wrong_value(value: float, every: int = 1) -> Product:
    """Returns a product that gets one element wrong in every n-th call."""
    calls = itertools.count(1)

    def product(matrix: Tensor, dense: Tensor) -> Tensor:
        result = in_order(matrix, dense)
        if next(calls) % every == 0:
            result[-1, -1] = value
        return result

    return product


def out_of_memory(matrix: Tensor, dense: Tensor) -> Tensor:
    raise RuntimeError("CUDA out of memory")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Product], None]:
    def install(product: Product) -> None:
        def multiply(operand: Operand, dense: Tensor, algorithm: Algorithm = DEFAULT) -> Tensor:
            return (product if algorithm == FOUND else in_order)(operand.packed, dense)

        monkeypatch.setattr(semi_structured, "pack", pack)
        monkeypatch.setattr(semi_structured, "multiply", multiply)
        monkeypatch.setattr(semi_structured, "search", lambda operand, dense: FOUND)

    return install


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (in_order, FOUND),
        (in_another_order, FOUND),
        (with_wrong_value(0.0), DEFAULT),
        (with_wrong_value(0.0, every=8), DEFAULT),
        (with_wrong_value(float("nan"), every=9), DEFAULT),
        (out_of_memory, DEFAULT),
    ],
)
def test_an_algorithm_counts_only_if_its_results_are_right(
    library: Callable[[Product], None], product: Product, expected: Algorithm, dtype: torch.dtype
) -> None:
    library(product)
    operand = pack(torch.randn(ROWS, SIZE, dtype=dtype), sdgp.Pattern(2, 4), "magnitude")
    dense = torch.randn(SIZE, COLUMNS).to(dtype)
    state = torch.get_rng_state()
    assert find_algorithm(operand, dense) == expected
    assert torch.equal(torch.get_rng_state(), state)


class OnGpu:
    """A gradient that says it is on a GPU."""

    device = torch.device("cuda")

    def new_zeros(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*size, dtype=dtype)


def decide(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[Algorithm, float], **settings: Any) -> sdgp.Decision:
    """Returns the decision for a product whose algorithms take these times; the exact product takes 4 ms."""
    grad = torch.randn(ROWS, SIZE, dtype=torch.bfloat16)
    weight = torch.randn(SIZE, COLUMNS, dtype=torch.bfloat16)
    pruning = Pruning.parse("linear", "2:4", "mvue", "auto")
    last: list[Algorithm] = []
    multiply = semi_structured.multiply

    def noted(operand: Operand, dense: Tensor, algorithm: Algorithm = DEFAULT) -> Tensor:
        last.append(algorithm)
        return multiply(operand, dense, algorithm)

    def timer(call: Callable[[], object], device: torch.device) -> float:
        last.clear()
        call()
        return milliseconds[last[-1]] if last else 4.0

    class Products:
        grad_output = OnGpu()
        work = 2**40

        def exact(self) -> Tensor:
            return grad @ weight

        def operands(self, seed: Tensor | None = None) -> tuple[Operand, Tensor]:
            return pack(grad, pruning.pattern, pruning.method, seed), weight

        def sparse(self, seed: Tensor | None = None, algorithm: Algorithm = DEFAULT) -> Tensor:
            return semi_structured.multiply(*self.operands(seed), algorithm)

    monkeypatch.setattr(semi_structured, "multiply", noted)
    products: Any = Products()
    return sdgp.Chooser(timer=timer, **settings).measure(products, pruning)


def test_a_faster_algorithm_is_part_of_the_decision(
    library: Callable[[Product], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library(in_another_order)
    with monkeypatch.context() as patch:
        decision = decide(patch, {DEFAULT: 3.0, FOUND: 2.0})
    assert (decision.product, decision.sparse_ms, decision.exact_ms) == ("sparse", 2.0, 4.0)
    assert decision.algorithm == FOUND
    with monkeypatch.context() as patch:
        decision = decide(patch, {DEFAULT: 2.0, FOUND: 1.95})
    assert (decision.sparse_ms, decision.algorithm) == (2.0, DEFAULT)
    with monkeypatch.context() as patch:
        decision = decide(patch, {DEFAULT: 3.0, FOUND: 2.0}, search=False)
    assert (decision.sparse_ms, decision.algorithm) == (3.0, DEFAULT)


def test_the_algorithm_is_stored_with_the_decision() -> None:
    pruning = Pruning.parse("linear", "2:4", "mvue", "auto")
    site = Site("linear", torch.device("cuda"), torch.bfloat16, 1, pruning, (SIZE, COLUMNS), True, 12)
    first, second = sdgp.Chooser(), sdgp.Chooser()
    first._decisions[site] = sdgp.Decision("sparse", "faster", 4.0, None, 2.0, *FOUND)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    decision = second.foresee(site, 2**40)
    assert decision is not None
    assert decision.algorithm == FOUND


def test_the_algorithm_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Algorithm] = []

    def operator(packed: Tensor, dense: Tensor, **algorithm: int) -> Tensor:
        used.append(Algorithm(**algorithm))
        return packed @ dense

    monkeypatch.setattr(torch, "_cslt_sparse_mm", operator)
    operand = pack(torch.randn(ROWS, SIZE), sdgp.Pattern(2, 4), "magnitude")
    product = semi_structured.multiply(operand, torch.randn(SIZE, COLUMNS), FOUND)
    assert product.shape == (ROWS, COLUMNS)
    semi_structured.multiply(operand, torch.randn(SIZE, COLUMNS))
    assert used == [FOUND, DEFAULT]
