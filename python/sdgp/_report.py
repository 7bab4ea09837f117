# SPDX-License-Identifier: BSD-3-Clause
"""What became of each layer of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ._choose import IDENTITY
from ._convert import stated_reason
from ._layer import PruningLayer
from ._models import check_module, format_table, layers_of


class Row(NamedTuple):
    """One layer in a ``Report``.

    Attributes:
        pattern, method, backend: empty where the layer is plain.
        product: what its data gradient takes: ``"plain"`` the original layer's, ``"exact"`` (not pruned), ``"dense"``
            or ``"sparse"`` (pruned); empty where no backward has decided yet.
        ms: the milliseconds of that product where it was measured, else None.
        why: the reason, a phrase.
    """

    layer: str
    type: str
    pattern: str
    method: str
    backend: str
    product: str
    ms: float | None
    why: str

    @property
    def note(self) -> str:
        """Product and reason in one phrase, for a person."""
        return f"{self.product or 'not decided'}: {self.why}"


class Report(list[Row]):
    """The rows of ``sdgp.report``; prints as a table."""

    def __str__(self) -> str:
        rows = ([_cell(value) for value in row] for row in self)
        return "\n".join(format_table(Row._fields, rows))

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What became of each layer of ``model``: its settings, the product that its data gradient takes, and why.

    The product is that of the last backward, unless somebody keeps the layer exact since (``sdgp.paused``,
    ``sdgp.Schedule``, ``sdgp.watch``). Tools that look for the exact class ``nn.Linear`` or ``nn.Conv2d``, as eager
    quantization does, skip converted layers: ``sdgp.revert`` the model first.

    Raises:
        ValueError: where ``model`` is no ``nn.Module``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)), backend="dense")
        >>> print(sdgp.report(model))
        layer | type   | pattern | method | backend | product | ms | why
        ------|--------|---------|--------|---------|---------|----|----------------------------------------------
        0     | Linear | 2:4     | mvue   | dense   | dense   |    | backend="dense"
        1     | Linear |         |        |         | plain   |    | 2 output channels per group, fewer than m = 4
    """
    check_module("report", model)
    return Report(_row(name or "(model)", module) for name, module in layers_of(model))


def _row(name: str, module: nn.Module) -> Row:
    kind = type(module).__name__
    if not isinstance(module, PruningLayer):
        return Row(name, kind, "", "", "", "plain", None, stated_reason(module))
    pruning, decision = module.pruning, module.decision
    if module.held:
        product, ms, why = "exact", None, module.held
    elif pruning.is_identity:
        product, ms, why = IDENTITY.product, None, IDENTITY.why
    elif decision is not None:
        product, ms, why = decision.product, decision.ms, decision.why
    elif pruning.backend in ("dense", "sparse"):
        product, ms, why = pruning.backend, None, f'backend="{pruning.backend}"'
    else:
        product, ms, why = "", None, "no backward so far"
    if hasattr(module, "qconfig"):  # eager quantization was asked for
        why += "; torch.ao.quantization skips what is not exactly nn.Linear or nn.Conv2d: sdgp.revert first"
    return Row(name, kind, str(pruning.pattern), pruning.method, pruning.backend, product, ms, why)


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.2f}"
