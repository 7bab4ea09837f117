# SPDX-License-Identifier: BSD-3-Clause
"""The product on 2:4 tensor cores: what can be told without a GPU. The rest stands in test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sdgp
from sdgp import backends, semi_structured
from sdgp.pattern import Pattern, Pruning

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
        (False, (9, 0), True, "sdgp's CUDA kernels, got an sdgp that was built without (SDGP_CUDA)"),
        (True, (7, 5), True, "a GPU of compute capability 8.0 or newer, got 7.5"),
        (True, (9, 0), False, f"a torch with cuSPARSELt, got {torch.__version__} without"),
        (True, (8, 6), False, None),  # CUTLASS's
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


def test_the_report_names_the_obstacle() -> None:
    x = torch.empty(2**20, 256, device="meta", requires_grad=True)
    for backend, outcome in (("auto", "exact"), ("pruned", "pruned, dense product")):
        model = sdgp.convert(nn.Sequential(nn.Linear(256, 256, device="meta")), "2:4", backend=backend)
        model(x).sum().backward()
        (row,) = sdgp.report(model)
        expected = "a sparse product needs a device that has a sparse product (cpu, cuda), got meta"
        assert row.note == f"{outcome}: {expected}"


def test_an_obstacle_leaves_auto_exact_and_pruned_dense() -> None:
    def product(name: str):  # type: ignore[no-untyped-def]
        return lambda *_: name

    key = (backends._STATIC, False, "more")
    three = {"dense": product("exact"), "pruned": product("pruned"), "sparse": product("sparse")}
    products = backends.Products(key, CUDA, lambda: "more", **three)
    taken = {
        backend: backends.data_gradient("linear", products, Pruning(Pattern(2, 4), "mvue", backend))
        for backend in ("auto", "pruned", "dense")
    }
    assert taken == {"auto": "exact", "pruned": "pruned", "dense": "pruned"}
    with pytest.raises(ValueError, match='linear: backend="sparse" expected more; use "pruned" for'):
        backends.data_gradient("linear", products, Pruning(Pattern(2, 4), "mvue", "sparse"))
