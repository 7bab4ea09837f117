# SPDX-License-Identifier: BSD-3-Clause
"""Records what pruning does to each layer's data gradient while a model trains."""

from __future__ import annotations

import functools
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
from torch._subclasses.fake_tensor import FakeTensor

from . import _fidelity
from ._fidelity import METRICS, Sums
from ._layer import PruningLayer, prunes
from ._models import check_eager, check_module, format_table, layers_of, pruning_layers
from ._past_settings import settings_of
from ._pattern import Pruning
from ._renamed import renamed
from ._step import Handles, Hook, Receive, is_measuring, note_weights, on_gradient

if TYPE_CHECKING:
    from typing_extensions import Self

#: The records of one layer: the recorded steps under "step", and a list of the same length for each metric.
Record: TypeAlias = dict[str, list[float]]

_NO_RECORD: Record = {key: [] for key in ("step", *METRICS)}


class Watch(Mapping[str, Record]):
    """The records of ``sdgp.watch``, a mapping from layer names to metrics.

    ``watch[layer][metric]`` is a list with one value for each step in ``watch[layer]["step"]``. A watch prints as a
    table of the means over the last ``window`` records.

    Attributes:
        step: the number of training forwards so far.

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
        check_module("watch", model)
        check_eager("watch", model)
        if every < 1 or window < 1:
            raise ValueError(f"watch: expected every >= 1 and window >= 1, got {every} and {window}")
        if exact_below is not None and not 0 < exact_below <= 1:
            raise ValueError(f"watch: expected 0 < exact_below <= 1, a cosine, got {exact_below}")
        pruning_layers("watch", model)
        names = {layer: name or "(model)" for name, layer in layers_of(model)}  # they may be converted later
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
        self._last: dict[str, deque[Sums]] = {}  # the finite records in the window
        self._judged: dict[str, Pruning] = {}  # the settings that these records are of
        self._pending: list[tuple[PruningLayer, Pruning, Tensor]] = []
        self._undecided: set[nn.Module] = set()  # auto decides for these in the backward of the pending step
        self._pending_step = 0
        self._weights: dict[nn.Module, Tensor] = {}  # those that a parametrization computed in the last forward
        self._layer_hooks: list[Handles] = []
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
                continue  # the layer was reverted to the plain one
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
        """The layers that ``exact_below`` made exact, and the reason for each."""
        self._collect()
        held = {
            name for layer, name in self._names.items() if isinstance(layer, PruningLayer) and "watch" in layer.holds
        }
        return {name: why for name, why in self._set_aside.items() if name in held}

    def close(self) -> None:
        """Ends watching. The records remain available, and the layers that were set aside stay exact."""
        self._collect()
        self._model_hook.remove()
        self._rest()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps and the layers set aside, so that a run can resume from a checkpoint."""
        return {"step": self.step, "set_aside": self.set_aside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned.

        Raises:
            ValueError: If ``state`` is not the state of a watch, or names layers that are not in this model.
        """
        if set(state) != {"step", "set_aside"}:
            raise ValueError(f'watch: expected a state_dict with "step" and "set_aside", got {sorted(state)}')
        unknown = sorted(set(state["set_aside"]) - set(self._names.values()))
        if unknown:
            raise ValueError(f"watch: expected a state_dict of this model's layers, got {', '.join(unknown)}")
        before = set(self._set_aside)
        self.step, self._set_aside = state["step"], dict(state["set_aside"])
        for layer, name in self._names.items():
            if isinstance(layer, PruningLayer) and name in before | set(self._set_aside):
                layer.hold("watch", self._set_aside.get(name, ""))

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._collect()
        self._rest()
        if not (model.training and torch.is_grad_enabled()) or is_measuring():
            return
        if self.step % self._every == 0:
            layers = [layer for layer in self._names if isinstance(layer, PruningLayer)]
            self._weights, of_weights = note_weights(layers)
            self._layer_hooks = [on_gradient(layers, self._after_forward), of_weights]
            self._pending_step = self.step
        self.step += 1

    def _rest(self) -> None:
        for hooks in self._layer_hooks:
            hooks.remove()
        self._weights = {}

    def _after_forward(self, layer: PruningLayer) -> Receive | None:
        pruning, held = settings_of(layer)  # the backward uses them too, whatever changes until then
        return None if held else functools.partial(self._receive, layer, pruning.data, self._weights.get(layer))

    def _receive(
        self, layer: PruningLayer, pruning: Pruning, weight: Tensor | None, grad_output: Tensor, shape: Tensor
    ) -> None:
        if isinstance(grad_output, FakeTensor) or grad_output.is_meta:
            return  # there are no values
        undecided = pruning.backend == "auto" and not pruning.is_identity and vars(layer).get("decision") is None
        if isinstance(layer, PruningLayer) and (undecided or prunes(pruning, layer.decision)):
            if undecided:
                self._undecided.add(layer)
            seed = (self._pending_step << 20) + len(self._pending)
            self._pending.append((layer, pruning, _fidelity.measure(layer, pruning, weight, grad_output, shape, seed)))

    def _collect(self) -> None:
        """Fetches the measurements of the last watched step from the device and records them.

        This runs when the next step begins or somebody reads the records, so that training does not wait for it.
        """
        for layer in self._undecided:
            if not (isinstance(layer, PruningLayer) and prunes(layer.pruning, layer.decision)):
                self._pending = [entry for entry in self._pending if entry[0] is not layer]
        self._undecided.clear()
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
            except OSError as error:  # a full disk must not end the training
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
        freed = name in self._set_aside and "watch" not in getattr(layer, "holds", {})
        if freed or self._judged.setdefault(name, pruning) != pruning:  # the layer was converted again
            self._judged[name] = pruning
            self._set_aside.pop(name, None)
            window.clear()
        values = _fidelity.metrics(sums)
        if math.isfinite(values["error"]):  # a gradient that overflowed has no meaningful metrics
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
                if isinstance(layer, PruningLayer):  # the layer was not reverted meanwhile
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
    """Returns the mean of the last ``window`` finite values, or NaN if there are none."""
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

    At a recorded step, each layer that prunes computes its data gradient a few more times, exact and pruned, from a
    quarter of the batch. With ``every=100`` this costs less than 1 % of the training time. It does not affect training:
    weights and random numbers stay the same, bit for bit. A layer is not recorded while its gradient is exact because
    ``auto`` chose so, or because the layer is paused, scheduled or set aside.

    Let g be the exact data gradient, p the pruned one and x the output gradient. The metrics are:

    - ``cosine``: the cosine of the angle between p and g. ``error``: |p - g| / |g|.
    - ``bias``: |E p - g| / |g|, over the last ``window`` records. This is the error that would remain after averaging
      many draws: about 0 for the unbiased methods, and the error itself for methods without random draws.
    - ``l1_kept``, ``l2_kept``: the norm of the values of x that stay, as a share of the norm of x.
    - ``zeros``: the share of zeros in x. ``density``: the share of nonzeros in the pruned x.

    Layers that are converted later are recorded, too. Weight gradients are not recorded. If ``exact_below`` sets a
    layer aside, both its gradients are exact. The steps of ``advise``, ``Budget`` and ``profile`` do not count.

    A step is a forward in training mode with gradients enabled. If there are several forwards before one step of the
    optimizer, each one counts. Nothing is recorded under torch.compile, the transforms of torch.func, batched gradients
    and fake tensors. Every process records its own part of the batch.

    Args:
        model: a model that ``sdgp.convert`` has converted.
        every: the number of steps from one record to the next. The first step is recorded.
        window: the number of records that the bias, the table and ``exact_below`` use.
        to: an additional output: the path of a file that JSON lines are appended to, or an object with TensorBoard's
            ``add_scalar(tag, value, step)``.
        exact_below: if the mean cosine of a layer over a full window is below this value, its gradients are exact from
            then on. ``sdgp.report`` shows the reason. Converting the layer again makes it prune again.
        dense_below: the deprecated name of ``exact_below``. It raises a warning.

    Returns:
        A ``Watch``, which is a mapping from layers to lists. ``sdgp.plot`` draws it. Watching ends with ``close()``, or
        at the end of a ``with`` block.

    Raises:
        ValueError: If an argument is invalid. The message reads ``watch: requirement, got actual``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> watch = sdgp.watch(model, every=1)
        >>> model(torch.randn(8, 64, requires_grad=True)).square().sum().backward()
        >>> watch["(model)"]["density"]
        [0.5]
    """
    exact_below = renamed("watch", "dense_below", dense_below, "exact_below", exact_below)
    return Watch(model, every, window=window, to=to, exact_below=exact_below)
