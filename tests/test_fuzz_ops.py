# SPDX-License-Identifier: BSD-3-Clause
"""Tests the ops with any dtype, shape, strides, storage offset, dim, pattern, method and values.

They must match the reference, and agree bit for bit for any number of threads and any instruction set.

``SDGP_FUZZ_EXAMPLES=2500 pytest -s`` tries that many cases per test, and others in each run (`make fuzz`).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import INSTRUCTION_SETS, identical, near, same, same_as_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import DTYPES, FIXED_METHODS, METHODS, PATTERNS, draw_seed
from torch import Tensor

import sdgp
from sdgp import _ops, reference

EXAMPLES = int(os.environ.get("SDGP_FUZZ_EXAMPLES", "0"))
SETTINGS: dict[str, Any] = {
    "max_examples": EXAMPLES or 40,
    "derandomize": not EXAMPLES,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Sums of these kinds are moderate, so a product or a rescale factor agrees up to rounding in any order of summation.
TAME = ("normal", "ties", "zeros", "relu")
WILD = ("any_bits", "specials", "subnormal")

calls = 0


class Case(NamedTuple):
    x: Tensor
    kind: str
    n: int
    m: int
    dim: int
    seed: Tensor


def values(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    if kind == "ties":
        return torch.randn(size).mul(1.5).round().to(dtype)
    if kind == "zeros":
        return torch.zeros(size, dtype=dtype) * torch.randn(size).sign().to(dtype)  # zeros of both signs
    if kind == "relu":
        return (torch.randn(size) - 1).relu().to(dtype)
    if kind == "specials":
        info = torch.finfo(dtype)
        some = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, -info.tiny, info.eps, 1.0]
        return torch.tensor(some, dtype=torch.float64).to(dtype)[torch.randint(len(some), (size,))]
    if kind == "normal":
        return torch.randn(size).to(dtype)
    integer = INTEGERS[dtype.itemsize]
    bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (size,), dtype=integer)
    if kind == "subnormal":
        sign = bits & torch.iinfo(integer).min
        smallest_normal = int(torch.tensor([torch.finfo(dtype).tiny], dtype=dtype).view(integer))
        bits = bits % (4 * smallest_normal // 3) | sign  # some are the smallest normal values
    x = bits.view(dtype)
    return torch.where(x.isnan(), torch.nan, x)  # arithmetic makes float16's signalling NaNs quiet


@st.composite
def tensors(draw: st.DrawFn, kind: str, dtype: torch.dtype) -> Tensor:
    """Draws a view of a storage with any offset, and strides in any order, with gaps, negative steps or overlap."""
    sizes = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 70])
    shape = draw(st.lists(sizes, min_size=1, max_size=5))
    if draw(st.integers(0, 15)) == 0:
        shape = [draw(st.integers(200, 300)), draw(st.integers(200, 300))]  # enough for several threads
    while torch.Size(shape).numel() > 100_000:
        shape[shape.index(max(shape))] = 2
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for d in order:
        layout = draw(st.sampled_from(["dense", "dense", "dense", "gap", "every_other", "expanded", "overlapping"]))
        strides[d] = {"every_other": 2 * step, "expanded": 0, "overlapping": (step + 1) // 2}.get(layout, step)
        step = max(step, strides[d] * max(shape[d], 1)) + (layout == "gap")
    offset = draw(st.integers(0, 9))
    needed = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    x = values(kind, needed, dtype).as_strided(shape, strides, offset)
    flipped = draw(st.lists(st.integers(0, len(shape) - 1), max_size=2, unique=True))
    return x.flip(flipped) if flipped else x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(TAME + WILD))
    x = draw(tensors(kind, draw(st.sampled_from(DTYPES))))
    m = draw(st.integers(1, 64))
    n, m = draw(st.sampled_from(PATTERNS) | st.just((draw(st.integers(1, m)), m)))
    return Case(x, kind, n, m, draw(st.integers(-x.ndim, x.ndim - 1)), draw_seed())


def call(op: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the op's result, which must be the same from one thread and from three."""
    global calls
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(op(*arguments))
        calls += 1
    torch.set_num_threads(1)
    one, three = ([x] if isinstance(x, Tensor) else x for x in results)
    for actual, expected in zip(three, one, strict=True):
        identical(actual, expected)
    return results[0]


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_prune(case: Case, method: str, compare: bool = True) -> list[Tensor]:
    """Checks prune_nm and, for methods that it takes, compress_nm and decompress_nm. Returns the results."""
    x, kind, n, m, dim, seed = case
    pruned = call(sdgp.prune_nm, x, n, m, dim, method, seed)
    compressed = check_compress(case, method, pruned, compare) if method in FIXED_METHODS else []
    if not compare:
        return [pruned, *compressed]
    assert pruned.stride() == torch.empty_like(x).stride()
    if method != "rescale" or kind in TAME:
        same_as_reference(pruned, reference.prune_nm(x, n, m, dim, method, seed), method)
    if method in ("magnitude", "random"):
        same(pruned, torch.where(pruned == 0, torch.zeros_like(x), x))
    return [pruned, *compressed]


