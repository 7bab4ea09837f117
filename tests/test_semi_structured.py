# SPDX-License-Identifier: BSD-3-Clause
"""Tests the product on 2:4 tensor cores as far as possible without a GPU. test_cuda.py has the other tests."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sdgp
from sdgp import _semi_structured as semi_structured
from sdgp._autograd import LinearProducts, LinearWeightProducts
from sdgp._decision import Site
from sdgp._pattern import Pattern, Pruning
from sdgp._rules import obstacle

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8", "1:12", "2:16", "1:32", "2:64"])
def test_patterns_that_fit(pattern: str) -> None:
    assert Pattern.parse(pattern).fits_24


@pytest.mark.parametrize("pattern", ["3:4", "4:8", "1:3", "2:6", "1:6", "4:32"])
def test_patterns_that_do_not(pattern: str) -> None:
    n, m = Pattern.parse(pattern)
    assert not Pattern(n, m).fits_24
    missing = semi_structured.obstacle(CUDA, torch.bfloat16, Pattern(n, m))
    assert missing == f"a pattern that 2:4 tensor cores take (n <= 2 and m a multiple of 4, or 1:2), got {n}:{m}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_that_do_not(dtype: torch.dtype) -> None:
    missing = semi_structured.obstacle(CUDA, dtype, Pattern(2, 4))
    assert missing == f"float16 or bfloat16 on cuda (torch.autocast), got {str(dtype)[6:]}"


@pytest.mark.parametrize(
    ("built", "capability", "library", "expected"),
    [
        (False, (9, 0), True, "sdgp's CUDA kernels, got an sdgp that was built without CUDA (option SDGP_CUDA)"),
        (True, (7, 5), True, "a GPU of compute capability 8.0 or newer, got 7.5"),
        (True, (9, 0), False, f"a torch with cuSPARSELt, got torch {torch.__version__} without it"),
        (True, (8, 6), False, None),  # uses CUTLASS
        (True, (9, 0), True, None),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, built: bool, capability: tuple[int, int], library: bool, expected: str | None
) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    semi_structured._obstacle_of_device.cache_clear()
    try:
        assert semi_structured.obstacle(CUDA, torch.float16, Pattern(2, 4)) == expected
    finally:
        semi_structured._obstacle_of_device.cache_clear()


def decide(backend: str) -> sdgp.Decision:
    """Returns the decision for a backward in float32 on CUDA, which has no sparse product."""
    pruning = Pruning.parse("op", "2:4", "mvue", backend)
    site = Site("linear", CUDA, torch.float32, 1, pruning, (32, 16), True, 10)
    with torch.no_grad():
        return sdgp.Chooser(least_work_cuda=0).decide(
            site, LinearProducts(torch.randn(64, 32), torch.randn(32, 16), pruning)
        )


def test_an_obstacle_leaves_auto_exact_and_pruned_dense() -> None:
    for backend, product in (("auto", "exact"), ("pruned", "dense")):
        decision = decide(backend)
        assert (decision.product, decision.ms) == (product, None)
        assert "float16 or bfloat16" in decision.why
        assert "got float32" in decision.why
    assert decide("dense").product == "dense"
    with pytest.raises(ValueError, match=r'^linear: .*"sparse".* float16 or bfloat16 .*, got float32; .*"pruned"'):
        decide("sparse")


def test_the_obstacles_of_a_device() -> None:
    pruning = Pruning.parse("op", "2:4", "mvue", "auto")
    assert obstacle("conv2d", "data", pruning, torch.device("cpu"), torch.float64, groups=2) is None
    assert "got meta" in str(obstacle("linear", "data", pruning, torch.device("meta"), torch.float16))
    assert "got groups=2" in str(obstacle("conv2d", "data", pruning, CUDA, torch.float16, groups=2))


@pytest.mark.parametrize("layout", ["cusparselt_sm80", "cusparselt_sm90", "cutlass_sm80"])
@pytest.mark.parametrize("shape", [(256, 128, 64), (200, 100, 50), (1, 1, 1), (0, 64, 8), (64, 64, 0)])
def test_shapes_of_a_product(layout: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed operand must have a row for each padded row. Fake tensors check the shapes as real operators do."""
    monkeypatch.setattr(semi_structured, "metadata_layout", lambda index, dtype: layout)
    rows, size, columns = shape
    with FakeTensorMode():
        matrix = torch.empty(rows, size, device="cuda", dtype=torch.bfloat16)
        dense = torch.empty(size + 1, columns, device="cuda", dtype=torch.bfloat16)[1:]
        operand = semi_structured.pack(matrix, Pattern(2, 4), "magnitude")
        assert operand.packed.shape[0] == -(-rows // 128) * 128
        if rows and columns:
            padded = torch.empty(operand.padded_cols, 64, device="cuda", dtype=torch.bfloat16)
            product = semi_structured._multiply_packed(operand.packed, layout, operand.padded_cols, padded)
            assert product.shape == (operand.packed.shape[0], 64)
        assert semi_structured.multiply(operand, dense).shape == (rows, columns)


@pytest.mark.parametrize("backend", ["pruned", "sparse", "dense"])
def test_a_method_that_needs_a_cpu(backend: str) -> None:
    """The error comes from the forward, whose line the user wrote, not from the backward."""
    message = rf'linear: backend="{backend}" expected a method that prunes on cuda \(.*mvue.*\), got unstructured; use'
    with FakeTensorMode():
        layer = torch.nn.Linear(64, 64, device="cuda")
        x = torch.empty(8, 64, device="cuda", requires_grad=True)
        for settings in ({"method": "unstructured"}, {"weight_grad": ("2:4", "unstructured")}):
            sdgp.convert(layer, "2:4", backend=backend, **settings)
            with pytest.raises(ValueError, match=message):
                layer(x)
        sdgp.convert(layer, "4:4", "unstructured", backend=backend)
        assert layer(x).shape == (8, 64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "out", "width"), [(256, 128, 64), (200, 100, 50), (128, 128, 128), (7, 3, 5)])
def test_shapes_of_a_weight_gradient(
    rows: int, out: int, width: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_structured, "metadata_layout", lambda index, dtype: "cusparselt_sm90")
    pruning = Pruning.parse("linear", "2:4", "mvue", "sparse")
    with FakeTensorMode():
        grad = torch.empty(rows, out, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty((width, out) if transposed else (out, width), device="cuda", dtype=torch.bfloat16)
        products = LinearWeightProducts(grad, grad.new_empty(rows, width), weight, transposed, pruning)
        assert products.sparse().shape == products.exact().shape == weight.shape
