# SPDX-License-Identifier: BSD-3-Clause
"""What pruning does to each layer's data gradient while a model trains."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from . import _fidelity
from ._fidelity import METRICS, Sums
from ._layer import PruningLayer
from ._models import format_table, pruning_layers
from ._pattern import Pruning
from ._renamed import renamed
from ._step import Handles, Hook, on_gradient

if TYPE_CHECKING:
    from typing_extensions import Self

#: Of one layer: its steps under "step", and a list of the same length under each metric's name.
Record: TypeAlias = dict[str, list[float]]

_NO_RECORD: Record = {key: [] for key in ("step", *METRICS)}


class Watch(Mapping[str, Record]):
    """What ``sdgp.watch`` recorded: ``watch[layer][metric]`` is a list beside ``watch[layer]["step"]``; prints as a
    table of means over the last ``window`` records.

    Attributes:
        step: how many training forwards were seen.

    Examples:
        >>> watch = sdgp.watch(sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned"))
        >>> watch.step, list(watch)
        (0, [])
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        window: int = 10,
        to: str | PathLike[str] | Any = None,
        exact_below: float | None = None,
    ) -> None:
        if isinstance(model, torch._dynamo.OptimizedModule):
            raise ValueError("watch: expected the model itself, got what torch.compile made of it, which runs no hooks")
        if every < 1 or window < 1:
            raise ValueError(f"watch: expected every >= 1 and window >= 1, got {every} and {window}")
        if exact_below is not None and not 0 < exact_below <= 1:
            raise ValueError(f"watch: expected 0 < exact_below <= 1, a cosine, got {exact_below}")
        names: dict[nn.Module, str] = {layer: name for layer, name in pruning_layers("watch", model).items()}
        if isinstance(to, (str, PathLike)):
            check_writable("watch", to)
        elif to is not None and not hasattr(to, "add_scalar"):
            raise ValueError(f"watch: expected to= a path or a TensorBoard writer, got {type(to).__name__}")
        self.step = 0
        self._set_aside: dict[str, str] = {}
        self._every, self._to, self._exact_below = every, to, exact_below
        self._window = window
        self._names = names
        self._records: dict[str, Record] = {}
        self._last: dict[str, deque[Sums]] = {}  # the finite ones of the window
        self._pending: list[tuple[PruningLayer, Pruning, Tensor]] = []
        self._pending_step = 0
        self._layer_hooks = Handles()
        self._model_hook = model.register_forward_pre_hook(Hook(self._before_forward))

    def __getitem__(self, layer: str) -> Record:
        self._collect()
        return self._records[layer]

    def __iter__(self) -> Iterator[str]:
        self._collect()
        return iter([name for name in self._names.values() if name in self._records])  # in the model's order

    def __len__(self) -> int:
        self._collect()
        return len(self._records)

    def __str__(self) -> str:
        self._collect()
        rows = []
        for layer, name in self._names.items():
            if not isinstance(layer, PruningLayer):
                continue  # reverted since
            record = self._records.get(name, _NO_RECORD)
            records = len(record["step"])
            means = (f"{recent(record[metric], self._window):.3f}" if records else "" for metric in METRICS)
            if layer.prunes_data:
                note = "" if records else "none so far"
            else:
                note = f"exact: {layer.held}" if layer.held else "exact"
            rows.append((name, str(layer.pruning.pattern), layer.pruning.method, str(records), *means, note))
        return "\n".join(format_table(("layer", "pattern", "method", "records", *METRICS, "note"), rows))

    __repr__ = __str__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def set_aside(self) -> dict[str, str]:
        """The layers that ``exact_below`` made exact, each with the reason."""
        self._collect()
        return dict(self._set_aside)

    def close(self) -> None:
        """Ends watching. What was recorded, and what was set aside, stays."""
        self._collect()
        self._model_hook.remove()
        self._rest()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps seen, and the layers set aside: with it a run goes on from a checkpoint as it was."""
        return {"step": self.step, "set_aside": self.set_aside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken; layers that are not in this model are an error."""
        if set(state) != {"step", "set_aside"}:
            raise ValueError(f'watch: expected a state_dict with "step" and "set_aside", got {sorted(state)}')
        unknown = sorted(set(state["set_aside"]) - set(self._names.values()))
        if unknown:
            raise ValueError(f"watch: expected a state_dict of this model's layers, got {', '.join(unknown)}")
        self.step, self._set_aside = state["step"], dict(state["set_aside"])
        for layer, name in self._names.items():
            if isinstance(layer, PruningLayer):
                layer.hold("watch", self._set_aside.get(name, ""))

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._collect()
        self._rest()
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.step % self._every == 0:
            layers = [layer for layer in self._names if isinstance(layer, PruningLayer)]
            self._layer_hooks = on_gradient(layers, self._receive)
            self._pending_step = self.step
        self.step += 1

    def _rest(self) -> None:
        self._layer_hooks.remove()

    def _receive(self, layer: PruningLayer, grad_output: Tensor, shape: Tensor) -> None:
        if layer.prunes_data:
            seed = (self._pending_step << 20) + len(self._pending)
            self._pending.append((layer, layer.pruning, _fidelity.measure(layer, grad_output, shape, seed)))

    def _collect(self) -> None:
        """What the last watched step left on the device: fetched when the next one begins, or somebody asks."""
        if not self._pending:
            return
        fetched = torch.stack([sums.cpu() for _, _, sums in self._pending]).tolist()
        calls: dict[nn.Module, list[list[float]]] = {}
        settings: dict[nn.Module, Pruning] = {}
        for (layer, pruning, _), sums in zip(self._pending, fetched, strict=True):
            calls.setdefault(layer, []).append(sums)
            settings[layer] = pruning
        self._pending = []
        rows = [
            self._record(layer, settings[layer], _fidelity.add(calls[layer])) for layer in self._names if layer in calls
        ]
        if isinstance(self._to, (str, PathLike)):
            try:
                with Path(self._to).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:  # a full disk ends no training
                warnings.warn(
                    f"watch: {self._to} cannot be written any more, records stay in memory: {error}", stacklevel=2
                )
                self._to = None
        elif self._to is not None:
            for row in rows:
                for metric in METRICS:
                    if row[metric] is not None:
                        self._to.add_scalar(f"sdgp/{metric}/{row['layer']}", row[metric], row["step"])

    def _record(self, layer: Any, pruning: Pruning, sums: Sums) -> dict[str, Any]:
        name, step = self._names[layer], self._pending_step
        record = self._records.setdefault(name, {key: [] for key in _NO_RECORD})
        window = self._last.setdefault(name, deque(maxlen=self._window))
        values = _fidelity.metrics(sums)
        if math.isfinite(values["error"]):  # what a gradient that overflowed gives says nothing
            window.append(sums)
            values["bias"] = _fidelity.metrics(_fidelity.add(window))["bias"]
        for key, value in {"step": step, **values}.items():
            record[key].append(value)
        if self._exact_below is not None and len(window) == self._window:
            cosine = statistics.fmean(_fidelity.metrics(sums)["cosine"] for sums in window)
            if cosine < self._exact_below:
                self._set_aside[name] = (
                    f"set aside at step {step}, cosine {cosine:.2f} < exact_below={self._exact_below}"
                )
                if isinstance(layer, PruningLayer):  # not reverted since
                    layer.hold("watch", self._set_aside[name])
        written = {key: value if math.isfinite(value) else None for key, value in values.items()}
        return {"step": step, "layer": name, "pattern": str(pruning.pattern), "method": pruning.method, **written}