def check_compress(case: Case, method: str, pruned: Tensor, compare: bool) -> list[Tensor]:
    x, kind, n, m, dim, seed = case
    kept, indices = call(sdgp.compress_nm, x, n, m, dim, method, seed)
    restored = call(sdgp.decompress_nm, kept, indices, m, x.shape[dim], dim)
    if not compare:
        return [kept, indices, restored]
    identical(restored.contiguous(), pruned.contiguous())
    for group in pruned.movedim(dim, -1).split(m, -1):
        assert not ((group != 0).sum(-1) > n).any()
    if method != "rescale" or kind in TAME:
        expected_kept, expected_indices = reference.compress_nm(x, n, m, dim, method, seed)
        same_as_reference(kept, expected_kept, method)
        identical(indices, expected_indices)
    return [kept, indices, restored]


def check_linear(case: Case, method: str, weight: Tensor) -> None:
    """Checks the product of a pruned gradient that is compressed before the product or inside it."""
    x, kind, n, m, _, seed = case
    results = []
    if method in FIXED_METHODS:
        kept, indices = sdgp.compress_nm(x, n, m, -1, method, seed)
        results.append(call(sdgp.spmm_nm, kept, indices, m, weight))
    pruned = sdgp.prune_nm(x, n, m, -1, method, seed).double()
    if method != "rescale":
        results.append(call(_ops.prune_nm_matmul, x, weight, n, m, method, seed))
        if x.ndim == 2:  # adjacent rows take another path
            results.append(call(_ops.prune_nm_matmul, x.t().contiguous().t(), weight, n, m, method, seed))
    for actual in results:
        assert actual.shape == (*x.shape[:-1], weight.shape[1])
        if kind in (*TAME, "subnormal"):
            near(actual, pruned @ weight.double(), pruned.abs() @ weight.double().abs(), x.shape[-1] + 1)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Case, Tensor, list[Any]]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    out = groups * draw(st.sampled_from([1, 2, 4, 7, 12, 32]))
    case = draw(cases())
    kernel, stride, dilation, padding = (
        [draw(st.integers(least, most)) for _ in range(2)] for least, most in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    pixels = [draw(st.integers(1, 7)) for _ in range(2)]
    unread = [draw(st.integers(0, s - 1)) for s in stride]  # pixels at the input's end that no output reads
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(pixels, stride, dilation, kernel, strict=True)]
    padding = [min(p, (r - 1) // 2) for p, r in zip(padding, reach, strict=True)]
    input_size = [r - 2 * p + u for r, p, u in zip(reach, padding, unread, strict=True)]
    shape = (draw(st.integers(0, 3)), out, *pixels)
    grad = values(case.kind, torch.Size(shape).numel(), case.x.dtype).reshape(shape)
    grad = draw(
        st.sampled_from(
            [grad, grad.contiguous(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().mT]
        )
    )
    weight = torch.randn(out, draw(st.integers(1, 5)), *kernel).to(grad.dtype)
    return (
        case._replace(x=grad, dim=1),
        weight,
        [input_size, stride, padding, dilation, groups, draw(st.booleans())],
    )


def check_conv2d(case: Case, method: str, weight: Tensor, window: list[Any]) -> None:
    x, kind, n, m, _, seed = case
    groups = window[4]
    actual = call(_ops.conv2d_input_grad_nm, x, weight, n, m, method, seed, *window)
    by_group = x
    if groups > 1 and x.shape[1] // groups % m != 0:
        by_group = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
    pruned = sdgp.prune_nm(by_group, n, m, 1, method, seed).reshape(x.shape).double()
    if kind in (*TAME, "subnormal") and x.numel() > 0:
        all_kept = (1, 1, "magnitude", None, *window)
        exact = reference.conv2d_input_grad_nm(pruned, weight.double(), *all_kept)
        magnitude = reference.conv2d_input_grad_nm(pruned.abs(), weight.double().abs(), *all_kept)
        near(actual, exact, magnitude, weight[:, 0].numel() + 1)


def check_conv2d_weight(case: Case, method: str, weight: Tensor, window: list[Any]) -> None:
    grad, kind, n, m, _, seed = case
    x = torch.randn(grad.shape[0], window[4] * weight.shape[1], *window[0]).to(grad.dtype)
    window = [list(weight.shape[2:]), *window[1:]]
    actual = call(_ops.conv2d_weight_grad_nm, grad, x, n, m, method, seed, *window)
    pruned = sdgp.prune_nm(grad.flatten(2), n, m, -1, method, seed).reshape(grad.shape).double()
    if kind in (*TAME, "subnormal") and x.numel() > 0:
        all_kept = (1, 1, "magnitude", None, *window)
        exact = reference.conv2d_weight_grad_nm(pruned, x.double(), *all_kept)
        magnitude = reference.conv2d_weight_grad_nm(pruned.abs(), x.double().abs(), *all_kept)
        near(actual, exact, magnitude, grad[:, 0].numel() + 1)


@settings(**SETTINGS)
@given(case=cases())
def test_prune_and_compress(case: Case) -> None:
    for method in METHODS:
        check_prune(case, method)


@settings(**SETTINGS)
@given(case=cases(), cols=st.sampled_from([0, 1, 2, 7, 16, 33, 130]), transposed=st.booleans())
def test_products(case: Case, cols: int, transposed: bool) -> None:
    size = case.x.shape[-1]
    weight = (torch.randn(cols, size).t() if transposed else torch.randn(size, cols)).to(case.x.dtype)
    for method in METHODS:
        check_linear(case, method, weight)


@settings(**SETTINGS)
@given(drawn=convolutions())
def test_convolutions(drawn: tuple[Case, Tensor, list[Any]]) -> None:
    case, weight, window = drawn
    for method in METHODS:
        if method != "rescale":
            check_conv2d(case, method, weight, window)
            check_conv2d_weight(case, method, weight, window)


def test_the_number_of_calls() -> None:
    print(f"\n{calls} op calls")
    assert calls >= min(40 * EXAMPLES, 100_000)


# Eight threads at once.


def test_eight_threads_at_once() -> None:
    shared, weight = torch.randn(4, 64, 15, 15), torch.randn(64, 24, 3, 3)

    def run(number: int) -> list[Tensor]:
        own = torch.randn(3, 130, 7, generator=torch.Generator().manual_seed(number)).transpose(1, 2)
        x = shared if number % 2 else own
        n, m = PATTERNS[number % len(PATTERNS)]
        seed = torch.tensor([number])
        results = []
        for method in METHODS:
            results.append(sdgp.prune_nm(x, n, m, 1, method, seed))
            if method in FIXED_METHODS:
                kept, indices = sdgp.compress_nm(x, n, m, 1, method, seed)
                results += [kept, indices, sdgp.decompress_nm(kept, indices, m, x.shape[1], 1)]
            if x is shared and method != "rescale":
                window: tuple[Any, ...] = ([15, 15], [1, 1], [1, 1], [1, 1], 1, False)
                results.append(_ops.conv2d_input_grad_nm(x, weight, n, m, method, seed, *window))
        return results

    expected = [run(number) for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(run, range(32)))
    for results, wanted in zip(actual, expected, strict=True):
        for x, y in zip(results, wanted, strict=True):
            identical(x, y)


# Every instruction set.


def digest() -> str:
    """Returns a hash of all results except those of rescale and of the products, which agree only up to rounding."""
    state = hashlib.sha256()

    @settings(**{**SETTINGS, "derandomize": True})
    @given(case=cases())
    def add(case: Case) -> None:
        for method in METHODS:
            for x in check_prune(case, method, compare=False) if method != "rescale" else ():
                comparable = torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x
                if x.numel():
                    state.update(comparable.contiguous().flatten().view(torch.uint8).numpy().tobytes())

    add()
    return state.hexdigest()


def test_instruction_sets_agree() -> None:
    program = "import test_fuzz_ops; print(test_fuzz_ops.digest())"
    this = sdgp._load.C.isa()
    digests = {this: digest()}
    for isa in {*INSTRUCTION_SETS} - {this}:
        environment = {**os.environ, "SDGP_FORCE_ISA": isa}
        command = [sys.executable, "-c", program]
        result = subprocess.run(
            command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        if "SDGP_FORCE_ISA: expected an instruction set that this CPU runs" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        digests[isa] = result.stdout.split()[-1]
    assert len(set(digests.values())) == 1, digests
