# SPDX-License-Identifier: BSD-3-Clause
"""The report about each layer of a model: its settings, its products and the reasons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ._choose import IDENTITY
from ._convert import stated_reason
from ._decision import Decision
from ._layer import PruningLayer, trains_weight, weight_sources
from ._models import check_module, format_table, layers_of
from ._pattern import UNBIASED_METHODS, Pruning


class Row(NamedTuple):
    """One layer in a ``Report``. A layer whose weight gradient may be pruned has a second row for it.

    Attributes:
        layer, type: the name of the layer in the model, and its class.
        gradient: ``"data"`` or ``"weight"``.
        pattern, method, backend: empty if the layer is plain.
        product: the product that computes the gradient: ``"plain"`` (the original layer's), ``"exact"`` (not pruned),
            ``"dense"`` or ``"sparse"`` (pruned); empty if no backward has decided yet.
        ms: the milliseconds of that product if it was measured, else None.
        why: the reason, as a phrase.
    """

    layer: str
    type: str
    gradient: str
    pattern: str
    method: str
    backend: str
    product: str
    ms: float | None
    why: str

    @property
    def note(self) -> str:
        """The product and the reason in one phrase, for people."""
        return f"{self.product or 'not decided'}: {self.why}"


class Report(list[Row]):
    """The rows of ``sdgp.report``. They print as a table.

    Attributes:
        hint: a suggestion for the whole model, printed below the table; may be empty.
    """

    hint: str

    def __init__(self, rows: Iterable[Row] = (), hint: str = "") -> None:
        super().__init__(rows)
        self.hint = hint

    def __str__(self) -> str:
        rows = ([_cell(value) for value in row] for row in self)
        return "\n".join([*format_table(Row._fields, rows), *([self.hint] if self.hint else [])])

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """Reports for each layer of ``model`` its settings, the product that computes each of its gradients, and why.

    A layer has a row for its data gradient and, if ``weight_grad`` is set, one for its weight gradient.

    The product is that of the last backward, unless the layer is now kept exact (``sdgp.paused``, ``sdgp.Schedule``,
    ``sdgp.watch``). Tools that accept only the class ``nn.Linear`` or ``nn.Conv2d`` itself, such as eager
    quantization, skip converted layers: call ``sdgp.revert`` first.

    Args:
        model: any module. Modules without weights to multiply by have no row.

    Returns:
        A ``Report``, which is a list of ``Row`` and prints as a table.

    Raises:
        ValueError: If ``model`` is not an ``nn.Module``.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8))
        >>> model = sdgp.convert(
        ...     model, weight_grad="4:16", backend="dense", filter=lambda module, name: name == "0"
        ... )
        >>> print(sdgp.report(model))
        layer | type   | gradient | pattern | method | backend | product | ms | why
        ------|--------|----------|---------|--------|---------|---------|----|----------------------
        0     | Linear | data     | 2:4     | mvue   | dense   | dense   |    | backend="dense"
        0     | Linear | weight   | 4:16    | mvue   | dense   | dense   |    | backend="dense"
        1     | Linear | data     |         |        |         | plain   |    | filter returned False
    """
    check_module("report", model)
    rows = [row for name, module in layers_of(model) for row in _rows(name or "(model)", module)]
    return Report(rows, _hint(module for _, module in layers_of(model)))


def _rows(name: str, module: nn.Module) -> list[Row]:
    kind = type(module).__name__
    if not isinstance(module, PruningLayer):
        return [Row(name, kind, "data", "", "", "", "plain", None, stated_reason(module))]
    parts = [("data", module.pruning.data, module.decision)]
    if module.pruning.weight is not None:
        parts.append(("weight", module.pruning.weight, module.weight_decision))
    return [_row(name, module, *part) for part in parts]


def _row(name: str, module: PruningLayer, gradient: str, pruning: Pruning, decision: Decision | None) -> Row:
    if module.held:
        product, ms, why = "exact", None, module.held
    elif pruning.is_identity:
        product, ms, why = IDENTITY.product, None, IDENTITY.why
    elif gradient == "weight" and not trains_weight(module):
        product, ms, why = "exact", None, "the weight is frozen"
    elif decision is not None:
        product, ms, why = decision.product, decision.ms, decision.why
    elif pruning.backend in ("dense", "sparse"):
        product, ms, why = pruning.backend, None, f'backend="{pruning.backend}"'
    else:
        product, ms, why = "", None, "no backward so far"
    if gradient == "weight" and product not in ("plain", "exact") and pruning.method not in UNBIASED_METHODS:
        why += f"; biased: the error of {pruning.method} does not average out"
    if hasattr(module, "qconfig"):  # eager quantization was requested
        why += "; torch.ao.quantization skips what is not exactly nn.Linear or nn.Conv2d: sdgp.revert first"
    kind = type(module).__name__
    return Row(name, kind, gradient, str(pruning.pattern), pruning.method, pruning.backend, product, ms, why)


def _hint(modules: Iterable[nn.Module]) -> str:
    """Returns a hint about wider patterns that could replace those of layers on a CPU, or an empty string."""
    pairs: dict[str, str] = {}
    for module in modules:
        if isinstance(module, PruningLayer) and weight_sources(module)[0].device.type == "cpu":
            pattern, wider = module.pruning.pattern, module.pruning.pattern.wider
            if wider is not None and module.too_narrow(module, wider) is None:
                pairs[str(pattern)] = str(wider)
    if not pairs:
        return ""
    instead = ", ".join(f"{wider} in place of {pattern}" for pattern, wider in pairs.items())
    return f"on a CPU a wider group of the same density takes the same time and adds less noise: {instead}"


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.2f}"