def check_writable(op: str, path: str | PathLike[str]) -> None:
    try:
        with Path(path).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(f"{op}: expected to= a file that can be written, got {path}: {error.strerror}") from error


def recent(values: list[float], window: int = 10) -> float:
    """The mean of the last finite values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)][-window:]
    return statistics.fmean(finite) if finite else math.nan


def watch(
    model: nn.Module,
    every: int = 100,
    *,
    window: int = 10,
    to: str | PathLike[str] | Any = None,
    exact_below: float | None = None,
    dense_below: float | None = None,
) -> Watch:
    """Records what pruning does to the data gradient of each layer of ``model``, at every ``every``-th training step.

    At such a step each layer that prunes has its data gradient computed a few more times, exact and pruned, from a
    quarter of the batch: with ``every=100`` that costs under 1 % of the training time. Training itself is not touched:
    weights and random numbers come out the same, bit for bit. A layer whose gradient is exact (found so by ``auto``,
    paused, scheduled, set aside) is not recorded.

    What is recorded, with g the exact data gradient, p the pruned one and x the output gradient:

    - ``cosine``: of the angle between p and g. ``error``: |p - g| / |g|.
    - ``bias``: |E p - g| / |g|, over the last ``window`` records: what would be left of the error if draws were
      averaged; about 0 for ``mvue``, the error itself for the methods that draw nothing.
    - ``l1_kept``, ``l2_kept``: the norm of the values of x that stay, of all of x's.
    - ``zeros``: the share of zeros in x. ``density``: the share of nonzeros once x is pruned.

    Weight gradients are not watched, pruned or not; a layer that ``exact_below`` sets aside has both gradients exact.

    A step is a forward in training mode with gradients enabled; of several before one optimizer step each counts. Under
    torch.compile nothing is recorded. With several processes each records what it sees.

    Args:
        model: a model that ``sdgp.convert`` went over.
        every: how many steps lie between records; the first one is recorded.
        window: of records, for the bias, for the table and for ``exact_below``.
        to: where to write as well: the path of a file that JSON lines are appended to, or an object with TensorBoard's
            ``add_scalar(tag, value, step)``.
        exact_below: a layer whose mean cosine over a full window is below this keeps its gradients exact from then on;
            ``sdgp.report`` tells. Converting again takes it back.
        dense_below: the old name of ``exact_below``; it warns.

    Returns:
        A ``Watch``, a mapping from layer to lists; ``sdgp.plot`` draws it. Its ``close()``, or leaving it as a context
        manager, ends watching.

    Raises:
        ValueError: ``watch: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> watch = sdgp.watch(model, every=1)
        >>> model(torch.randn(8, 64, requires_grad=True)).square().sum().backward()
        >>> watch["(model)"]["density"]
        [0.5]
    """
    exact_below = renamed("watch", "dense_below", dense_below, "exact_below", exact_below)
    return Watch(model, every, window=window, to=to, exact_below=exact_below)
