# SPDX-License-Identifier: BSD-3-Clause
"""Which product a layer's data gradient takes: the one place that asks for the device, and measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import semi_structured
from .pattern import Pruning

#: What a choice depends on: device, dtype, threads, the settings and the shapes of a product.
Key: TypeAlias = tuple[object, ...]

# Multiply-adds of a data gradient below which nothing is looked at: its dense product takes some 0.2 ms, of which the
# sparse one's calls and the looking would cost most of what pruning saves.
LEAST_WORK = 16 * 2**20

# On a GPU they are some 0.1 ms of launches; a dense product of this size takes as long.
_LEAST_WORK_CUDA = 2**35

# The sparse product must win by this much: less is measuring noise.
_MARGIN = 0.95

# What a layer that may prune adds to a plain one in Python: it goes through an autograd function of its own.
_CALLS_MS = 0.1
_ROUNDS = 5


class Products(NamedTuple):
    """One data gradient, three ways; the argument is the seed of random methods, None: drawn."""

    key: Key
    device: torch.device
    obstacle: Callable[[], str | None]  # to the sparse one: "requirement, got actual"
    dense: Callable[[], Tensor]
    pruned: Callable[[Tensor | None], Tensor]
    sparse: Callable[[Tensor | None], Tensor]


class Choice(NamedTuple):
    """What was measured for one key, and what it led to."""

    sparse: bool
    dense_ms: float
    sparse_ms: float


_choices: dict[Key, Choice] = {}
_remembered: dict[str, Choice] = {}  # of another process, by a key's repr, until they are asked for


def obstacle(pruning: Pruning, gradient: Tensor, groups: int = 1) -> str | None:
    """Why there is no sparse product for a gradient like this, as "requirement, got actual"; None: there is one.

    ``groups``: of a convolution.
    """
    device = gradient.device
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"a device that has a sparse product (cpu, cuda), got {device}"
    if groups > 1:
        return f"a convolution of one group on cuda, got groups={groups}"
    return semi_structured.obstacle(device, gradient.dtype, pruning.pattern)


def prunes(pruning: Pruning) -> bool:
    """Whether the settings ask for any pruning; ``auto`` may still find the exact product faster."""
    return pruning.pattern.n < pruning.pattern.m


def stays_exact(pruning: Pruning, work: int) -> bool:
    """Whether a data gradient of ``work`` multiply-adds is known to be exact before anything else is looked at."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined,no-untyped-call]
        return True  # what leaves Python keeps the forward alone, which is the dense one
    return pruning.pattern.n == pruning.pattern.m or (pruning.backend == "auto" and work < LEAST_WORK)


def sharded(op: str, pruning: Pruning, *tensors: Tensor) -> Key | None:
    """The key of a layer that tensor parallelism shards: exact under ``auto``. None: nothing is sharded.

    Raises:
        ValueError: ``op: requirement, got actual``, where the settings force pruning.
    """
    if not any(hasattr(tensor, "placements") for tensor in tensors):  # of a DTensor, whose import takes a while
        return None
    if pruning.backend == "auto":
        return _STATIC, False, "plain tensors, got a DTensor"
    raise ValueError(
        f'{op}: backend="{pruning.backend}" expected plain tensors, got a DTensor; leave the layers dense that are '
        'sharded over devices, by the filter of sdgp.convert or by backend="auto"'
    )


def make_key(pruning: Pruning, work: int, input: Tensor, weight: Tensor, *geometry: object, groups: int = 1) -> Key:
    """The key of a layer's data gradient of ``work`` multiply-adds. Batches of similar size share one: their number of
    values rounded up to a power of two."""
    if work < (LEAST_WORK if input.device.type == "cpu" else _LEAST_WORK_CUDA):
        return _STATIC, False
    if torch.compiler.is_compiling():
        return _STATIC, _static_rule(pruning, input, weight)
    if input.device.type != "cpu" and (missing := obstacle(pruning, input, groups)) is not None:
        return _STATIC, False, missing
    return (
        input.device,
        input.dtype,
        torch.get_num_threads(),
        *pruning,
        tuple(weight.shape),
        weight.is_contiguous(),
        (input.numel() - 1).bit_length(),
        groups,
        *geometry,
    )


# Where nothing is measured (under torch.compile, for small products, where there is no sparse one) a key holds the
# decision itself, and perhaps the obstacle.
_STATIC = "static"


def _static_rule(pruning: Pruning, input: Tensor, weight: Tensor) -> bool:
    """Whether the sparse product has won with a margin wherever it was measured."""
    (n, m), _, _ = pruning
    large = weight.shape[0] >= 128 and weight.shape[1] >= 128 and input.numel() >= 2**18
    return input.device.type == "cpu" and input.dtype == torch.float32 and 4 * n <= m and large


