# SPDX-License-Identifier: BSD-3-Clause
"""The base class of the pruning layers, and the conversion to and from the plain layer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._decision import Decision, Products
from ._ops import prune_nm
from ._past_settings import forget_undone, remember
from ._pattern import Pattern, PatternLike, Pruning, WeightGradLike
from ._renamed import warn_renamed

if TYPE_CHECKING:
    from typing_extensions import Self

_Module = TypeVar("_Module", bound=nn.Module)

_NO_GRADIENT = Decision("exact", "the input needs no gradient")

# The number of pauses that each layer is in, plain layers included: they may be converted in the pause.
_pauses: dict[nn.Module, int] = {}


class PruningLayer(nn.Module):
    """The base class of the pruning layers: the settings, and the conversion to and from the plain layer.

    Attributes:
        pruning: the settings.
        holds: why the gradients are exact now in spite of the settings, for each holder (``"paused"``, ``"schedule"``,
            ``"watch"``); empty if there is no holder.
        decision: the decision of the last backward for the data gradient.
        weight_decision: the same for the weight gradient, if ``pruning.weight_grad`` is set.
        unscheduled: the layer's own pattern while a ``Schedule`` replaces it.
        plain_for: the ``signature`` of calls that the plain operator computes directly (``is_plain_again``).
    """

    weight: Tensor
    pruning: Pruning
    holds: dict[str, str]
    decision: Decision | None
    weight_decision: Decision | None
    unscheduled: Pattern | None = None
    plain_for: tuple[object, ...] | None
    _plain: ClassVar[type[nn.Module]]
    _rows_multiple: ClassVar[int] = 1  # the products take only multiples of this number of rows

    @classmethod
    def from_plain(
        cls,
        plain: nn.Module,
        pattern: PatternLike = "2:4",
        method: str = "mvue",
        backend: str = "auto",
        *,
        weight_grad: WeightGradLike | None = None,
    ) -> Self:
        """Returns a pruning layer that shares the Parameters, buffers and hooks of the plain layer ``plain``.

        Raises:
            ValueError: If ``plain`` is of another class (also a subclass): ``from_plain: requirement, got actual``.
        """
        if type(plain) is not cls._plain:
            raise ValueError(
                f"from_plain: expected a {cls._plain.__module__}.{cls._plain.__qualname__}, got a "
                f"{type(plain).__module__}.{type(plain).__qualname__}"
            )
        return cls.sharing(plain, Pruning.parse(cls.__name__, pattern, method, backend, weight_grad))

    @classmethod
    def sharing(cls, plain: nn.Module, pruning: Pruning) -> Self:
        """Does what ``from_plain`` does, with settings that were checked."""
        layer = _share(plain, cls)
        layer._set_up(pruning)
        return layer

    def to_plain(self) -> nn.Module:
        """Returns a plain layer that shares the Parameters, buffers and hooks of this layer."""
        plain = _share(self, self._plain)
        _drop_settings(plain)
        return plain

    @classmethod
    def from_dense(cls, dense: nn.Module, *settings: Any, **named: Any) -> Self:
        """The old name of ``from_plain``."""
        warn_renamed(cls.__name__, "from_dense", "from_plain")
        return cls.from_plain(dense, *settings, **named)

    def to_dense(self) -> nn.Module:
        """The old name of ``to_plain``."""
        warn_renamed(type(self).__name__, "to_dense", "to_plain")
        return self.to_plain()

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this method and would keep the returned module in the model permanently.
        raise RuntimeError(
            f"torch.jit.script: expected a plain model, got a {type(self).__name__} of sdgp: script "
            "sdgp.revert(copy.deepcopy(model)), whose forward is the same, or trace this one"
        )

    def hold(self, who: str, why: str) -> None:
        """Keeps the gradients of all later forwards exact, until ``who`` calls this again with an empty ``why``."""
        if self.holds.get(who, "") != why:
            remember(self)
            self.holds = {name: reason for name, reason in {**self.holds, who: why}.items() if reason}
            self.plain_for = None
            forget_undone(self)

    def use(self, pruning: Pruning) -> None:
        """Replaces the settings, from the next forward on."""
        if self.pruning != pruning:
            remember(self)
            self.pruning = pruning
            self._forget()

    @property
    def held(self) -> str:
        """Why the next forward records an exact gradient in spite of the settings; empty if there is no holder."""
        return self.holds.get("paused") or next(iter(self.holds.values()), "")

    @property
    def is_pruning(self) -> bool:
        """Whether the data or the weight gradient is pruned, as far as the last backward tells."""
        return self.prunes_data or self.prunes_weight

    @property
    def prunes_data(self) -> bool:
        """``is_pruning`` for the data gradient only."""
        return not self.held and prunes(self.pruning.data, self.decision)

    @property
    def prunes_weight(self) -> bool:
        """``is_pruning`` for the weight gradient only."""
        pruning = self.pruning.weight
        if pruning is None or self.held or not trains_weight(self):
            return False
        return prunes(pruning, self.weight_decision)

    @classmethod
    def too_narrow(cls, layer: nn.Module, pattern: Pattern) -> str | None:
        """Returns why a pruning or plain layer has no complete group of the pattern, or None if it has one."""
        channels = cls._channels(layer)
        return f"{channels} output channels per group, fewer than m = {pattern.m}" if channels < pattern.m else None

    @staticmethod
    def _channels(layer: Any) -> int:
        """Returns the number of output channels, per group for a convolution."""
        channels: int = layer.out_features
        return channels

    def products(self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None) -> Products:
        """Returns the data gradient of a call, to measure it. Only the shape and strides of ``input`` matter.

        Args:
            weight: the weight of the call. None: the layer's weight now.
        """
        raise NotImplementedError

    def weight_products(self, grad_output: Tensor, input: Tensor) -> Products:
        """Returns the weight gradient of a call, pruned as ``pruning.weight`` says, to measure it."""
        raise NotImplementedError

    def prune(self, grad_output: Tensor, pruning: Pruning, seed: Tensor | None) -> Tensor:
        """Returns the output gradient as it enters the data-gradient product: pruned along the output features."""
        n, m = pruning.pattern
        return prune_nm(grad_output, n, m, -1, pruning.method, seed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.pruning}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle does not take part in a pause, whose end would not reach it.
        holds = {who: why for who, why in self.holds.items() if who != "paused"}
        state = {**vars(self), "holds": holds, "plain_for": None}
        state.pop("_compiled_call_impl", None)  # it calls the original, as in nn.Module
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A parametrized layer would otherwise be copied without __getstate__.
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__ = copy.deepcopy(PruningLayer.__getstate__(self), memo)
        return twin

    def _set_up(self, pruning: Pruning) -> None:
        self.pruning, self.holds = pruning, {"paused": "paused"} if self in _pauses else {}
        self._forget()

    def _forget(self) -> None:
        """Drops what was decided under other settings."""
        self.decision = self.weight_decision = self.plain_for = None

    def _note_input(self, input: Tensor) -> None:
        """Notes that the input of a forward needs no gradient, until a forward has a decision to make."""
        if torch.compiler.is_compiling() or self.decision is not None or input.requires_grad:
            return
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            self.decision = _NO_GRADIENT

    def _traced(self, input: torch.fx.Proxy) -> Any:
        """Returns the node of a call under torch.fx, or None if torch.fx must trace the plain layer's operators.

        The node is the whole layer, so the traced model prunes too.
        """
        tracer: Any = input.tracer
        try:
            target = tracer.path_of_module(self)
        except NameError:  # some tracers do not know the module that they trace
            return None
        return tracer.create_proxy("call_module", target, (input,), {}) if target else None


def prunes(pruning: Pruning, decision: Decision | None) -> bool:
    """Returns whether a product prunes, judged by its last decision. It ignores holds."""
    if pruning.is_identity:
        return False
    return pruning.backend != "auto" if decision is None else decision.prunes


def weight_sources(layer: Any) -> list[Tensor]:
    """Returns the weight, or the tensors that a parametrization computes it from.

    To read a parametrized weight may train its parametrization or draw random numbers.
    """
    if not parametrize.is_parametrized(layer, "weight"):
        return [layer.weight]
    parametrization = layer.parametrizations.weight
    return [*parametrization.parameters(), *parametrization.buffers()]


def trains_weight(layer: nn.Module) -> bool:
    """Returns whether the weight needs a gradient."""
    return any(tensor.requires_grad for tensor in weight_sources(layer))


def calls_plain(layer: nn.Module, input: object) -> bool:
    """Returns whether the plain layer must compute this call.

    It must if torch.fx traces it, or if another library stored this method before sdgp.revert.
    """
    return is_traced(input) or not isinstance(layer, PruningLayer)


def is_traced(input: object) -> bool:
    """Returns whether torch.fx records this call: its argument stands for a tensor."""
    return isinstance(input, torch.fx.Proxy)


def call_plain(layer: Any, input: Any) -> Any:
    """Computes a call for which ``calls_plain`` is true."""
    if not isinstance(layer, PruningLayer):
        return type(layer).forward(layer, input)
    traced = layer._traced(input)
    return layer._plain.forward(layer, input) if traced is None else traced


def pause(layer: nn.Module) -> None:
    """Keeps the gradients of a layer's forwards exact, also if it is converted later, until ``resume``.

    Pauses may overlap in any order.
    """
    _pauses[layer] = _pauses.get(layer, 0) + 1
    if isinstance(layer, PruningLayer):
        layer.hold("paused", "paused")


def resume(layer: nn.Module) -> None:
    """Ends one pause of a layer."""
    _pauses[layer] -= 1
    if not _pauses[layer]:
        del _pauses[layer]
        if isinstance(layer, PruningLayer):
            layer.hold("paused", "")


def prune_in_place(module: nn.Module, twin: type[PruningLayer], pruning: Pruning) -> None:
    """Turns a plain layer into its pruning twin, or gives a twin new settings.

    The layer stays the same object, so every reference, hook and wrapper keeps it. The hold of a watch ends; other
    holds stay.
    """
    if isinstance(module, PruningLayer):
        module.use(pruning)
        module.unscheduled = None
        module.hold("watch", "")
        module._forget()
    else:
        module.__class__ = twin
        module._set_up(pruning)  # type: ignore[operator]


def unprune_in_place(module: PruningLayer) -> None:
    """Turns a pruning layer back into the plain layer: the inverse of ``prune_in_place``."""
    module.__class__ = module._plain  # type: ignore[assignment]
    _drop_settings(module)


def _drop_settings(module: nn.Module) -> None:
    for name in ("pruning", "holds", "decision", "weight_decision", "unscheduled", "plain_for", "_casts"):
        vars(module).pop(name, None)


def _share(module: nn.Module, cls: type[_Module]) -> _Module:
    """Returns a ``cls`` with the attributes of ``module``. It copies dictionaries and shares their contents."""
    twin = cls.__new__(cls)
    twin.__dict__ = {
        key: copy.copy(value) if isinstance(value, dict) else value
        for key, value in vars(module).items()
        if key != "_compiled_call_impl"  # it calls ``module``
    }
    return twin
