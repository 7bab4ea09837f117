# SPDX-License-Identifier: BSD-3-Clause
"""The chooser: it measures which product computes a gradient fastest, and remembers the result."""

from __future__ import annotations

import functools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import _semi_structured
from ._algorithm import find_algorithm
from ._clock import elapsed_ms
from ._decision import Decision, Products, Site
from ._pattern import Pattern, Pruning
from ._rules import LEAST_WORK, LEAST_WORK_CUDA, kernels_run, obstacle, static_rule
from ._semi_structured import DEFAULT, Algorithm

if TYPE_CHECKING:
    from typing_extensions import Self


_Way = TypeVar("_Way")

IDENTITY = Decision("exact", "n == m: nothing is pruned")
SMALL = Decision("plain", "fewer than 16 M multiply-adds: too small to gain")
_SMALL = {product: Decision(product, "too small to gain") for product in ("exact", "dense")}
_TWICE = Decision("exact", "the gradient is differentiated again (create_graph=True)")
_FORCED = {product: Decision(product, f'backend="{product}"') for product in ("dense", "sparse")}


class Chooser:
    """Decides which product computes a data or a weight gradient.

    It measures each site (op, settings, shapes, dtype and device) once and remembers the result. Forwards inside
    ``with chooser:`` use this chooser, in this thread only. All other forwards use ``sdgp.chooser``.

    Args:
        margin: the sparse product must take less than this share of the other product's time. Smaller
            differences are measuring errors.
        calls_ms: the call overhead of a pruned backward, in milliseconds. It counts on a CPU if the other product is
            the exact one.
        rounds: how many times each product is timed. The shortest time counts, because other programs only make times
            longer.
        limit: how many sites are remembered. The oldest is forgotten first, and measured again when it is needed.
        least_work, least_work_cuda: below this number of multiply-adds, on a CPU and on a GPU, nothing is measured and
            no sparse product is chosen. Under ``"auto"`` both are at least 16 M.
        timer: ``timer(call, device)`` returns the milliseconds of one call.
        search: whether to look for a faster algorithm of cuSPARSELt than its default, on GPUs. Another algorithm is
            used only after its results were those of the default for random operands of the same size.

    Raises:
        ValueError: If ``rounds`` or ``limit`` is below 1, ``margin`` is not positive, or ``calls_ms`` is negative.

    Examples:
        >>> chooser = sdgp.Chooser(rounds=3)
        >>> layer = sdgp.Linear(512, 512, pattern="1:4")
        >>> with chooser:
        ...     layer(torch.randn(256, 512, requires_grad=True)).sum().backward()
        >>> len(chooser)
        1
    """

    def __init__(
        self,
        *,
        margin: float = 0.95,
        calls_ms: float = 0.1,
        rounds: int = 5,
        limit: int = 1024,
        least_work: int = LEAST_WORK,
        least_work_cuda: int = LEAST_WORK_CUDA,
        timer: Callable[[Callable[[], object], torch.device], float] | None = None,
        search: bool = True,
    ) -> None:
        if rounds < 1 or limit < 1:
            raise ValueError(f"Chooser: expected rounds >= 1 and limit >= 1, got {rounds} and {limit}")
        if not margin > 0 or not calls_ms >= 0:
            raise ValueError(f"Chooser: expected margin > 0 and calls_ms >= 0, got {margin} and {calls_ms}")
        self._margin, self._calls_ms, self._rounds, self._limit = margin, calls_ms, rounds, limit
        self._least_work, self._least_work_cuda = least_work, least_work_cuda
        self._timer, self._search = timer or elapsed_ms, search
        self._decisions: OrderedDict[Site, Decision] = OrderedDict()
        self.epoch = time.time_ns()  # changes when earlier decisions may no longer hold

    def __len__(self) -> int:
        return len(self._decisions)

    def __enter__(self) -> Self:
        _choosers.set((*_choosers.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choosers.set(_choosers.get()[:-1])

    def foresee(self, site: Site, work: int) -> Decision | None:
        """Returns the decision if it is known without measuring, or None if the products must be timed.

        Args:
            work: the multiply-adds of the exact product.
        """
        pruning = site.pruning
        if pruning.is_identity:
            return IDENTITY
        backend, other = pruning.backend, _other(pruning)
        if torch._C._are_functorch_transforms_active():
            return Decision("dense" if backend != "auto" else "exact", "torch.func transforms have no sparse product")
        if backend in _FORCED:
            return _FORCED[backend]
        deterministic = torch.are_deterministic_algorithms_enabled()
        if not deterministic and (known := self._decisions.get(site)) is not None:
            return known
        if work < self.least_work(site.device):
            return _SMALL[other]
        if (missing := _obstacle(site)) is not None:
            return Decision(other, f"a sparse product needs {missing}")
        if deterministic:
            return _static(site, "torch.use_deterministic_algorithms forbids a choice by time")
        return None

    def least_work(self, device: torch.device) -> int:
        """Returns the number of multiply-adds below which no sparse product is chosen."""
        return self._least_work if device.type == "cpu" else self._least_work_cuda

    def decide(self, site: Site, products: Products) -> Decision:
        """Returns the decision for one gradient, in its backward.

        Raises:
            ValueError: If ``sparse`` is forced and there is no sparse product: ``op: requirement, got actual``.
        """
        pruning = site.pruning
        if pruning.backend == "auto" and torch.is_grad_enabled():
            return _TWICE
        decision = self.foresee(site, products.work)
        if decision is None:
            if not kernels_run(products.grad_output):
                return _static(site, "nothing can be measured here (fake tensors, a tracer or a captured graph)")
            decision = self._decisions[site] = self._measured(products, pruning)
            if len(self._decisions) > self._limit:
                self._decisions.popitem(last=False)
        elif decision is _FORCED["sparse"]:
            missing = _obstacle(site)
            if missing is not None:
                raise ValueError(
                    f'{site.op}: backend="sparse" expected {missing}; '
                    'use "pruned" for the same gradients by the faster product'
                )
        return decision

    def _measured(self, products: Products, pruning: Pruning) -> Decision:
        try:
            return self.measure(products, pruning)
        except RuntimeError as error:  # out of memory, or a library refuses this size: the step continues
            message = str(error).partition("\n")[0]
            return Decision(_other(pruning), f"the sparse product failed when it was measured: {message}")

    def measure(
        self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
    ) -> Decision:
        """Times the products that compete under ``pruning.backend``. It draws nothing from PyTorch's generators.

        Args:
            exact_ms: the time of the exact product, if it is known. It is not measured again.
        """
        other = _other(pruning)
        known = {} if exact_ms is None else {"exact": exact_ms}
        unknown = [product for product in ("sparse", other) if product not in known]
        device = products.grad_output.device
        algorithm = self._algorithm(products, rounds)
        ms = known | self.measure_all(products, unknown, rounds, algorithm)
        calls = self._calls_ms if other == "exact" and device.type == "cpu" else 0.0  # a GPU hides this overhead
        if ms["sparse"] + calls < self._margin * ms[other]:
            product, why = "sparse", f"faster than {other}: {ms['sparse']:.2f} ms against {ms[other]:.2f} ms"
        else:
            product, why = other, f"sparse is not faster: {ms['sparse']:.2f} ms against {ms[other]:.2f} ms"
        times = ms.get("exact"), ms.get("dense"), ms["sparse"]
        return Decision(product, why, *times, *algorithm)

    def _algorithm(self, products: Products, rounds: int | None) -> Algorithm:
        """Returns the algorithm for the sparse product on a GPU. It is the default if no other one is faster."""
        device = products.grad_output.device
        if device.type != "cuda" or not self._search:
            return DEFAULT
        with torch.no_grad():
            operands = products.operands(products.grad_output.new_zeros(1, dtype=torch.int64))
            found = DEFAULT if operands is None else find_algorithm(*operands)
        if operands is None or found == DEFAULT:
            return DEFAULT
        ways = {way: functools.partial(_semi_structured.multiply, *operands, way) for way in (DEFAULT, found)}
        ms = self._shortest(ways, device, rounds)
        return found if ms[found] < self._margin * ms[DEFAULT] else DEFAULT

    def measure_all(
        self, products: Products, names: Iterable[str], rounds: int | None = None, algorithm: Algorithm = DEFAULT
    ) -> dict[str, float]:
        """Returns the shortest milliseconds of each named product. Each round times every product once."""
        device = products.grad_output.device
        seed = products.grad_output.new_zeros(1, dtype=torch.int64)
        ways: dict[str, Callable[[], Tensor]] = {
            "exact": products.exact,
            "dense": lambda: products.dense(seed),
            "sparse": lambda: products.sparse(seed, algorithm),
        }
        return self._shortest({name: ways[name] for name in names}, device, rounds)

    def _shortest(
        self, ways: Mapping[_Way, Callable[[], object]], device: torch.device, rounds: int | None
    ) -> dict[_Way, float]:
        times: dict[_Way, list[float]] = {way: [] for way in ways}
        with torch.no_grad():
            for call in ways.values():
                call()  # warm-up
            for _ in range(rounds or self._rounds):
                for way, call in ways.items():
                    times[way].append(self._timer(call, device))
        return {way: min(milliseconds) for way, milliseconds in times.items()}

    def forget(self) -> None:
        """Drops all measurements, so that they are repeated, for example after the machine has become busier."""
        self._decisions.clear()
        self.epoch = time.time_ns()

    def state_dict(self) -> dict[str, Any]:
        """Returns all measurements in a dictionary that can be stored as JSON.

        A training run that resumes from a checkpoint with this dictionary uses the same products, so it rounds in the
        same way, bit for bit.
        """
        return {
            json.dumps(site._asdict() | {"pruning": _named(site.pruning)}, sort_keys=True, default=str): asdict(
                decision
            )
            for site, decision in self._decisions.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Loads what ``state_dict`` returned, possibly in another process.

        Raises:
            ValueError: If ``state`` is something else.
        """
        try:
            loaded = {_site(json.loads(key)): _decision(value) for key, value in state.items()}
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Chooser: expected what Chooser.state_dict() returned, got an entry that cannot be read: {error}"
            ) from error
        self._decisions.update(loaded)
        self.epoch = time.time_ns()
        while len(self._decisions) > self._limit:
            self._decisions.popitem(last=False)


def _other(pruning: Pruning) -> str:
    """Returns the product that the sparse one must beat."""
    return "dense" if pruning.backend == "pruned" else "exact"


def _obstacle(site: Site) -> str | None:
    casts = dict(zip(("data", "weight"), site.casts, strict=False)).get(site.gradient, "")
    return obstacle(site.op, site.gradient, site.pruning, site.device, site.dtype, site.groups, casts)


def _static(site: Site, why: str) -> Decision:
    sparse = static_rule(
        site.op, site.gradient, site.pruning, site.device, site.dtype, site.weight_shape, 2**site.values
    )
    return Decision("sparse" if sparse else _other(site.pruning), f"static rule: {why}")


# The settings of one product: ``weight_grad`` belongs only to the settings of a layer.
_SETTINGS = [field.name for field in fields(Pruning) if field.name != "weight_grad"]


def _named(pruning: Pruning) -> dict[str, Any]:
    return {name: value for name, value in asdict(pruning).items() if name in _SETTINGS}


def _site(named: dict[str, Any]) -> Site:
    """Reads a site from a state_dict of any version. It drops fields that this version does not know."""
    pruning = {name: named["pruning"][name] for name in _SETTINGS if name in named["pruning"]}
    pruning["pattern"] = Pattern(*pruning["pattern"])
    known = {name: named[name] for name in Site._fields if name in named}
    for name in ("weight_shape", "geometry", "casts"):
        known[name] = tuple(known.get(name, ()))
    device, dtype = torch.device(named["device"]), getattr(torch, named["dtype"].removeprefix("torch."))
    return Site(**{**known, "device": device, "dtype": dtype, "pruning": Pruning(**pruning)})


def _decision(named: Mapping[str, Any]) -> Decision:
    known = {field.name for field in fields(Decision)}
    return replace(Decision("exact", ""), **{name: value for name, value in named.items() if name in known})


#: The chooser that every forward outside ``with Chooser():`` uses.
chooser = Chooser()

# The choosers whose blocks this thread or task is in, the innermost last.
_choosers: ContextVar[tuple[Chooser, ...]] = ContextVar("choosers", default=())


def current_chooser() -> Chooser:
    choosers = _choosers.get()
    return choosers[-1] if choosers else chooser