def found_exact(key: Key) -> bool:
    """Under ``auto``: whether the exact product is known to be the faster, or there is no sparse one."""
    if key[0] == _STATIC:
        return not key[1]
    choice = choice_of(key)
    return choice is not None and not choice.sparse


def is_pruned(pruning: Pruning, key: Key | None) -> bool:
    """Whether gradients of a key are pruned; False where ``auto`` has not decided yet."""
    if pruning.backend != "auto":
        return prunes(pruning)
    if not prunes(pruning) or key is None:
        return False
    choice = choice_of(key)
    return bool(key[1]) if key[0] == _STATIC else choice is not None and choice.sparse


def choice_of(key: Key | None) -> Choice | None:
    """What ``data_gradient`` found for a key, or None."""
    if key is None:
        return None
    choice = _choices.get(key)
    if choice is None and _remembered and (choice := _remembered.pop(repr(key), None)) is not None:
        _choices[key] = choice
    return choice


def choices() -> dict[str, tuple[bool, float, float]]:
    """All that was measured in this process, as JSON can hold it: for ``remember``."""
    return {**_remembered, **{repr(key): choice for key, choice in _choices.items()}}


def remember(measured: Mapping[str, Sequence[Any]]) -> None:
    """Takes over what ``choices`` returned in another process: a training run that goes on from a checkpoint then
    takes the same products, and so rounds alike, bit for bit."""
    for key, (sparse, dense_ms, sparse_ms) in measured.items():
        _remembered[key] = Choice(sparse, dense_ms, sparse_ms)


def data_gradient(op: str, products: Products, pruning: Pruning) -> Tensor:
    """The data gradient by the product that the settings name, or by the faster one.

    Raises:
        ValueError: ``op: requirement, got actual``, where ``sparse`` is forced and there is no such product.
    """
    backend = pruning.backend
    if backend == "sparse":
        missing = products.obstacle()
        if missing is not None:
            raise ValueError(
                f'{op}: backend="sparse" expected {missing}; '
                'use "pruned" for the same gradients through the faster product there is'
            )
        return products.sparse(None)
    if backend != "dense" and _is_sparse_faster(products, pruning):  # of what has no sparse one, the key says no
        return products.sparse(None)
    return products.dense() if backend == "auto" else products.pruned(None)


def _is_sparse_faster(products: Products, pruning: Pruning) -> bool:
    if products.key[0] == _STATIC:
        return bool(products.key[1])
    choice = choice_of(products.key)
    if choice is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a graph is recorded: nothing can be measured
        choice = _choices[products.key] = measure(products, pruning)
    return choice.sparse


def measure(products: Products, pruning: Pruning, rounds: int = _ROUNDS) -> Choice:
    """Times the dense product beside the sparse one, in turn; pruning and packing included. Leaves generators alone."""
    device = products.device
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    exact_is_possible = pruning.backend != "pruned"
    contestants: tuple[Callable[[], object], ...] = (
        products.dense if exact_is_possible else lambda: products.pruned(seed),
        lambda: products.sparse(seed),
    )
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for round in range(1 + rounds):
            for call, milliseconds in zip(contestants, times, strict=True):
                elapsed = _elapsed_ms(call, device)
                if round > 0:
                    milliseconds.append(elapsed)
    dense, sparse = map(statistics.median, times)
    calls = _CALLS_MS if exact_is_possible and device.type == "cpu" else 0.0  # a GPU runs behind its calls
    return Choice(sparse + calls < _MARGIN * dense, dense, sparse)


def _elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    event: Callable[..., Any] = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    with torch.cuda.device(device):
        call()  # keeps the GPU busy while the launches of the timed call are queued
        begin.record()
        call()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end))


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of a device, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(pruning: Pruning, key: Key | None) -> str:
    """What becomes of a layer's data gradient, for a person; ``key``: of its last forward."""
    if not prunes(pruning):
        return "exact: n == m"
    choice = choice_of(key)
    if pruning.backend in ("dense", "sparse"):
        return f"pruned, {pruning.backend} product"
    pruned, sparse = "pruned, dense product", "pruned, sparse product"
    if key is not None and key[0] == _STATIC and len(key) > 2:
        return f"{'exact' if pruning.backend == 'auto' else pruned}: a sparse product needs {key[2]}"
    if choice is None and pruning.backend == "auto":
        return "exact so far: no gradient was measured, or large enough to be"
    if choice is None:
        return pruned if key == (_STATIC, False) else "pruned"
    dense = pruned if pruning.backend == "pruned" else "exact"
    return f"{sparse if choice.sparse else dense}: dense {choice.dense_ms:.2f} ms, sparse {choice.sparse_ms:.2f} ms"
